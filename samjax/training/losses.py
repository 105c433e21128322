"""Segmentation losses on logits: cross-entropy, focal loss, soft Dice; one value per sample.

Every function returns shape (b,): the mean over the samples of k accumulated micro-batches then
equals the mean over one big batch. SAMed's trainer sums its Dice over the whole batch, where that
does not hold; with one sample a batch the two are the same number. SAM2LoRA sums likewise.

Binary, one logit per pixel: binary cross-entropy and SAM's Dice (SAM 2, training/loss_fns.py,
commit 1a80ead, which writes 2 Σ p y as Σ p + Σ y - Σ |p - y|: the same for hard targets).
Multi-class, k + 1 logits per pixel with the background first: softmax cross-entropy and SAMed's
Dice, whose denominator is squared (arXiv 2304.13785; SAMed, utils.py, DiceLoss).
Tversky, and the losses that know the IoU, are in region_losses.py; `weighted_sum` joins any.

Shapes: logits (b, h, w) or (b, h, w, k + 1), float32 or bfloat16; labels (b, h, w); valid (b, h, w)
bool, False where a pixel is padding, or None when all count. Whatever stands in an invalid pixel,
NaN and unknown labels included, reaches neither the loss nor its gradient. A sample without any
valid pixel has loss 0. All sums are float32.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import reduce

import jax
import jax.numpy as jnp
import optax

SMOOTH_BINARY = 1.0  # SAM, SAM 2
SMOOTH_MULTICLASS = 1e-5  # SAMed

SegmentationLoss = Callable[..., jax.Array]  # (logits, target, valid) -> (b,)


def binary_cross_entropy(
    logits: jax.Array, target: jax.Array, valid: jax.Array | None = None
) -> jax.Array:
    """Mean over valid pixels of the binary cross-entropy, (b,). `target` is bool or in [0, 1]."""
    logits, target, valid = _binary(logits, target, valid)
    loss = optax.losses.sigmoid_binary_cross_entropy(jnp.where(valid, logits, 0), target)
    return _mean_over(valid, loss)


def binary_dice(logits: jax.Array, target: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """1 - (2 Σ p y + 1) / (Σ p + Σ y + 1) over valid pixels, p = sigmoid(logits); (b,)."""
    logits, target, valid = _binary(logits, target, valid)
    # Probability and target are both exactly 0 where invalid, which takes them out of every sum.
    return optax.losses.dice_loss(
        jnp.where(valid, logits, -jnp.inf)[..., None],
        jnp.where(valid, target, 0)[..., None],
        smooth=SMOOTH_BINARY / 2,  # optax writes Dice without the factor 2
    )


def focal_loss(
    logits: jax.Array,
    target: jax.Array,
    valid: jax.Array | None = None,
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
) -> jax.Array:
    """Mean over valid pixels of α_t (1 - p_t)^γ · binary cross-entropy, (b,).

    p_t is the probability of the truth; α_t is `alpha` in the foreground, 1 - `alpha` elsewhere,
    and 1 everywhere if `alpha` is None (SAM 2 writes -1). arXiv 1708.02002; the defaults are
    SAM 2's.
    """
    logits, target, valid = _binary(logits, target, valid)
    logits, target = jnp.where(valid, logits, 0), jnp.where(valid, target, 0)
    loss = optax.losses.sigmoid_focal_loss(logits, target, alpha=alpha, gamma=gamma)
    return _mean_over(valid, loss)


def multiclass_cross_entropy(
    logits: jax.Array, labels: jax.Array, valid: jax.Array | None = None
) -> jax.Array:
    """Mean over valid pixels of the softmax cross-entropy, (b,).

    `labels` are integers 0..k. Others in valid pixels make the loss NaN: nothing can be raised
    under jit, so check labels where they are read.
    """
    logits, labels, valid = _checked(logits, labels, valid)
    labels = _safe_labels(labels, valid, logits.shape[-1])
    logits = jnp.where(valid[..., None], logits, 0)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return _mean_over(valid, loss)


def multiclass_dice(
    logits: jax.Array, labels: jax.Array, valid: jax.Array | None = None
) -> jax.Array:
    """Mean over all classes, background included, of the squared Dice loss, (b,).

    Per class 1 - (2 Σ p y + 1e-5) / (Σ p² + Σ y² + 1e-5) over valid pixels, p = softmax(logits).
    As in SAMed, a class that a sample does not contain adds about 1, almost without a gradient,
    until its probability is close to zero everywhere.
    """
    logits, labels, valid = _checked(logits, labels, valid)
    labels = _safe_labels(labels, valid, logits.shape[-1])
    inside = valid[..., None]
    p = jnp.where(inside, jax.nn.softmax(jnp.where(inside, logits, 0)), 0)
    y = jnp.where(inside, jax.nn.one_hot(labels, logits.shape[-1], dtype=p.dtype), 0)
    both, total = (p * y).sum((1, 2)), (p * p).sum((1, 2)) + (y * y).sum((1, 2))  # b k+1
    per_class = 1 - (2 * both + SMOOTH_MULTICLASS) / (total + SMOOTH_MULTICLASS)
    return per_class.mean(-1)


def segmentation_loss(
    logits: jax.Array,
    labels: jax.Array,
    valid: jax.Array | None = None,
    dice_weight: float = 0.8,
) -> jax.Array:
    """(1 - dice_weight) · cross-entropy + dice_weight · Dice per sample, (b,).

    The shape of the logits decides: (b, h, w) is binary, (b, h, w, k + 1) is multi-class. 0.8 is
    SAMed's weight.

    Raises:
        ValueError: shapes that do not fit each other, or a weight outside [0, 1].
    """
    if not 0 <= dice_weight <= 1:
        raise ValueError(f"dice_weight is {dice_weight}, expected 0 to 1")
    if logits.ndim == 3:
        parts = binary_cross_entropy, binary_dice
    else:
        parts = multiclass_cross_entropy, multiclass_dice
    cross_entropy, dice = (part(logits, labels, valid) for part in parts)
    return (1 - dice_weight) * cross_entropy + dice_weight * dice


def weighted_sum(terms: Mapping[str, tuple[float, SegmentationLoss]]) -> SegmentationLoss:
    """One loss of several: Σ weight · loss(logits, target, valid), (b,).

    SAM2LoRA's, and SAMed's as `segmentation_loss` has it:

        weighted_sum({"bce": (1, binary_cross_entropy), "dice": (1, binary_dice),
                      "tversky": (1, focal_tversky)})
        weighted_sum({"ce": (0.2, multiclass_cross_entropy), "dice": (0.8, multiclass_dice)})

    For other settings of a loss, `functools.partial` it.

    Raises:
        ValueError: no terms, or a weight that is negative or not finite.
    """
    if not terms:
        raise ValueError("a sum of losses needs at least one of them")
    for name, (weight, _) in terms.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"the weight of {name} is {weight}, expected 0 or more, and finite")
    parts = list(terms.values())

    def total(logits: jax.Array, target: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        return reduce(
            operator.add, (weight * loss(logits, target, valid) for weight, loss in parts)
        )

    return total


def _binary(
    logits: jax.Array, target: jax.Array, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`_checked`, for one logit per pixel only."""
    if logits.ndim != 3:
        raise ValueError(f"logits have shape {logits.shape}, expected (b, h, w)")
    return _checked(logits, target, valid)


def _checked(
    logits: jax.Array, labels: jax.Array, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Float32 logits, labels, bool valid; shapes must agree, as broadcasting would hide errors."""
    if logits.ndim not in (3, 4) or (logits.ndim == 4 and logits.shape[-1] < 2):
        raise ValueError(
            f"logits have shape {logits.shape}, expected (b, h, w), or (b, h, w, k + 1) with k > 0"
        )
    if labels.shape != logits.shape[:3]:
        raise ValueError(f"labels have shape {labels.shape}, logits {logits.shape}")
    if valid is not None and valid.shape != labels.shape:
        raise ValueError(f"valid has shape {valid.shape}, labels {labels.shape}")
    if logits.ndim == 4 and not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels are {labels.dtype}, expected integers for {logits.shape} logits")
    logits = logits.astype(jnp.float32)
    labels = labels.astype(jnp.float32 if logits.ndim == 3 else jnp.int32)
    valid = jnp.ones(labels.shape, bool) if valid is None else valid.astype(bool)
    return logits, labels, valid


def _safe_labels(labels: jax.Array, valid: jax.Array, classes: int) -> jax.Array:
    """0 in invalid pixels; in valid ones a negative label becomes too large, or it would wrap."""
    labels = jnp.where(valid, labels, 0)
    return jnp.where(labels < 0, classes, labels)


def _mean_over(valid: jax.Array, values: jax.Array) -> jax.Array:
    count = jnp.maximum(valid.sum((1, 2)), 1)
    return jnp.where(valid, values, 0).sum((1, 2)) / count
