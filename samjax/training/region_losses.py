"""Losses on how two regions overlap: squared Dice, Tversky, IoU, and SAM 2's loss for its masks.

As in losses.py: logits (b, h, w), float32 or bfloat16; target (b, h, w), bool or in [0, 1]; valid
(b, h, w) bool or None; one value per sample, (b,), summed in float32. What stands in an invalid
pixel reaches neither loss nor gradient, and a sample without any valid pixel has loss 0.

SAM2LoRA (utils/loss_funcs.py, arXiv 2510.10288) sums each of these over the whole batch, where a
large object outweighs a small one in another image. Here every sample counts alike, and with one
sample a batch the two are the same number.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from samjax.training.losses import SMOOTH_MULTICLASS, _binary, binary_dice, focal_loss

STRAIGHT_BELOW = 1e-6  # where the focal Tversky loss leaves its power for a straight line


def squared_dice(
    logits: jax.Array,
    target: jax.Array,
    valid: jax.Array | None = None,
    *,
    smooth: float = SMOOTH_MULTICLASS,
) -> jax.Array:
    """1 - (2 Σ p y + smooth) / (Σ p² + Σ y² + smooth) over valid pixels, p = sigmoid(logits); (b,).

    V-Net's (arXiv 1606.04797), and `multiclass_dice` for one class. With an empty target and so
    small a `smooth`, it is about 1, almost without a gradient, until p is close to zero everywhere.
    """
    _positive(smooth=smooth)
    p, _, y = _regions(logits, target, valid)
    both, total = _sum(p * y), _sum(p * p) + _sum(y * y)
    return 1 - (2 * both + smooth) / (total + smooth)


def tversky(
    logits: jax.Array,
    target: jax.Array,
    valid: jax.Array | None = None,
    *,
    false_negatives: float = 0.7,
    false_positives: float = 0.3,
    smooth: float = 1.0,
) -> jax.Array:
    """1 - TI, (b,), where TI = (TP + s) / (TP + 0.7 FN + 0.3 FP + s) over valid pixels.

    TP = Σ p y, FN = Σ (1 - p) y, FP = Σ p (1 - y), p = sigmoid(logits). arXiv 1706.05721; the
    defaults are SAM2LoRA's. With 0.5 and 0.5 it is `binary_dice` with twice the smoothing.
    """
    _positive(smooth=smooth, false_negatives=false_negatives, false_positives=false_positives)
    p, not_p, y = _regions(logits, target, valid)
    # The numerator of 1 - TI itself: near a perfect prediction 1 minus the ratio is all rounding.
    wrong = false_negatives * _sum(not_p * y) + false_positives * _sum(p * (1 - y))
    return wrong / (_sum(p * y) + wrong + smooth)


def focal_tversky(
    logits: jax.Array,
    target: jax.Array,
    valid: jax.Array | None = None,
    *,
    false_negatives: float = 0.7,
    false_positives: float = 0.3,
    smooth: float = 1.0,
    gamma: float = 0.75,
) -> jax.Array:
    """(1 - TI)^gamma with `tversky`'s 1 - TI, (b,). SAM2LoRA's, whose exponent is gamma itself.

    (arXiv 1810.07842 writes 1 / gamma.) For gamma < 1 the power has an infinite slope at TI = 1.
    Below 1 - TI = 1e-6 a straight line to zero takes its place, with slope 1e-6^(gamma - 1), 32 for
    the default; elsewhere the value is the formula's.
    """
    _positive(gamma=gamma)
    distance = tversky(
        logits,
        target,
        valid,
        false_negatives=false_negatives,
        false_positives=false_positives,
        smooth=smooth,
    )
    # `where` alone would still multiply the infinite slope by zero.
    power = jnp.maximum(distance, STRAIGHT_BELOW) ** gamma
    return jnp.where(distance > STRAIGHT_BELOW, power, distance * STRAIGHT_BELOW ** (gamma - 1))


def mask_iou(logits: jax.Array, target: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """IoU over valid pixels of (logits > 0) and (target > 0.5), (b,) in [0, 1], without a gradient.

    0 where both are empty, as in SAM 2 (which divides by at least 1) and SAM2LoRA (by 1e-6).
    """
    logits, target, valid = _binary(logits, target, valid)
    ours, theirs = (logits > 0) & valid, (target > 0.5) & valid
    return _sum(ours & theirs) / jnp.maximum(_sum(ours | theirs), 1)


def iou_regression(
    predicted: jax.Array,
    logits: jax.Array,
    target: jax.Array,
    valid: jax.Array | None = None,
    *,
    kind: Literal["l1", "l2"] = "l1",
) -> jax.Array:
    """|predicted - IoU| or its square, (b,): what teaches SAM to rate its masks.

    `predicted` is (b,), IoUs and no logits. Its gradient reaches the predictions only, never the
    mask. "l1" is SAM 2's and SAM2LoRA's, "l2" SAM's.
    """
    if kind not in ("l1", "l2"):
        raise ValueError(f"kind is {kind!r}, expected 'l1' or 'l2'")
    if predicted.shape != logits.shape[:1]:
        raise ValueError(f"predicted has shape {predicted.shape}, logits {logits.shape}")
    error = predicted.astype(jnp.float32) - mask_iou(logits, target, valid)
    loss = jnp.abs(error) if kind == "l1" else error**2
    return loss if valid is None else jnp.where(valid.any((1, 2)), loss, 0)


def multimask_minimum(
    logits: jax.Array,
    predicted_iou: jax.Array,
    object_logit: jax.Array | None,
    target: jax.Array,
    valid: jax.Array | None = None,
    *,
    focal: float = 20.0,
    dice: float = 1.0,
    iou: float = 1.0,
    score: float = 1.0,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
) -> jax.Array:
    """SAM 2's loss for the m masks that it answers one prompt with, (b,).

    present · (min over the masks of (focal · focal loss + dice · Dice)
    + iou · mean over the masks of |predicted IoU - IoU|) + score · BCE(object_logit, present)

    Only the best mask of a sample learns from its shape, all learn to rate themselves, and a sample
    without the object teaches nothing but its absence.

    Args:
        logits: (b, m, h, w), at the target's size.
        predicted_iou: (b, m), IoUs and no logits.
        object_logit: (b,), or None for a model without an object score: every sample then counts
            as present.
        target: (b, h, w), bool.

    SAM 2, training/loss_fns.py, MultiStepMultiMasksAndIous, commit 1a80ead, with the weights of its
    MOSE configuration. Upstream divides the sum over objects by their number, as the mean of these
    values does. It also adds up all clicks and frames; that is for the caller, clicks and frames
    each being one call.
    """
    if logits.ndim != 4 or predicted_iou.shape != logits.shape[:2]:
        raise ValueError(
            f"logits have shape {logits.shape}, predicted_iou {predicted_iou.shape}, "
            "expected (b, m, h, w) and (b, m)"
        )
    if object_logit is not None and object_logit.shape != logits.shape[:1]:
        raise ValueError(f"object_logit has shape {object_logit.shape}, logits {logits.shape}")
    _, target, valid = _binary(logits[:, 0], target, valid)

    every_mask = partial(jax.vmap, in_axes=(1, None, None), out_axes=1)
    shape_loss = focal * every_mask(partial(focal_loss, alpha=alpha, gamma=gamma))(
        logits, target, valid
    ) + dice * every_mask(binary_dice)(logits, target, valid)  # b m
    rating_loss = jax.vmap(iou_regression, in_axes=(1, 1, None, None), out_axes=1)(
        predicted_iou, logits, target, valid
    )
    # Not `min`, which would share the gradient among equal masks: upstream takes the first.
    best = jnp.argmin(shape_loss, axis=1, keepdims=True)
    loss = jnp.take_along_axis(shape_loss, best, axis=1)[:, 0] + iou * rating_loss.mean(1)
    if object_logit is None:
        return loss
    present = ((target > 0.5) & valid).any((1, 2)).astype(jnp.float32)
    absence = optax.losses.sigmoid_binary_cross_entropy(object_logit.astype(jnp.float32), present)
    return present * loss + score * jnp.where(valid.any((1, 2)), absence, 0)


def _regions(
    logits: jax.Array, target: jax.Array, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """p, 1 - p and the target; p and the target are exactly 0 where invalid."""
    logits, target, valid = _binary(logits, target, valid)
    logits = jnp.where(valid, logits, -jnp.inf)
    # 1 - p from its own sigmoid: near p = 1 the difference has no digits left.
    return jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits), jnp.where(valid, target, 0)


def _sum(values: jax.Array) -> jax.Array:
    return values.sum((1, 2))


def _positive(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}, expected more than 0")
