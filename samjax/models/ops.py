"""Array operations that must agree with PyTorch to the last detail: resizing and window partition.

Source: ``torch.nn.functional.interpolate`` (``align_corners=False``, ``antialias=False``) and
``segment_anything/modeling/image_encoder.py`` (``window_partition``, ``window_unpartition``,
``get_rel_pos``).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def linear_weights(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two taps and the weight of the second one, for each output position of a 1-D resize.

    Returns ``(low, high, weight)``, each of shape ``(size_out,)``: int64 indices and a float32
    weight in [0, 1].  This is bilinear interpolation with half-pixel centres, borders clamped and
    no antialiasing, also when shrinking, as PyTorch does it.
    """
    scale = np.float32(size_in / size_out)
    # One rounding, as PyTorch's fused multiply-add has: with two, positions beyond a few hundred
    # pixels are off by 1e-4.
    centre = (np.arange(size_out) + 0.5) * np.float64(scale) - 0.5
    centre = np.maximum(centre.astype(np.float32), 0)
    low = np.minimum(centre.astype(np.int64), size_in - 1)
    high = np.minimum(low + 1, size_in - 1)
    return low, high, (centre - low).astype(np.float32)


def linear_matrix(size_in: int, size_out: int) -> np.ndarray:
    """``linear_weights`` as a dense float32 matrix of shape ``(size_out, size_in)``."""
    low, high, weight = linear_weights(size_in, size_out)
    matrix = np.zeros((size_out, size_in), np.float32)
    rows = np.arange(size_out)
    np.add.at(matrix, (rows, low), 1 - weight)
    np.add.at(matrix, (rows, high), weight)
    return matrix


def resize_bilinear(x: Float[Array, "*b h w"], size: tuple[int, int]) -> Float[Array, "*b H W"]:
    """Resizes the last two axes on the device; equals ``F.interpolate(mode='bilinear')``.

    Two small matrix products, so it runs on any accelerator; ``size`` is static.
    """
    height, width = size
    precision = jax.lax.Precision.HIGHEST
    if x.shape[-2] != height:
        rows = jnp.asarray(linear_matrix(x.shape[-2], height))
        x = jnp.einsum("Hh,...hw->...Hw", rows, x, precision=precision)
    if x.shape[-1] != width:
        columns = jnp.asarray(linear_matrix(x.shape[-1], width))
        x = jnp.einsum("Ww,...hw->...hW", columns, x, precision=precision)
    return x


def resize_bilinear_numpy(x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``resize_bilinear`` on the host: no compilation for sizes that change with every image."""
    x = np.asarray(x, np.float32)
    for axis, length in ((-2, size[0]), (-1, size[1])):
        if x.shape[axis] == length:
            continue
        low, high, weight = linear_weights(x.shape[axis], length)
        weight = weight[:, None] if axis == -2 else weight
        x = np.take(x, low, axis) * (1 - weight) + np.take(x, high, axis) * weight
    return x


def partition_windows(
    x: Float[Array, "b gh gw c"], window: int
) -> tuple[Float[Array, "n s s c"], tuple[int, int]]:
    """Cuts a grid of tokens into windows, zero-padding bottom and right.

    Returns the windows (``n = b * rows * columns``) and the padded grid size.  Padded tokens take
    part in the attention, as upstream's do.
    """
    b, gh, gw, c = x.shape
    padded = math.ceil(gh / window) * window, math.ceil(gw / window) * window
    x = jnp.pad(x, ((0, 0), (0, padded[0] - gh), (0, padded[1] - gw), (0, 0)))
    x = x.reshape(b, padded[0] // window, window, padded[1] // window, window, c)
    return x.swapaxes(2, 3).reshape(-1, window, window, c), padded


def merge_windows(
    windows: Float[Array, "n s s c"], padded: tuple[int, int], grid: tuple[int, int]
) -> Float[Array, "b gh gw c"]:
    """Undoes ``partition_windows`` and drops the padding."""
    window, c = windows.shape[1], windows.shape[-1]
    rows, columns = padded[0] // window, padded[1] // window
    x = windows.reshape(-1, rows, columns, window, window, c).swapaxes(2, 3)
    return x.reshape(-1, *padded, c)[:, : grid[0], : grid[1]]


def relative_index(size: int) -> np.ndarray:
    """Row of the relative-position table for each (query, key) pair: int64 ``(size, size)``."""
    positions = np.arange(size)
    return positions[:, None] - positions[None, :] + size - 1
