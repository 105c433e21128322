"""AUC: how well probabilities rank the pixels of an object above all others."""

from __future__ import annotations

import math

import numpy as np


def auc(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Area under the ROC curve over all pixels or voxels, with ties counted half.

    It is the probability that a pixel of the object, drawn at random, has a higher value than one
    of the background (Hanley and McNeil 1982), and equals scikit-learn's `roc_auc_score`.

    Args:
        probabilities: float, of the shape of `truth`; logits give the same result, since only the
            order counts.
        truth: bool.

    Returns:
        0..1, float64; NaN where the truth is all object or all background, where there is nothing
        to rank.

    Raises:
        ValueError: shapes that differ, a truth that is not bool, values that are not floats or
            are NaN.
    """
    probabilities, truth = np.asarray(probabilities), np.asarray(truth)
    if truth.dtype != bool:
        raise ValueError(f"truth is {truth.dtype}, expected a bool mask")
    if not np.issubdtype(probabilities.dtype, np.floating):
        raise ValueError(f"probabilities are {probabilities.dtype}, expected floats")
    if probabilities.shape != truth.shape:
        raise ValueError(f"probabilities have shape {probabilities.shape}, truth {truth.shape}")
    if bad := np.count_nonzero(np.isnan(probabilities)):
        raise ValueError(f"{bad} of {probabilities.size} probabilities are NaN")
    inside, outside = probabilities[truth], np.sort(probabilities[~truth])
    if not inside.size or not outside.size:
        return math.nan
    below = np.searchsorted(outside, inside, "left").sum(dtype=np.int64)
    not_above = np.searchsorted(outside, inside, "right").sum(dtype=np.int64)
    return (int(below) + int(not_above)) / (2 * inside.size * outside.size)
