"""Our training step, as the benchmarks run it: one batch of noise, without a prompt.

Gradients are not clipped, as SAMed and MedSAGa do not, on neither side.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import segmentation as seg
from experiments.objectives import ARRAYS
from samjax.models.functional import init_params
from samjax.models.layers import Remat
from samjax.models.weights import Config
from samjax.peft.lora import LoraConfig
from samjax.prompt_labels import INVALID
from samjax.training.loop import init_state, make_step

GAP = 200  # GaLore's steps between two refreshes


def noise_batch(config: Config, size: int) -> dict[str, np.ndarray]:
    """Random pixels with a square as the mask."""
    height, width = config.image_size
    mask = np.zeros((size, height, width), np.uint8)
    mask[:, height // 4 : height // 2, width // 4 : width // 2] = 1
    return {
        "image": np.random.default_rng(0).integers(0, 256, (size, height, width, 3), np.uint8),
        "mask": mask,
        "size": np.tile(np.int32(config.image_size), (size, 1)),
        "coords": np.zeros((size, 1, 2), np.float32),
        "labels": np.full((size, 1), INVALID, np.int32),
    }


class OurStep:
    """One step of ours: ``step()`` makes it and returns the loss."""

    def __init__(
        self,
        config: Config,
        method: str,
        rank: int,
        batch: dict[str, np.ndarray],
        *,
        dtype: str,
        remat: Remat,
        params: Any = None,
    ):
        params = init_params(config, 0) if params is None else params
        lora = LoraConfig(rank=rank, parts=("image_encoder",))
        tuning = seg.prepare(
            config,
            params,
            method,
            lora=lora,
            prompts=(),
            dtype=jnp.dtype(dtype),
            remat=remat,
        )
        del params
        optimizer = seg.make_optimizer(
            tuning,
            1e-4,
            weight_decay=0.01,
            clip="none",
            rank=rank,
            update_gap=GAP,
            any_rank=True,
        )
        self._state = init_state(tuning.trainable, optimizer)
        self._frozen, self._key = tuning.frozen, jax.random.key(0)
        self.feed(batch)
        self._step = make_step(
            partial(
                seg.batch_loss, dataclasses.replace(tuning, trainable={})
            ),  # one copy is enough
            optimizer,
            refresh_gap=GAP if "galore" in method else None,
        )

    def feed(self, batch: dict[str, np.ndarray]) -> None:
        """Another batch for the steps from now on."""
        self._batch = {name: jnp.asarray(batch[name]) for name in ARRAYS}

    def __call__(self) -> float:
        self._state, metrics = self._step(self._state, self._frozen, self._batch, self._key)
        return float(metrics["loss"])
