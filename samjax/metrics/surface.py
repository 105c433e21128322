"""Distances between the borders of two regions: Hausdorff at any percentile, ASSD, surface Dice.

A border voxel is one of the region's own whose 4 (2-D) or 6 (3-D) neighbours are not all in the
region; beyond the array there is background, so that a region cut by the image's edge has a border
there. Each border voxel has a distance to the nearest border voxel of the other region, measured
between the centres of voxels. There are two such lists, from the prediction to the truth and back,
and libraries differ in how they join them:

* Hausdorff distance at a percentile: medpy's `hd95` takes the percentile of both lists in one
  (pooled); MONAI and MetricsReloaded take each list's percentile, and the larger of the two.
* Average distance: MONAI's symmetric one, and medpy's `assd` from 0.5.2, is the mean of both lists
  in one (ASSD); medpy's up to 0.4 is the mean of the two lists' means (MASD).

**The defaults** are the larger of the two percentiles, and the pooled average. In a joint list the
region with the longer border outvotes the other: the more jagged a prediction's border is along
the truth, the less counts what it misses elsewhere, and the number falls while the segmentation
gets worse. The larger of two does not do that; it is what MONAI and MetricsReloaded compute, and
equals medpy's at percentile 100. The papers on SAMed's data use medpy's; `pooled=True` gives it,
and so does the convention "samed" of samjax/metrics/cases.py. ASSD is pooled in both libraries.

Border voxels count as one each, as in medpy and MONAI. DeepMind's surface-distance weighs them by
the area of the surface through them, and puts the surface between voxels: its numbers differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from samjax.metrics.overlap import check_masks

# Places are products of floats, and distances roots of sums: 3 × 0.1 mm comes out above 0.3 mm.
_ROUNDING = 1e-9


class SurfaceDistances(NamedTuple):
    """Distances of border voxels to the other region's border, in the unit of the spacing.

    float64 (n,) of the prediction's n border voxels, and (m,) of the truth's m. A region without
    voxels has an empty list; the distances to it are infinite.
    """

    prediction_to_truth: np.ndarray
    truth_to_prediction: np.ndarray

    def hausdorff(self, percentile: float = 95.0, *, pooled: bool = False) -> float:
        """The Hausdorff distance at a percentile, interpolated linearly; NaN if a region is empty.

        Args:
            percentile: 0..100; 95 is HD95, 100 the Hausdorff distance proper.
            pooled: False: the larger one of the two lists' percentiles (MONAI,
                MetricsReloaded). True: the percentile of both lists in one (medpy).

        Raises:
            ValueError: a percentile outside 0..100.
        """
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile is {percentile}, expected 0 to 100")
        if not self._measured:
            return math.nan
        lists = [np.concatenate(self)] if pooled else self
        return float(max(np.percentile(distances, percentile) for distances in lists))

    def average(self, *, pooled: bool = True) -> float:
        """The average symmetric surface distance; NaN if a region is empty.

        Args:
            pooled: True: the mean over the border voxels of both regions (ASSD; medpy from 0.5.2,
                MONAI). False: the mean of the two directed means (MASD; medpy up to 0.4).
        """
        if not self._measured:
            return math.nan
        lists = [np.concatenate(self)] if pooled else self
        return float(np.mean([distances.mean() for distances in lists]))

    def surface_dice(self, tolerance: float) -> float:
        """Normalised surface Dice (NSD): the share of border voxels that lie near the other border.

        Nikolov et al. 2021, counted in border voxels as MONAI's `compute_surface_dice` does. 0 if
        one region is empty, NaN if both are.

        Args:
            tolerance: the largest distance that counts as near, in the unit of the spacing; a
                distance that exceeds it by no more than rounding is within it.

        Raises:
            ValueError: a tolerance that is negative or not finite.
        """
        check_tolerance(tolerance)
        total = sum(distances.size for distances in self)
        if not total:
            return math.nan
        limit = tolerance * (1 + _ROUNDING)
        return sum(np.count_nonzero(distances <= limit) for distances in self) / total

    @property
    def _measured(self) -> bool:
        return all(distances.size for distances in self)


def surface_distances(
    prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float] | None = None
) -> SurfaceDistances:
    """Distances between the borders of two masks.

    Args:
        prediction, truth: bool (h, w) or (d, h, w), of one shape.
        spacing: size of a voxel along each axis of the array, in mm; None for 1 along each, which
            measures in voxels.

    Raises:
        ValueError: masks that are not bool, of different shapes, or of another number of
            dimensions; a spacing that does not fit them.
    """
    prediction, truth = check_masks(prediction, truth)
    sizes = check_spacing(spacing, prediction.ndim)
    union = prediction | truth
    # Both borders lie in the box around both regions: nothing outside can change a distance.
    box = ndimage.find_objects(union.view(np.uint8))
    if not box:
        return SurfaceDistances(np.zeros(0), np.zeros(0))
    ours, theirs = _border(prediction[box[0]]), _border(truth[box[0]])
    return SurfaceDistances(nearest(ours, theirs, sizes), nearest(theirs, ours, sizes))


def check_spacing(spacing: Sequence[float] | None, ndim: int) -> tuple[float, ...]:
    """The spacing as `ndim` floats, ones for None.

    Raises:
        ValueError: neither an image nor a volume, another number of values, or values that are not
            positive and finite.
    """
    if ndim not in (2, 3):
        raise ValueError(f"masks have {ndim} dimensions, expected an image (h, w) or (d, h, w)")
    if spacing is None:
        return (1.0,) * ndim
    values = tuple(float(value) for value in spacing)
    if len(values) != ndim:
        raise ValueError(f"spacing is {values} for {ndim} dimensions, expected one value for each")
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(f"spacing is {values}, expected positive sizes in mm")
    return values


def check_tolerance(tolerance: float) -> None:
    """Checks a tolerance of surface Dice.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance is {tolerance}, expected a finite distance of 0 or more")


def nearest(of: np.ndarray, to: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distance from each true voxel of one mask to the nearest true voxel of another.

    By a tree of the voxels' places, which is exact to rounding, as a distance transform is, but
    need not fill the array: a single stray voxel, which stretches the box around both regions to
    the whole volume, makes a transform of 30 million voxels ten times slower, and a tree no slower.

    Args:
        of, to: bool, of one shape.
        spacing: one positive value per dimension.

    Returns:
        float64 (n,), in the order of `np.argwhere(of)`; infinite where `to` is empty.
    """
    places = [np.argwhere(mask) * np.asarray(spacing, np.float64) for mask in (of, to)]
    if not len(places[1]):
        return np.full(len(places[0]), np.inf)
    return np.asarray(KDTree(places[1], leafsize=32).query(places[0])[0], np.float64)


def _border(mask: np.ndarray) -> np.ndarray:
    inner = ndimage.binary_erosion(mask)  # the default structure: 4 or 6 neighbours
    return mask & np.logical_not(inner)
