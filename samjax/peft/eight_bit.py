"""An optimizer's moments in 8 bits: a quarter of the memory, for any Optax transform.

Paper: Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861).
Upstream: bitsandbytes 0.50.2, ``functional.py``: ``create_dynamic_map``, ``quantize_blockwise``.

A leaf is cut into blocks of consecutive elements.  Each block is divided by its largest magnitude,
and each quotient stored as the number of the nearest of 256 values, which lie dense around zero: a
tenth as large, spaced a tenth as far apart, down to 1e-6.

Differs from upstream: a positive second moment is never rounded to zero.  Where a gradient vanishes
for a step, Adam would divide the first moment, which is finer, by eps alone (the zero point problem
of Li et al., arXiv 2309.01507).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

BLOCK, SMALLEST = 256, 4096  # elements: of a block, and of a leaf worth quantising

_DECADES = 7
_TINY = float(np.finfo(np.float32).tiny)


class Quantised(NamedTuple):
    """In the place of a float32 leaf.  codes: uint8, of the leaf's shape; scales: float32
    (blocks,), the largest magnitude of each block of the flattened leaf."""

    codes: jax.Array
    scales: jax.Array


def is_second_moment(path: tuple) -> bool:
    """Whether a key path of a state goes through a field ``nu`` or ``v``, as Optax names them."""
    return any(isinstance(k, jax.tree_util.GetAttrKey) and k.name in ("nu", "v") for k in path)


def eight_bit(
    inner: optax.GradientTransformation,
    *,
    block: int = BLOCK,
    smallest: int = SMALLEST,
    nonnegative: Callable[[tuple], bool] = is_second_moment,
) -> optax.GradientTransformationExtraArgs:
    """``inner``, its state kept in 8 bits between the updates; they are computed in float32.

    The state is ``inner``'s own, with a ``Quantised`` in the place of every float32 leaf of at
    least ``smallest`` elements; other leaves stay as they are.  What stands next to it in a chain,
    and parameters, are not touched; inside GaLore it is the ``inner``.

    Args:
        inner: any transform.
        block: elements that share a scale.
        smallest: see above.
        nonnegative: of a leaf's key path in the state: whether it is never negative, and has no
            need of a sign.  One that is negative after all becomes NaN, not zero.  The names of
            Optax's Adan (``v`` has signs, ``n`` none) and SM3 (``nu`` has signs) say otherwise than
            the default takes them to.

    Raises ``ValueError`` for a block or a smallest leaf below 1 element.
    """
    if block < 1 or smallest < 1:
        raise ValueError(f"block {block} and smallest {smallest}: expected at least 1 element")
    inner = optax.with_extra_args_support(inner)

    def pack(path: tuple, leaf: Any) -> Any:
        if leaf.dtype != jnp.float32 or leaf.size < smallest:
            return leaf
        return quantise(leaf, signed=not nonnegative(path), block=block)

    def unpack(path: tuple, leaf: Any) -> Any:
        if not isinstance(leaf, Quantised):
            return leaf
        return dequantise(leaf, signed=not nonnegative(path), block=block)

    def init(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(pack, inner.init(params))

    def update(updates, state, params=None, **extra):
        state = jax.tree_util.tree_map_with_path(
            unpack, state, is_leaf=lambda node: isinstance(node, Quantised)
        )
        updates, state = inner.update(updates, state, params, **extra)
        return updates, jax.tree_util.tree_map_with_path(pack, state)

    return optax.GradientTransformationExtraArgs(init, update)


def quantise(values: jax.Array, *, signed: bool, block: int = BLOCK) -> Quantised:
    """Float32 of any shape in 8 bits; the last block may be shorter than the others.

    Not ``signed``: values are at least 0, and a block with a negative one becomes NaN, as does in
    either case a block that holds NaN or an infinity.
    """
    blocks = _blocks(values, block)
    scales = jnp.max(jnp.abs(blocks), axis=1)
    # What lies between float32's smallest normal number and zero counts as zero on some devices.
    scaled = blocks / jnp.maximum(scales, _TINY)[:, None]
    table = dynamic_map(signed)
    midpoints = (table[1:] + table[:-1]) / 2
    codes = jnp.searchsorted(jnp.asarray(midpoints), scaled).astype(jnp.uint8)
    if not signed:
        codes = jnp.maximum(codes, (blocks > 0).astype(jnp.uint8))
        scales = jnp.where(jnp.min(blocks, axis=1) < 0, jnp.nan, scales)
    return Quantised(codes.reshape(-1)[: values.size].reshape(values.shape), scales)


def dequantise(quantised: Quantised, *, signed: bool, block: int = BLOCK) -> jax.Array:
    """Undoes ``quantise`` up to rounding: float32, in the shape of the codes."""
    codes = quantised.codes
    blocks = jnp.asarray(dynamic_map(signed))[_blocks(codes, block)] * quantised.scales[:, None]
    return blocks.reshape(-1)[: codes.size].reshape(codes.shape)


def _blocks(values: jax.Array, block: int) -> jax.Array:
    """(…) as (blocks, block), filled up with zeros."""
    count = math.ceil(values.size / block)
    return jnp.pad(values.reshape(-1), (0, count * block - values.size)).reshape(count, block)


@cache
def dynamic_map(signed: bool) -> np.ndarray:
    """The 256 values of the dynamic code, float32, ascending from -0.993 or 0 to 1.

    Seven decades; each one larger has twice as many values, the middles of equal intervals.  Zero
    and one are added; -1 is not there.
    """
    values = [0.0, 1.0]
    for decade in range(_DECADES):
        edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        middles = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - _DECADES + 1)
        values.extend([*middles, *-middles] if signed else middles)
    table = np.sort(np.array(values, np.float32))
    table.flags.writeable = False  # it is shared
    return table
