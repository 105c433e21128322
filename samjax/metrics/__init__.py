"""Metrics of segmentation, on the host: numpy and scipy, float64; nothing here imports JAX.

`score_cases` scores images and volumes, `summarise_cases` takes their means with intervals;
`score_track` has J and F of tracked objects; `score_image` is quick Dice and IoU while training.
"""

from samjax.metrics.cases import Case, CaseScore, score_case, score_cases
from samjax.metrics.overlap import (
    Confusion,
    ImageScore,
    Summary,
    confusion,
    mean_over_classes,
    score_image,
    summarise,
)
from samjax.metrics.plots import plot_cases
from samjax.metrics.ranking import auc
from samjax.metrics.surface import SurfaceDistances, surface_distances
from samjax.metrics.tables import (
    ClassSummary,
    MetricSummary,
    read_cases,
    summarise_cases,
    write_cases,
)
from samjax.metrics.video import (
    TrackScore,
    TrackSummary,
    boundary_measure,
    region_similarity,
    score_track,
    summarise_tracks,
)

__all__ = [
    "Case",
    "CaseScore",
    "ClassSummary",
    "Confusion",
    "ImageScore",
    "MetricSummary",
    "Summary",
    "SurfaceDistances",
    "TrackScore",
    "TrackSummary",
    "auc",
    "boundary_measure",
    "confusion",
    "mean_over_classes",
    "plot_cases",
    "read_cases",
    "region_similarity",
    "score_case",
    "score_cases",
    "score_image",
    "score_track",
    "summarise",
    "summarise_cases",
    "summarise_tracks",
    "surface_distances",
    "write_cases",
]
