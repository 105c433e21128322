"""The small models that the tests share. Every size differs from every other, height from width."""

import numpy as np

from samjax.models.functional import abstract_params, init_params
from samjax.models.sam import SamConfig
from samjax.models.vit import ViTConfig
from samjax.trees import flatten, unflatten

SAM = SamConfig(
    image_encoder=ViTConfig(
        image_size=(48, 80),
        width=24,
        depth=2,
        heads=3,
        mlp_ratio=1.5,
        window=2,
        global_blocks=(1,),
        out_channels=32,
    ),
    num_multimask=2,
    mask_channels=12,
    decoder_heads=4,
    decoder_mlp_width=40,
    iou_head_width=20,
)

# Small patches: 6 x 10 of them, so that windows of 4 need padding both ways.
SAM_PADDED = SamConfig(
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
    decoder_mlp_width=44,
    iou_head_width=36,
)


def random_params(config, seed: int = 1) -> dict:
    """float32 NumPy arrays of normal values: for what moves tensors and runs nothing."""
    rng = np.random.default_rng(seed)
    flat = flatten(abstract_params(config))
    return unflatten({k: rng.normal(size=v.shape).astype("f") for k, v in flat.items()})


def noisy_params(config) -> dict:
    """An initialised model with noise on every tensor, also on tables that start at zero."""
    rng = np.random.default_rng(1)
    flat = flatten(init_params(config, seed=3))
    return unflatten({k: v + 0.1 * rng.normal(size=v.shape).astype("f") for k, v in flat.items()})
