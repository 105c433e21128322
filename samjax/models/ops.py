"""Array operations that must agree with PyTorch to the last detail: resizing and window partition.

Source: ``torch.nn.functional.interpolate`` (``align_corners=False``) and
``segment_anything/modeling/image_encoder.py`` (``window_partition``, ``window_unpartition``,
``get_rel_pos``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num


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


def cubic_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Bicubic interpolation along one axis, float32 ``(size_out, size_in)``.

    Equals ``F.interpolate(mode="bicubic", align_corners=False)``: a = -0.75, taps beyond the border
    take the border's value, no antialiasing.  JAX's own "cubic" has a = -0.5 and drops such taps.
    """
    a = -0.75
    centre = (np.arange(size_out) + 0.5) * (size_in / size_out) - 0.5
    first = np.floor(centre)
    matrix = np.zeros((size_out, size_in))
    for tap in range(-1, 3):
        x = np.abs(centre - first - tap)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        column = np.clip(first + tap, 0, size_in - 1).astype(np.int64)
        np.add.at(matrix, (np.arange(size_out), column), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)


def antialias_matrix(size_in: int, size_out: int) -> np.ndarray:
    """Bilinear interpolation with antialiasing along one axis, float32 ``(size_out, size_in)``.

    Equals ``F.interpolate(mode="bilinear", antialias=True)``: a triangle as wide as the step from
    one output pixel to the next (at least one input pixel), cut at the border and normalised.
    """
    scale = size_in / size_out
    support = max(scale, 1.0)
    centre = (np.arange(size_out)[:, None] + 0.5) * scale
    # Whole pixels that the triangle reaches, by the same rounding as upstream's.
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + support + 0.5).astype(np.int64), size_in)
    columns = np.arange(size_in)[None]
    weights = np.maximum(1 - np.abs(columns + 0.5 - centre) / support, 0)
    weights = np.where((columns >= first) & (columns < last), weights, 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def resize_antialiased(x: Float[Array, "*b h w"], size: tuple[int, int]) -> Float[Array, "*b H W"]:
    """Resizes the last two axes; equals ``F.interpolate(mode="bilinear", antialias=True)``."""
    rows = jnp.asarray(antialias_matrix(x.shape[-2], size[0]))
    columns = jnp.asarray(antialias_matrix(x.shape[-1], size[1]))
    x = jnp.einsum("Hh,...hw->...Hw", rows, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.einsum("Ww,...hw->...hW", columns, x, precision=jax.lax.Precision.HIGHEST)


@functools.lru_cache(maxsize=16)
def sine_positions(grid: tuple[int, int], channels: int) -> np.ndarray:
    """The fixed sine encoding of every cell of a grid, float32 ``(gh, gw, channels)``.

    First half rows, second half columns, counted from 1 and normalised to 2π; sine and cosine
    alternate.  Source: ``sam2/modeling/position_encoding.py: PositionEmbeddingSine``.
    """
    half = channels // 2
    frequency = 10000.0 ** (2 * (np.arange(half) // 2) / half)

    def along(size: int) -> np.ndarray:
        place = np.arange(1, size + 1) / (size + 1e-6) * 2 * math.pi
        phase = place[:, None] / frequency
        return np.where(np.arange(half) % 2, np.cos(phase), np.sin(phase))

    rows, columns = along(grid[0]), along(grid[1])
    pairs = [
        np.broadcast_to(rows[:, None], (*grid, half)),
        np.broadcast_to(columns[None], (*grid, half)),
    ]
    return np.concatenate(pairs, axis=-1).astype(np.float32)


def normalise_pixels(
    config, images: Num[Array, "b h w 3"], sizes: Int[Array, "b 2"] | None
) -> Float[Array, "b h w 3"]:
    """Subtracts the config's pixel mean, divides by its std, and only then zeroes the padding.

    ``images`` are RGB of 0..255 in the model frame, ``sizes`` their (height, width) in it.
    """
    mean = jnp.array(config.pixel_mean, jnp.float32).reshape(1, 1, 1, 3)
    std = jnp.array(config.pixel_std, jnp.float32).reshape(1, 1, 1, 3)
    x = (images.astype(jnp.float32) - mean) / std
    if sizes is None:
        return x
    rows = jnp.arange(x.shape[1])[None, :, None] < sizes[:, 0, None, None]
    columns = jnp.arange(x.shape[2])[None, None, :] < sizes[:, 1, None, None]
    return jnp.where((rows & columns)[..., None], x, 0.0)


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


def in_windows(
    function: Callable[[Float[Array, "n s s c"]], Float[Array, "n s2 s2 o"]],
    x: Float[Array, "b gh gw c"],
    window: int,
) -> Float[Array, "b gh2 gw2 o"]:
    """``function`` of each window of a grid, or with ``window`` 0 of the whole grid.

    The function sees zeros where windows reach beyond the grid.  It may answer with smaller
    windows; the grid shrinks alike, an odd last row or column left out.
    """
    if not window:
        return function(x)
    windows, padded = partition_windows(x, window)
    answer = function(windows)
    height, width, *grid = (side * answer.shape[1] // window for side in (*padded, *x.shape[1:3]))
    return merge_windows(answer, (height, width), (grid[0], grid[1]))


def relative_index(size: int) -> np.ndarray:
    """Row of the relative-position table for each (query, key) pair: int64 ``(size, size)``."""
    positions = np.arange(size)
    return positions[:, None] - positions[None, :] + size - 1
