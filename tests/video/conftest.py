"""A tiny SAM 2 and synthetic clips."""

import numpy as np
import pytest

import tiny_models
from samjax.predictor import SamModel


@pytest.fixture(scope="session")
def model() -> SamModel:
    return SamModel(tiny_models.SAM2, tiny_models.noisy_params(tiny_models.SAM2))


@pytest.fixture(scope="session")
def clip() -> np.ndarray:
    """uint8 (10, 90, 160, 3): a bright disc on a textured ground moves behind a bar and out."""
    return tiny_models.moving_disc(10, (90, 160))
