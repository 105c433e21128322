"""The small models that the tests share. Every size differs from every other, height from width."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from samjax.models.functional import abstract_params, init_params
from samjax.models.hiera import HieraConfig
from samjax.models.sam import SamConfig
from samjax.models.sam2_config import Sam2Config
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

# A square frame that an experiment may resize, and axes that eight devices divide.
SAM_EVEN = SamConfig(
    image_encoder=ViTConfig(
        image_size=(64, 64),
        patch_size=16,
        width=32,
        depth=2,
        heads=2,
        window=3,
        global_blocks=(1,),
        out_channels=16,
    ),
    mask_channels=8,
    decoder_depth=1,
    decoder_mlp_width=32,
    iou_head_width=16,
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

# Upstream can build it: a square frame, and the decoder's sizes that it has in its code. Windows
# need padding, also where the grid is halved; the learned positions are no square.
SAM2 = Sam2Config(
    image_encoder=HieraConfig(
        image_size=(128, 128),
        width=24,
        heads=2,
        stages=(1, 2, 3, 1),
        windows=(8, 4, 6, 3),
        global_blocks=(4,),
        position_grid=(5, 3),
        out_channels=64,
    ),
    memory_width=16,
    memory_depth=2,
    memory_mlp_width=40,
    num_memories=4,
    num_pointers=6,
)
SAM2_0 = dataclasses.replace(SAM2, pointer_times=False, occlusion_embedding=False)


def random_params(config, seed: int = 1) -> dict:
    """float32 NumPy arrays of normal values: for what moves tensors and runs nothing."""
    rng = np.random.default_rng(seed)
    flat = flatten(abstract_params(config))
    return unflatten({k: rng.normal(size=v.shape).astype("f") for k, v in flat.items()})


def noisy_params(config) -> dict:
    """An initialised model with noise on every tensor, also on tables that start at zero."""
    rng = np.random.default_rng(1)
    flat = flatten(init_params(config, seed=3))
    noise = {k: 0.1 * rng.normal(size=v.shape).astype("f") for k, v in flat.items()}
    # Added by NumPy: nothing is compiled.
    return unflatten({k: jnp.asarray(np.asarray(v) + noise[k]) for k, v in flat.items()})


def moving_disc(frames: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 (t, h, w, 3): a bright disc on a textured ground passes behind a bar."""
    height, width = size
    rng = np.random.default_rng(7)
    ground = rng.integers(20, 90, (height // 10 + 1, width // 10 + 1, 3))
    ground = ground.repeat(10, 0).repeat(10, 1)[:height, :width]
    rows, columns = np.mgrid[:height, :width]
    clip = np.empty((frames, height, width, 3), np.uint8)
    for i in range(frames):
        x = width * (0.15 + 0.7 * i / max(frames - 1, 1))
        disc = (rows - height / 2) ** 2 + (columns - x) ** 2 < (height / 5) ** 2
        clip[i] = np.where(disc[..., None], (230, 190, 120), ground)
        clip[i, :, int(0.45 * width) : int(0.6 * width)] = (60, 140, 60)
    return clip
