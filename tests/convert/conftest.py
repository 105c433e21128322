"""A tiny SAM in which every dimension differs, as upstream's state dict."""

import numpy as np
import pytest

from convert.sam import to_torch
from samjax.models.functional import abstract_params
from samjax.models.sam import SamConfig
from samjax.models.vit import ViTConfig
from samjax.trees import flatten, unflatten

TINY = SamConfig(
    image_encoder=ViTConfig(
        image_size=(48, 80),
        patch_size=8,
        width=24,
        depth=3,
        heads=2,
        mlp_ratio=2.5,
        window=4,
        global_blocks=(1,),
        out_channels=32,
    ),
    num_multimask=4,
    mask_channels=20,
    decoder_depth=2,
    decoder_mlp_width=44,
    iou_head_width=36,
)


@pytest.fixture(scope="session")
def tiny_config() -> SamConfig:
    return TINY


@pytest.fixture
def tiny_params(tiny_config: SamConfig, rng: np.random.Generator) -> dict:
    flat = flatten(abstract_params(tiny_config))
    return unflatten({p: rng.normal(size=s.shape).astype(np.float32) for p, s in flat.items()})


@pytest.fixture
def tiny_state_dict(tiny_params: dict) -> dict[str, np.ndarray]:
    """{upstream's key: float32 array}."""
    return to_torch(tiny_params)
