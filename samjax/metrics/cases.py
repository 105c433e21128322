"""Scores of images and volumes: one record per case and class.

A case is an image or a volume. `score_case` scores one, `score_cases` many;
samjax/metrics/tables.py keeps the records and takes their means.

**When a region is empty** there may be nothing to measure. This is the only place that decides what
then counts, by one argument, `empty`:

| `empty` | truth only, or prediction only | neither |
|---|---|---|
| "undefined" (default) | Dice, IoU, NSD 0; distances undefined | all undefined |
| "worst" | Dice, IoU, NSD 0; distances the diagonal of the array | all undefined |
| "perfect" | as "worst" | Dice, IoU, NSD 1; distances 0 |

Undefined is NaN: left out of means, an empty cell in the CSV, and counted in the summary with its
reason. Beware that with "undefined" a mean of distances leaves the worst cases out: read it beside
its count, or take "worst". "perfect" is the rule of the BraTS challenges, apart from the distance
they charge. Sensitivity without truth, specificity without background, and AUC without either are
undefined in all three. medpy raises an error where one region is empty; MONAI warns and gives NaN
or infinity for distances, NaN for Dice wherever the truth is empty, and for NSD what "undefined"
says.

**Conventions** other than "standard" are those of released code, with its treatment of the empty,
for comparison with its published numbers only. Both measure in voxels, whatever the spacing:

* "samed" (hitachinsk/SAMed, utils.py: `calculate_metric_percase`; also H-SAM, SAMora, MedSAGa):
  Dice and medpy's HD95 per class over the stacked volume. Predicted where nothing is: Dice 1,
  HD95 0. All else with an empty region, a missed organ too: Dice 0, HD95 0. HD95 of 0 for what was
  missed, and Dice of 1 for a false alarm, flatter the result.
* "sam2lora" (sayanmndl21/SAM2LoRA, utils/eval_metrics.py): per image; Dice, IoU, sensitivity and
  specificity are 0 where they are 0/0; medpy's HD95, and the diagonal where a region is empty; AUC
  over all pixels, undefined where the truth is of one kind (the released code stops there).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from scipy import ndimage

from samjax.metrics.overlap import Confusion, check_labels, confusion
from samjax.metrics.ranking import auc
from samjax.metrics.surface import (
    SurfaceDistances,
    check_spacing,
    check_tolerance,
    surface_distances,
)

Present = Literal["both", "truth", "prediction", "neither"]
Empty = Literal["undefined", "worst", "perfect"]
Convention = Literal["standard", "samed", "sam2lora"]

OVERLAPS = ("dice", "iou", "nsd")  # 0 if one region is empty
SHARES = ("sensitivity", "specificity", "auc")  # of the truth's voxels, or of the others
HAUSDORFF = re.compile(r"hd(\d+)?(_pooled)?")  # hd, hd95, hd90, hd95_pooled
AVERAGES = {"assd": True, "masd": False}  # whether pooled
# What each convention scores where no metrics are named; of released code, that is all there is.
DEFAULTS = {
    "standard": ("dice", "iou", "hd95", "assd"),
    "samed": ("dice", "hd95"),
    "sam2lora": ("dice", "iou", "auc", "hd95", "sensitivity", "specificity"),
}


class Case(NamedTuple):
    """One image or volume to score; see `score_case`, whose arguments of these names they are."""

    case: str
    prediction: np.ndarray
    truth: np.ndarray
    spacing: Sequence[float] | None = None
    patient: str | None = None
    probabilities: np.ndarray | None = None


@dataclass(frozen=True)
class CaseScore:
    """The scores of one class in one case."""

    case: str
    patient: str | None
    label: int  # the class, from 1
    present: Present  # which of truth and prediction have voxels of the class
    values: dict[str, float]  # by metric; NaN where undefined


def score_case(
    prediction: np.ndarray,
    truth: np.ndarray,
    *,
    num_classes: int = 1,
    spacing: Sequence[float] | None = None,
    metrics: Sequence[str] | None = None,
    tolerance_mm: float | Sequence[float] | None = None,
    convention: Convention = "standard",
    empty: Empty = "undefined",
    probabilities: np.ndarray | None = None,
    case: str = "",
    patient: str | None = None,
) -> list[CaseScore]:
    """Scores an image or a volume, class by class.

    Args:
        prediction, truth: label maps (h, w) or (d, h, w) of one shape: integers in 0..num_classes,
            0 the background, or bool when there is one class.
        num_classes: number of foreground classes.
        spacing: size of a voxel along each axis of the array, in mm; None measures in voxels.
        metrics: of "dice", "iou", "sensitivity", "specificity", "auc" (0..1); "nsd" (0..1, at the
            tolerance); "hd", "hd95" or any other percentile, the larger of both directions, and
            "hd95_pooled", which is medpy's; "assd" (pooled), "masd" (mean of both directions), in
            mm. None for those of `DEFAULTS`.
        tolerance_mm: for "nsd": one, or one per class, in the unit of the spacing.
        convention: see the module.
        empty: see the module; the conventions of released code bring their own rule.
        probabilities: for "auc": float (*shape, num_classes), or of `truth`'s shape for one class.
        case, patient: names for the records.

    Returns:
        One record per class, in the order 1..num_classes.

    Raises:
        ValueError: shapes that differ, values that are no labels of these classes, a spacing that
            does not fit, unknown or repeated metrics, or an argument that a metric needs and lacks.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    metrics = _check_metrics(metrics, convention, empty)
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, expected at least 1")
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}")
    if not truth.size:
        raise ValueError(f"label maps have shape {truth.shape}, expected at least one pixel")
    check_labels(prediction, "prediction", num_classes)
    check_labels(truth, "truth", num_classes)
    if convention != "standard" and spacing is not None:
        raise ValueError(f"the convention {convention!r} measures in voxels: leave out the spacing")
    sizes = check_spacing(spacing, truth.ndim)
    tolerances = _tolerances(tolerance_mm, num_classes, "nsd" in metrics)
    channels = _channels(probabilities, truth.shape, num_classes, "auc" in metrics)
    boxes = [_boxes(labels, num_classes) for labels in (prediction, truth)]
    scores = []
    for label in range(1, num_classes + 1):
        box = _joined(*(found[label - 1] for found in boxes))
        region = _Region(
            prediction[box] == label,
            truth[box] == label,
            sizes,
            outside=truth.size - truth[box].size,
            diagonal=math.hypot(*(n * size for n, size in zip(truth.shape, sizes, strict=True))),
            tolerance=tolerances[label - 1],
        )
        values = {}
        for metric in metrics:
            if metric == "auc":
                values[metric] = auc(channels[..., label - 1], truth == label)
            elif convention == "standard":
                values[metric] = _standard(metric, region, empty)
            else:
                rule = _samed if convention == "samed" else _sam2lora
                values[metric] = rule(metric, region)
        scores.append(CaseScore(case, patient, label, region.present, values))
    return scores


def score_cases(cases: Iterable[Case], **options: Any) -> list[CaseScore]:
    """Scores many cases, one after the other, so that `cases` may be a generator.

    Args:
        options: the arguments of `score_case` that all cases share.

    Raises:
        ValueError: what `score_case` refuses, with the name of the case; a name that comes twice.
    """
    scores, seen = [], set()
    for case in cases:
        if case.case in seen:
            raise ValueError(f"the case {case.case!r} comes twice")
        seen.add(case.case)
        try:
            scores += score_case(
                case.prediction,
                case.truth,
                spacing=case.spacing,
                probabilities=case.probabilities,
                case=case.case,
                patient=case.patient,
                **options,
            )
        except ValueError as error:
            raise ValueError(f"case {case.case!r}: {error}") from error
    return scores


def why_undefined(metric: str, present: Present) -> str:
    """The reason for which a metric has no value, in a few words."""
    if metric == "specificity" or (metric == "auc" and present in ("both", "truth")):
        return "no background"
    if metric in SHARES:
        return "no truth"
    reasons = {"truth": "no prediction", "prediction": "no truth", "neither": "both empty"}
    return reasons.get(present, "no value")


@dataclass(frozen=True)
class _Region:
    """One class of one case, cut out of the array; what several metrics need is computed once."""

    prediction: np.ndarray
    truth: np.ndarray
    spacing: tuple[float, ...]
    outside: int  # voxels of the array that were cut away, all of them background
    diagonal: float  # of the whole array
    tolerance: float

    @cached_property
    def counts(self) -> Confusion:
        inside = confusion(self.prediction, self.truth)
        return inside._replace(true_negatives=inside.true_negatives + self.outside)

    @cached_property
    def distances(self) -> SurfaceDistances:
        return surface_distances(self.prediction, self.truth, self.spacing)

    @property
    def present(self) -> Present:
        has_prediction = self.counts.true_positives + self.counts.false_positives > 0
        has_truth = self.counts.true_positives + self.counts.false_negatives > 0
        if has_prediction and has_truth:
            return "both"
        return "truth" if has_truth else "prediction" if has_prediction else "neither"

    def measured(self, metric: str) -> float:
        """The formula's value; NaN where it has none."""
        if metric == "nsd":
            return self.distances.surface_dice(self.tolerance)
        if metric in AVERAGES:
            return self.distances.average(pooled=AVERAGES[metric])
        if match := HAUSDORFF.fullmatch(metric):
            percentile, pooled = match.groups()
            return self.distances.hausdorff(float(percentile or 100), pooled=pooled is not None)
        return getattr(self.counts, metric)


def _standard(metric: str, region: _Region, empty: Empty) -> float:
    is_distance = metric not in OVERLAPS + SHARES
    if empty != "undefined" and is_distance and region.present in ("truth", "prediction"):
        return region.diagonal
    if empty == "perfect" and region.present == "neither" and metric not in SHARES:
        return 0.0 if is_distance else 1.0
    return region.measured(metric)


def _samed(metric: str, region: _Region) -> float:
    if region.present == "both":
        return region.measured("dice" if metric == "dice" else "hd95_pooled")
    return 1.0 if metric == "dice" and region.present == "prediction" else 0.0


def _sam2lora(metric: str, region: _Region) -> float:
    if metric != "hd95":
        value = region.measured(metric)
        return 0.0 if math.isnan(value) else value
    return region.measured("hd95_pooled") if region.present == "both" else region.diagonal


def _check_metrics(
    metrics: Sequence[str] | None, convention: Convention, empty: Empty
) -> tuple[str, ...]:
    if convention not in get_args(Convention):
        raise ValueError(f"convention is {convention!r}, expected one of {get_args(Convention)}")
    if empty not in get_args(Empty):
        raise ValueError(f"empty is {empty!r}, expected one of {get_args(Empty)}")
    if convention != "standard" and empty != "undefined":
        raise ValueError(f"the convention {convention!r} has a rule of its own: leave out empty")
    if metrics is None:
        return DEFAULTS[convention]
    if isinstance(metrics, str) or not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics are {metrics!r}, expected one or more names, once each")
    for metric in metrics:
        if convention != "standard":
            known = metric in DEFAULTS[convention]
        elif match := HAUSDORFF.fullmatch(metric):
            known = int(match.group(1) or 100) <= 100
        else:
            known = metric in OVERLAPS + SHARES or metric in AVERAGES
        if not known:
            named = DEFAULTS[convention]
            if convention == "standard":
                named = (*OVERLAPS, *SHARES, "hd", "hd<percentile>[_pooled]", *AVERAGES)
            raise ValueError(f"unknown metric {metric!r}: {convention!r} has {', '.join(named)}")
    return tuple(metrics)


def _tolerances(
    given: float | Sequence[float] | None, num_classes: int, wanted: bool
) -> list[float]:
    if given is None:
        if wanted:
            raise ValueError("nsd needs tolerance_mm, the distance that counts as near")
        return [math.nan] * num_classes
    values = [float(value) for value in np.atleast_1d(np.asarray(given, np.float64))]
    if np.ndim(given) == 0:
        values *= num_classes
    if len(values) != num_classes:
        raise ValueError(f"tolerance_mm has {len(values)} values for {num_classes} classes")
    for value in values:
        check_tolerance(value)
    return values


def _channels(
    probabilities: np.ndarray | None, shape: tuple[int, ...], num_classes: int, wanted: bool
) -> np.ndarray:
    """The probabilities as (*shape, num_classes); empty if no metric wants them."""
    if not wanted:
        return np.zeros(0)
    if probabilities is None:
        raise ValueError("auc needs probabilities; without them, name the metrics that you want")
    probabilities = np.asarray(probabilities)
    if num_classes == 1 and probabilities.shape == shape:
        return probabilities[..., None]
    if probabilities.shape != (*shape, num_classes):
        raise ValueError(
            f"probabilities have shape {probabilities.shape}, expected {(*shape, num_classes)}"
        )
    return probabilities


def _boxes(labels: np.ndarray, num_classes: int) -> list[tuple[slice, ...] | None]:
    """The box around each class, None for a class that is not there."""
    numbers = labels.view(np.uint8) if labels.dtype == bool else labels
    return ndimage.find_objects(numbers, num_classes)


def _joined(*boxes: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """The box around two; with nothing in either, the array's first voxel will do."""
    there = [box for box in boxes if box is not None]
    if not there:
        return (slice(0, 1),)
    sides = zip(*there, strict=True)
    return tuple(slice(min(s.start for s in side), max(s.stop for s in side)) for side in sides)
