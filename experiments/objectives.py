"""How a model's answer becomes a loss and label logits: one small class for each way of training.

A model here is anything with ``encode_image(images, sizes)`` and ``answer(features, coords,
labels)``, as ``samjax.models.sam.Sam`` has them.  Experiments with a loss or a reading of the masks
of their own subclass ``Objective``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from samjax.models.mask_decoder import MaskPrediction
from samjax.models.ops import resize_bilinear
from samjax.models.sam2 import single_mask
from samjax.models.sam2_config import Sam2Config
from samjax.models.weights import Config
from samjax.training.losses import (
    multiclass_cross_entropy,
    multiclass_dice,
    segmentation_loss,
)

ARRAYS = ("image", "mask", "size", "coords", "labels")  # of a batch, what the loss reads


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What the papers' ways of training share: k classes, Dice + CE, images encoded as they are."""

    num_classes: int = 1
    """Classes beside the background."""
    dice_weight: float = 0.5
    """Share of Dice in the loss; the rest is cross-entropy."""
    val_loss: bool = False
    """Whether validation measures the loss as well."""

    arrays: ClassVar[tuple[str, ...]] = ARRAYS
    """Of a batch, what the loss reads; ``epoch`` (float, of the step) is to be had as well."""

    def encode(self, module: Any, batch: dict) -> Any:
        """The image encoder's output, with leading axis b in every array."""
        return module.encode_image(batch["image"], batch["size"])

    def answer(self, module: Any, features: Any, batch: dict, key: jax.Array | None) -> Any:
        """The model's prediction; ``key`` while training only."""
        del key  # for models that draw noise
        return module.answer(features, batch["coords"], batch["labels"])

    @abstractmethod
    def logits(self, config: Config, prediction: Any, *, train: bool) -> jax.Array:
        """Logits in the model frame: ``(b, h, w)`` of one mask, or ``(b, h, w, k + 1)``."""

    def main(self, logits: np.ndarray) -> np.ndarray:
        """Of an example's predicted logits those that validation and overlays go by: all."""
        return logits

    def loss(self, config: Config, prediction: Any, batch: dict) -> jax.Array:
        """Of each example, ``(b,)``: Dice + CE on the logits in the model frame."""
        logits = self.logits(config, prediction, train=True)
        valid = valid_pixels(config, batch["size"])
        return segmentation_loss(logits, batch["mask"], valid, dice_weight=self.dice_weight)


@dataclass(frozen=True, kw_only=True)
class SingleMask(Objective):
    """One binary mask by the single-mask token, so that the tuned model stays an ordinary SAM.

    When predicting with SAM 2, its best other mask where that one is not stable, as in both of
    Meta's predictors.
    """

    def logits(self, config: Config, prediction: MaskPrediction, *, train: bool) -> jax.Array:
        """``(b, h, w)``."""
        if train or not isinstance(config, Sam2Config):
            return resize_bilinear(prediction.low_res_logits[:, 0], config.image_size)
        return resize_bilinear(single_mask(prediction)[0], config.image_size)


@dataclass(frozen=True, kw_only=True)
class LabelMap(Objective):
    """k classes by k + 1 mask tokens, channel 0 the background: SAMed's (arXiv 2304.13785).

    ``low_res``: the loss is taken where SAMed's is, on the decoder's own logits (a quarter of the
    frame), with the labels made small by the nearest pixel as scipy's ``zoom`` does it.
    """

    low_res: bool = False

    def logits(self, config: Config, prediction: Any, *, train: bool) -> jax.Array:
        """``(b, h, w, k + 1)``."""
        return jnp.moveaxis(resize_bilinear(prediction.low_res_logits, config.image_size), 1, -1)

    def loss(self, config: Config, prediction: Any, batch: dict) -> jax.Array:
        """As the base class, or on the decoder's own logits."""
        if not self.low_res:
            return super().loss(config, prediction, batch)
        return self.loss_of(jnp.moveaxis(prediction.low_res_logits, 1, -1), config, batch)

    def loss_of(self, logits: jax.Array, config: Config, batch: dict) -> jax.Array:
        """Dice + CE of logits ``(b, h, w, k + 1)`` of any size, ``(b,)``, one class or many."""
        mask, valid = (
            nearest(array, (logits.shape[1], logits.shape[2]))
            for array in (batch["mask"], valid_pixels(config, batch["size"]))
        )
        entropy = multiclass_cross_entropy(logits, mask, valid)
        return (1 - self.dice_weight) * entropy + self.dice_weight * multiclass_dice(
            logits, mask, valid
        )


def objective_for(num_classes: int, dice_weight: float = 0.5) -> Objective:
    """The plain one: a single mask for one class, a label map for more."""
    kind = LabelMap if num_classes > 1 else SingleMask
    return kind(num_classes=num_classes, dice_weight=dice_weight)


def valid_pixels(config: Config, sizes: jax.Array) -> jax.Array:
    """Bool ``(b, h, w)``: inside the unpadded part of the frame."""
    height, width = config.image_size
    rows = jnp.arange(height)[None, :, None] < sizes[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] < sizes[:, 1, None, None]
    return rows & columns


def nearest(labels: jax.Array, size: tuple[int, int]) -> jax.Array:
    """``(b, h, w)`` at another size, corners on corners, as ``scipy.ndimage.zoom(order=0)``."""
    rows, columns = (
        np.floor(np.arange(new) * ((old - 1) / max(new - 1, 1)) + 0.5).astype(np.int32)
        for old, new in zip(labels.shape[1:], size, strict=True)
    )
    return labels[:, rows][:, :, columns]
