"""Two models' results at each stage, and how far they are apart.

The measure is the largest absolute difference over the standard deviation of upstream's result, in
float32 with exact matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-4
"""Largest difference allowed, in standard deviations; torch against itself in float64: 4e-6."""


class VerificationError(ValueError):
    """The two models do not agree."""


@dataclass(frozen=True)
class Stage:
    """How far the two models are apart after one stage.

    Attributes:
        difference: largest absolute difference.
        deviation: standard deviation of upstream's result.
    """

    name: str
    difference: float
    deviation: float

    @property
    def relative(self) -> float:
        """The difference in standard deviations."""
        return self.difference / (self.deviation or 1.0)


def stages(theirs: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray]) -> list[Stage]:
    """The difference at each stage that upstream has."""
    found = []
    for name, expected in theirs.items():
        own = ours[name]
        if own.shape != expected.shape:
            raise VerificationError(f"{name}: shape {own.shape}, upstream {expected.shape}")
        difference = np.abs(own.astype(np.float64) - expected).max(initial=0.0)
        found.append(Stage(name, float(difference), float(expected.astype(np.float64).std())))
    return found


def report(found: list[Stage], tolerance: float = TOLERANCE) -> list[Stage]:
    """Print the difference at each stage; VerificationError where it is too large or not finite."""
    print(f"  {'stage':<28} {'largest difference':>18} {'over the std':>13}")
    for stage in found:
        print(f"  {stage.name:<28} {stage.difference:>18.2e} {stage.relative:>13.2e}")
    worst = [stage for stage in found if not stage.relative <= tolerance]
    if worst:
        raise VerificationError(
            f"differs from Meta's model by more than {tolerance:g} of the standard deviation at: "
            + ", ".join(f"{stage.name} ({stage.relative:.1e})" for stage in worst)
        )
    return found


def example_image(size: tuple[int, int]) -> np.ndarray:
    """A made-up image of `size` (h, w), always the same: float32 (h, w, 3) of 0..255."""
    height, width = size
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / np.float32(max(height, width))
    disc = (x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.04
    channels = np.stack([255 * x, 255 * y, np.where(disc, 220, 60)], axis=-1)
    return np.clip(channels + rng.normal(0, 20, channels.shape), 0, 255).astype(np.float32)
