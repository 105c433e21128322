"""J&F of tracked objects: region similarity J and boundary measure F, as DAVIS and SAM 2 report it.

Perazzi et al. 2016 (CVPR, "A Benchmark Dataset and Evaluation Methodology for Video Object
Segmentation") define both; Pont-Tuset et al. 2017 (arXiv 1704.00675, DAVIS 2017) take them per
object and average over the objects of all sequences, and SAM 2 (arXiv 2408.00714) reports their
mean. Where the papers leave something open, the released evaluations decide
(davischallenge/davis2017-evaluation, davis2017/metrics.py; facebookresearch/sam2,
sav_dataset/utils/sav_benchmark.py):

* The boundary lies on pixels that differ from their right, lower, or lower right neighbour. What
  touches the edge of the frame has no boundary there, so a region that fills the frame has none.
* A boundary pixel is found if the other boundary has a pixel within a disk whose radius is 0.008
  of the frame's diagonal, rounded up to whole pixels. F is the harmonic mean of the two shares of
  pixels found: the precision of the prediction's boundary and the recall of the truth's.
* Nothing predicted where nothing is: J = 1. No boundary on either side: F = 1, also where one
  region is empty and the other fills the frame. A boundary on one side only: F = 0.
* The first frame, which the prompt gave, and the last are left out.

Unlike the scores of images (samjax/metrics/overlap.py) there is therefore no undefined value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from samjax.metrics.overlap import check_masks
from samjax.metrics.surface import nearest

BOUND_TH = 0.008  # of the frame's diagonal


@dataclass(frozen=True)
class TrackScore:
    """J and F of the objects of one clip, frame by frame, both float64 (objects, frames) in 0..1.

    `frames` are the indices of the scored frames in the clip.
    """

    objects: tuple[int, ...]
    frames: tuple[int, ...]
    j: np.ndarray
    f: np.ndarray

    @property
    def j_and_f(self) -> np.ndarray:
        """Mean over frames of J and of F, and their mean, for each object: float64 (objects,)."""
        return (self.j.mean(1) + self.f.mean(1)) / 2


@dataclass(frozen=True)
class TrackSummary:
    """Means over the objects of all clips, each object counting once however long its clip is."""

    j: float
    f: float
    j_and_f: float
    n_objects: int


def region_similarity(prediction: np.ndarray, truth: np.ndarray) -> float:
    """J of one object in one frame: intersection over union, and 1 where both are empty.

    Args:
        prediction, truth: bool (h, w), of one shape.

    Raises:
        ValueError: masks that are not bool, not (h, w), or of different shapes.
    """
    prediction, truth = _check_frame(prediction, truth)
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else 1.0


def boundary_measure(
    prediction: np.ndarray, truth: np.ndarray, bound_th: float = BOUND_TH
) -> float:
    """F of one object in one frame.

    Args:
        prediction, truth: bool (h, w), of one shape.
        bound_th: the tolerance, as a fraction of the frame's diagonal below 1, or in pixels from 1.

    Raises:
        ValueError: masks that are not bool, not (h, w), or of different shapes; a tolerance that
            is not positive and finite.
    """
    prediction, truth = _check_frame(prediction, truth)
    if not (np.isfinite(bound_th) and bound_th > 0):
        raise ValueError(f"bound_th is {bound_th}, expected a positive number")
    radius = bound_th if bound_th >= 1 else np.ceil(bound_th * np.hypot(*truth.shape))
    ours, theirs = _boundary(prediction), _boundary(truth)
    if not (ours.any() and theirs.any()):
        return float(ours.any() == theirs.any())
    precision, recall = _found(ours, theirs, radius), _found(theirs, ours, radius)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def score_track(
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    objects: Sequence[int] | None = None,
    skip_ends: bool = True,
    bound_th: float = BOUND_TH,
) -> TrackScore:
    """J and F of every object of a clip.

    Args:
        prediction, truth: label maps (t, h, w) of one shape, whose values are the objects'
            numbers and 0 for none; or bool, for one object of number 1.
        objects: the numbers to score; None for all that the truth has in any frame. An object that
            the prediction lacks scores as an empty mask.
        skip_ends: leaves out the first and the last frame, as DAVIS' semi-supervised task and
            SA-V do.
        bound_th: see `boundary_measure`.

    Raises:
        ValueError: other shapes or types; fewer than three frames to skip two of; no object;
            numbers in the prediction that are not among `objects`, which would else count nowhere.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    for name, maps in (("prediction", prediction), ("truth", truth)):
        if maps.dtype != bool and not np.issubdtype(maps.dtype, np.integer):
            raise ValueError(f"{name} is {maps.dtype}, expected integer labels or bool")
        if maps.ndim != 3:
            raise ValueError(f"{name} has shape {maps.shape}, expected frames (t, h, w)")
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}")
    frames = range(len(truth))[1:-1] if skip_ends else range(len(truth))
    if not frames:
        raise ValueError(f"{len(truth)} frames, of which none is left to score")
    if objects is None:
        objects = [int(number) for number in np.unique(truth[truth != 0])]
    if not objects or len(set(objects)) < len(objects) or 0 in objects:
        raise ValueError(f"objects are {list(objects)}, expected numbers other than 0, once each")
    if strange := sorted(set(np.unique(prediction).tolist()) - {0, *objects}):
        raise ValueError(f"the prediction has objects {strange[:8]}, expected {list(objects)}")
    j, f = np.zeros((2, len(objects), len(frames)))
    for column, frame in enumerate(frames):
        for row, number in enumerate(objects):
            pair = prediction[frame] == number, truth[frame] == number
            j[row, column] = region_similarity(*pair)
            f[row, column] = boundary_measure(*pair, bound_th)
    return TrackScore(tuple(objects), tuple(frames), j, f)


def summarise_tracks(scores: Iterable[TrackScore]) -> TrackSummary:
    """J, F and J&F over the objects of many clips, as DAVIS 2017 takes the mean.

    Raises:
        ValueError: no clip.
    """
    scores = list(scores)
    if not scores:
        raise ValueError("there are no tracks to summarise")
    j, f = (np.concatenate([getattr(s, name).mean(1) for s in scores]) for name in ("j", "f"))
    means = float(j.mean()), float(f.mean())
    return TrackSummary(*means, (means[0] + means[1]) / 2, j.size)


def _check_frame(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, truth = check_masks(prediction, truth)
    if truth.ndim != 2:
        raise ValueError(f"masks have shape {truth.shape}, expected one frame (h, w)")
    return prediction, truth


def _boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels that differ from the next one to the right, below, or diagonally below."""
    # Beyond the frame lies the same as on its edge, so that the edge itself makes no boundary.
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != right) | (mask != below) | (mask != diagonal)


def _found(boundary: np.ndarray, other: np.ndarray, radius: float) -> float:
    """The share of a boundary's pixels that lie within a disk around a pixel of the other one."""
    return float((nearest(boundary, other, (1.0, 1.0)) <= radius).mean())
