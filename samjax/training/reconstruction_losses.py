"""Losses of SAMora's stage 1: masked patches, denoised images, distilled features; one per sample.

Every function returns shape (b,), summed in float32, and its mean over samples is upstream's value:
facebookresearch/mae `models_mae.py` (arXiv 2111.06377), and ShChen233/SAMora@d492a95
`ssl/losses.py` (arXiv 2511.08626). All raise `ValueError` where shapes do not fit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

SMOOTH = 1e-5  # of SAMora's soft Dice
VARIANCE_EPS = 1e-6  # of MAE's standardised patches


def mae_loss(
    prediction: jax.Array, patches: jax.Array, mask: jax.Array, *, norm_pix: bool = True
) -> jax.Array:
    """Mean over the removed patches of each patch's mean squared error, (b,).

    `prediction` and `patches` are (b, t, numbers of a patch), `mask` (b, t) is 1 where a patch was
    removed. With `norm_pix` the target is a patch minus its mean, over the root of its unbiased
    variance + 1e-6, as MAE's released encoders were trained. 0 where nothing was removed.
    """
    _same_shape(prediction, patches)
    if mask.shape != patches.shape[:2]:
        raise ValueError(f"the mask has shape {mask.shape}, expected {patches.shape[:2]}")
    target = patches.astype(jnp.float32)
    if norm_pix:
        mean = target.mean(-1, keepdims=True)
        variance = target.var(-1, ddof=1, keepdims=True)
        target = (target - mean) / jnp.sqrt(variance + VARIANCE_EPS)
    errors = jnp.square(prediction.astype(jnp.float32) - target).mean(-1)
    mask = mask.astype(jnp.float32)
    return (errors * mask).sum(1) / jnp.maximum(mask.sum(1), 1)


def soft_dice_regression(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """1 - (2 Σ p y + 1e-5) / (Σ p + Σ y + 1e-5) over all of a sample's numbers, (b,).

    Both (b, …) in [0, 1], which is not checked: with negative targets, such as the release's
    standardised images, the quotient has no meaning.

    For grey targets it is not smallest at p = y: it rewards p = 1 wherever y is above half the Dice
    coefficient and p = 0 elsewhere, that is, a thresholded image.
    """
    _same_shape(prediction, target)
    p, y = _flat(prediction), _flat(target)
    return 1 - (2 * (p * y).sum(1) + SMOOTH) / (p.sum(1) + y.sum(1) + SMOOTH)


def denoising_loss(
    prediction: jax.Array, target: jax.Array, *, dice_weight: float = 0.9
) -> jax.Array:
    """dice_weight · `soft_dice_regression` + (1 - dice_weight) · mean squared error, (b,).

    SAMora's, .9 and .1. `ValueError` for a weight outside [0, 1].
    """
    if not 0 <= dice_weight <= 1:
        raise ValueError(f"dice_weight is {dice_weight}, expected 0 to 1")
    dice = soft_dice_regression(prediction, target)
    return dice_weight * dice + (1 - dice_weight) * feature_mse(prediction, target)


def feature_mse(a: jax.Array, b: jax.Array, *, normalise: bool = False) -> jax.Array:
    """Mean squared difference of a sample's features (b, …, c), (b,).

    With `normalise` every feature vector, along the last axis, is brought to length 1 first; one
    without length stays 0, with a finite gradient. Symmetric: no side's gradient is stopped.
    """
    _same_shape(a, b)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if normalise:
        a, b = _unit(a), _unit(b)
    return jnp.square(_flat(a) - _flat(b)).mean(1)


def _unit(x: jax.Array) -> jax.Array:
    # PyTorch's x / max(|x|, 1e-12), without a root at 0.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def _flat(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).reshape(len(x), -1)


def _same_shape(a: jax.Array, b: jax.Array) -> None:
    if a.shape != b.shape:
        raise ValueError(f"shapes {a.shape} and {b.shape}; expected the same")
