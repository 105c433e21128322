"""From a scanner's units to grey values: what a window or a normalisation makes of a volume.

Each rule takes the voxels of a volume, any real type, and returns float32 in 0..1 of that shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from samjax.data.images import DataError

Intensity = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Window:
    """Values from ``low`` to ``high`` become 0..1, what lies outside is clipped.

    `Window(-125, 275)` in Hounsfield units is SAMed's for the abdomen
    (preprocess/preprocess_data.py).

    Raises ``ValueError`` unless low < high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"window from {self.low} to {self.high}: expected low < high")

    def __call__(self, voxels: np.ndarray) -> np.ndarray:
        grey = np.clip(voxels, self.low, self.high).astype(np.float32)
        scaled = (grey - np.float32(self.low)) / np.float32(self.high - self.low)
        return np.minimum(scaled, np.float32(1))  # rounding can pass 1 by 1e-7


@dataclass(frozen=True)
class Percentiles:
    """Two percentiles of the voxels that differ from the lowest value become 0 and 1.

    The lowest value is the background of an MR image. The rule of the unlabelled and MR sets.
    """

    low: float = 0.5
    high: float = 99.5

    def __call__(self, voxels: np.ndarray) -> np.ndarray:
        lowest = voxels.min()
        others = voxels[voxels != lowest]
        if not others.size:  # a volume of one value shows nothing
            return np.zeros(voxels.shape, np.float32)
        low, high = np.percentile(others, (self.low, self.high)).tolist()
        low = low if low < high else float(lowest)
        return Window(low, high)(voxels)


@dataclass(frozen=True)
class MinMax:
    """The lowest and the highest value become 0 and 1 (SAMora, datasets/dataset_unlabeled.py)."""

    def __call__(self, voxels: np.ndarray) -> np.ndarray:
        low, high = float(voxels.min()), float(voxels.max())
        return Window(low, high)(voxels) if low < high else np.zeros(voxels.shape, np.float32)


@dataclass(frozen=True)
class Brats2023:
    """SAMSEG's normalisation of BraTS-MEN (tpchikumbu/SAMSEG_adpt, preprocess.py).

    Mean and deviation over the voxels that are not 0 give z for all voxels; z's range is mapped to
    0..255 and rounded to two decimals; the 1st and 99th percentiles of that become 0 and 1.

    Raises ``DataError`` where fewer than two different values are not 0.
    """

    def __call__(self, voxels: np.ndarray) -> np.ndarray:
        values = voxels.astype(np.float64)
        brain = values[values != 0]
        if not brain.size or brain.std() == 0:
            raise DataError("no two different voxels beside 0; expected a brain on a background 0")
        z = (values - brain.mean()) / brain.std()
        scaled = np.round((z - z.min()) * (255 / (z.max() - z.min())), 2)
        low, high = np.percentile(scaled, (1, 99)).tolist()
        return Window(low, high if high > low else float(scaled.max()))(scaled)
