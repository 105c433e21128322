"""Dice and IoU of label maps, per image and class, and their summary; the counts they come from.

`score_image` computes both on integer label maps at the image's original resolution, on the host
(numpy, float64); `Confusion` has them, sensitivity and specificity for one pair of masks. For a
class with predicted region P and true region T:

    Dice = 2 |P ∩ T| / (|P| + |T|),    IoU = |P ∩ T| / |P ∪ T|

**When a region is empty.** If one of the two is empty, the score is 0. If both are, it is undefined
(0/0): NaN, left out of mean and standard deviation, and counted in `Summary.n_undefined`, so that
a reader sees over how many images a mean was taken. nnU-Net does the same (nnU-Net v2,
evaluation/evaluate_predictions.py: NaN, then nanmean). Numbers compare only under one rule, and
others decide otherwise: for both empty SAMed scores 0, and MetricsReloaded's code Dice 1, yet IoU
NaN; MONAI leaves out every image whose truth is empty, and with it every false alarm there
(ignore_empty=False scores these 1 or 0).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class ImageScore(NamedTuple):
    """Scores of one image: float64 (k,) in [0, 1], entry i for class i + 1, NaN if undefined."""

    dice: np.ndarray
    iou: np.ndarray


@dataclass(frozen=True)
class Summary:
    """One score of one class over images."""

    mean: float  # over the n images in which the score is defined; NaN if n is 0
    std: float  # population standard deviation over the same images; NaN if n is 0
    n: int
    n_undefined: int  # images with neither prediction nor truth

    def as_json(self) -> dict[str, Any]:
        """The fields, with None for NaN, which JSON has no word for."""
        mean, std = (None if np.isnan(v) else v for v in (self.mean, self.std))
        return {"mean": mean, "std": std, "n": self.n, "n_undefined": self.n_undefined}


class Confusion(NamedTuple):
    """Pixels or voxels of one class by what they are and what they were called.

    The scores are float64 in [0, 1], and NaN where the formula is 0/0: what to make of that is
    decided elsewhere (samjax/metrics/cases.py).
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN); NaN where neither prediction nor truth has the class."""
        twice = 2 * self.true_positives
        return _ratio(twice, twice + self.false_positives + self.false_negatives)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN); NaN where neither prediction nor truth has the class."""
        wrong = self.false_positives + self.false_negatives
        return _ratio(self.true_positives, self.true_positives + wrong)

    @property
    def sensitivity(self) -> float:
        """TP / (TP + FN), also called recall; NaN where the truth has nothing of the class."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def specificity(self) -> float:
        """TN / (TN + FP); NaN where the truth has nothing else than the class."""
        return _ratio(self.true_negatives, self.true_negatives + self.false_positives)


def confusion(prediction: np.ndarray, truth: np.ndarray) -> Confusion:
    """Counts of one pair of masks, of any number of dimensions.

    Args:
        prediction, truth: bool, of one shape.

    Raises:
        ValueError: masks that are not bool, or shapes that differ.
    """
    prediction, truth = check_masks(prediction, truth)
    both = int(np.count_nonzero(prediction & truth))
    false_positives = int(np.count_nonzero(prediction)) - both
    false_negatives = int(np.count_nonzero(truth)) - both
    rest = truth.size - both - false_positives - false_negatives
    return Confusion(both, false_positives, false_negatives, rest)


def score_image(prediction: np.ndarray, truth: np.ndarray, num_classes: int = 1) -> ImageScore:
    """Dice and IoU of one image for the foreground classes 1..num_classes.

    Args:
        prediction, truth: label maps of one shape, usually (h, w): integers in 0..num_classes,
            0 the background, or bool when there is one class.
        num_classes: number of foreground classes.

    Raises:
        ValueError: shapes that differ, values that are no labels of these classes, or no class.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, expected at least 1")
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}")
    pairs = (num_classes + 1) * _labels(truth, "truth", num_classes)
    pairs += _labels(prediction, "prediction", num_classes)
    # confusion[t, p]: number of pixels of class t that were predicted as p
    confusion = np.bincount(pairs.ravel(), minlength=(num_classes + 1) ** 2)
    confusion = confusion.reshape(num_classes + 1, num_classes + 1)
    both = np.diagonal(confusion)[1:].astype(np.float64)
    total = (confusion.sum(0) + confusion.sum(1))[1:].astype(np.float64)
    undefined = total == 0
    total[undefined] = 1
    dice, iou = 2 * both / total, both / (total - both)
    return ImageScore(np.where(undefined, np.nan, dice), np.where(undefined, np.nan, iou))


def summarise(scores: Iterable[np.ndarray]) -> list[Summary]:
    """One `Summary` per class from the scores of many images, each of shape (k,).

    Raises:
        ValueError: no image, or scores of different length.
    """
    rows = [np.asarray(row, np.float64) for row in scores]
    if not rows:
        raise ValueError("there are no scores to summarise")
    lengths = sorted({row.shape for row in rows})
    if len(lengths) > 1 or len(lengths[0]) != 1:
        raise ValueError(f"scores have shapes {lengths}, expected one shape (classes,)")
    summaries = []
    for values in np.stack(rows, axis=1):
        defined = values[~np.isnan(values)]
        n = defined.size
        mean, std = (float(defined.mean()), float(defined.std())) if n else (np.nan, np.nan)
        summaries.append(Summary(mean, std, n, values.size - n))
    return summaries


def mean_over_classes(summaries: Iterable[Summary]) -> float:
    """Mean of the classes' means (images first, then classes, as SAMed reports it).

    Classes that are defined in no image are left out; NaN when none is left.
    """
    means = [summary.mean for summary in summaries if summary.n]
    return float(np.mean(means)) if means else float("nan")


def check_masks(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two masks as arrays, if both are bool and of one shape that is not empty.

    Raises:
        ValueError: they are not.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if mask.dtype != bool:
            raise ValueError(f"{name} is {mask.dtype}, expected a bool mask")
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}")
    if not truth.size:
        raise ValueError(f"masks have shape {truth.shape}, expected at least one pixel")
    return prediction, truth


def check_labels(values: np.ndarray, name: str, num_classes: int) -> None:
    """Checks that a label map is bool or has integers in 0..num_classes.

    Raises:
        ValueError: it has not; the message names `name` and the values.
    """
    if values.dtype != bool and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} is {values.dtype}, expected integer labels or bool")
    if values.size and (values.min() < 0 or values.max() > num_classes):
        unknown = [int(v) for v in np.unique(values) if not 0 <= v <= num_classes]
        raise ValueError(f"{name} has values {unknown[:8]}, expected labels 0 to {num_classes}")


def _labels(values: np.ndarray, name: str, num_classes: int) -> np.ndarray:
    check_labels(values, name, num_classes)
    return values.astype(np.int64)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
