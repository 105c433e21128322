"""Pairs of masks on which implementations of metrics part: empty, full, single, cut by the edge."""

from typing import NamedTuple

import numpy as np
import pytest

SHAPES = {2: (13, 9), 3: (12, 10, 8)}
SPACINGS = (None, (1.0, 1.0, 1.0), (2.5, 0.7, 0.7), (0.1, 3.0, 1.3))


class Pair(NamedTuple):
    prediction: np.ndarray
    truth: np.ndarray
    spacing: tuple[float, ...] | None

    @property
    def filled(self) -> bool:
        return bool(self.prediction.any() and self.truth.any())


def masks(shape: tuple[int, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """One of each kind."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    corner, single, slab, box = np.zeros((4, *shape), bool)
    corner[(0,) * len(shape)] = True
    single[tuple(rng.integers(1, np.array(shape) - 1))] = True
    slab[:, : rng.integers(1, 4)] = True
    low = rng.integers(0, 4, len(shape))
    box[tuple(slice(a, a + rng.integers(2, 6)) for a in low)] = True
    middle = np.array(shape) / 2 + rng.normal(size=len(shape))
    ball = ((grid - middle) ** 2).sum(-1) < rng.uniform(4, 16)
    return [
        *(np.zeros(shape, bool), np.ones(shape, bool), corner, single, slab, box, ball),
        ball & ~((grid - middle) ** 2 < 2).all(-1),  # with a hole
        rng.random(shape) < 0.05,
        rng.random(shape) < 0.6,
    ]


@pytest.fixture
def pairs() -> list[Pair]:
    """Every kind with every kind, in 2-D and in 3-D: 200 pairs."""
    rng = np.random.default_rng(1)
    found = []
    for ndim, shape in SHAPES.items():
        for i in range(10):
            for j in range(10):
                spacing = SPACINGS[(i + j) % len(SPACINGS)]
                prediction, truth = masks(shape, rng)[i], masks(shape, rng)[j]
                found.append(Pair(prediction, truth, spacing and spacing[:ndim]))
    assert len(found) == 200
    return found
