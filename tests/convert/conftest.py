"""A tiny SAM in which every dimension differs, as upstream's state dict."""

import numpy as np
import pytest

import tiny_models
from convert.sam import to_torch
from samjax.models.sam import SamConfig


@pytest.fixture(scope="session")
def tiny_config() -> SamConfig:
    return tiny_models.SAM_PADDED


@pytest.fixture
def tiny_params(tiny_config: SamConfig) -> dict:
    return tiny_models.random_params(tiny_config)


@pytest.fixture
def tiny_state_dict(tiny_params: dict) -> dict[str, np.ndarray]:
    """{upstream's key: float32 array}."""
    return to_torch(tiny_params)
