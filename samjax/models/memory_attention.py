"""Memory attention: the current frame's tokens attend to themselves, then to the memory bank.

Paper: Ravi et al., "SAM 2" (arXiv 2408.00714), §4 "Memory attention" and appendix D.1; rotary
encoding in two dimensions, Heo et al. (arXiv 2403.13298).  Upstream: facebookresearch/sam2@2b90b9f,
``sam2/modeling/memory_attention.py`` and ``sam/transformer.py: RoPEAttention``.

Differs from upstream: the bank has a fixed number of slots of which some are empty, so that one
compiled program serves any number of memories; and there is no dropout.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from samjax.models.attention import BLOCK, attend
from samjax.models.layers import Dense, layer_norm


@functools.lru_cache(maxsize=16)
def rotations(grid: tuple[int, int], channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of each token's rotation angles, float32 ``(gh·gw, channels / 2)``.

    The first half of the pairs turns with the column, the second with the row.
    """
    frequency = 10000.0 ** -(np.arange(0, channels, 4)[: channels // 4] / channels)
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = np.concatenate([np.outer(columns, frequency), np.outer(rows, frequency)], axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Float[Array, "b t c"], turns: tuple[np.ndarray, np.ndarray]) -> Float[Array, "b t c"]:
    """Turns each pair of channels (2i, 2i + 1) by its angle; ``turns`` as from ``rotations``.

    ``t`` may be a multiple of the grid's tokens: the rotations then repeat (one memory a grid).
    """
    cosine, sine = turns
    b, t, c = x.shape
    pairs = x.astype(jnp.float32).reshape(b, t // len(cosine), len(cosine), c // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cosine, sine = jnp.asarray(cosine)[None, None], jnp.asarray(sine)[None, None]
    turned = jnp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return turned.reshape(b, t, c).astype(x.dtype)


class RotaryAttention(nnx.Module):
    """Attention of one head with rotary positions; the last keys may be without (pointers)."""

    def __init__(
        self, width: int, memory_width: int, grid: tuple[int, int], *, dtype, rngs: nnx.Rngs
    ):
        self.q_proj = Dense(width, width, dtype=dtype, rngs=rngs)
        self.k_proj = Dense(memory_width, width, dtype=dtype, rngs=rngs)
        self.v_proj = Dense(memory_width, width, dtype=dtype, rngs=rngs)
        self.out_proj = Dense(width, width, dtype=dtype, rngs=rngs)
        self.grid = grid

    def __call__(
        self,
        q: Float[Array, "_ s c"],
        k: Float[Array, "b t m"],
        v: Float[Array, "b t m"],
        *,
        unplaced: int = 0,
        valid: Bool[Array, "b t"] | None = None,
        length: Int[Array, ""] | None = None,
    ) -> Float[Array, "_ s c"]:
        """The first ``unplaced`` keys have no place in the grid; ``valid``, ``length``: attend.

        One frame's queries serve all ``b`` sets of keys.
        """
        turns = rotations(self.grid, q.shape[-1])
        q = rotate(self.q_proj(q), turns)
        k = self.k_proj(k)
        k = jnp.concatenate([k[:, :unplaced], rotate(k[:, unplaced:], turns)], axis=1)
        b = max(len(q), len(k))
        q, k, v = (jnp.broadcast_to(x, (b, *x.shape[1:]))[:, None] for x in (q, k, v))
        block = _block(q.shape[2], unplaced)
        # The mean of the projected values is the projected mean of the values: weights sum to one.
        # Memories have a quarter of the channels, and so the second product takes a quarter.
        mean = attend(q, k, v.astype(q.dtype), valid=valid, length=length, block=block)[:, 0]
        return self.out_proj(self.v_proj(mean))


def _block(tokens: int, unplaced: int) -> int:
    """Keys per block such that some blocks hold a memory and the unplaced: none is near empty."""
    pieces = max(tokens // BLOCK, 1)
    return -(-(tokens + unplaced) // pieces // 8) * 8


class MemoryAttentionLayer(nnx.Module):
    """Self-attention, cross-attention to the memories, MLP; all pre-norm."""

    def __init__(
        self,
        width: int,
        memory_width: int,
        hidden: int,
        grid: tuple[int, int],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def norm() -> nnx.LayerNorm:
            return layer_norm(width, eps=1e-5, dtype=dtype, rngs=rngs)

        self.self_attn = RotaryAttention(width, width, grid, dtype=dtype, rngs=rngs)
        self.cross_attn_image = RotaryAttention(width, memory_width, grid, dtype=dtype, rngs=rngs)
        self.linear1 = Dense(width, hidden, dtype=dtype, rngs=rngs)
        self.linear2 = Dense(hidden, width, dtype=dtype, rngs=rngs)
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()

    def __call__(self, x, memory, memory_pos, *, unplaced, valid, length):
        """x ``(1 or b, s, c)``; memory, memory_pos ``(b, t, m)``; valid ``(b, t)``."""
        normed = self.norm1(x)
        x = x + self.self_attn(normed, normed, normed)
        x = x + self.cross_attn_image(
            self.norm2(x),
            memory + memory_pos,
            memory,
            unplaced=unplaced,
            valid=valid,
            length=length,
        )
        return x + self.linear2(jax.nn.relu(self.linear1(self.norm3(x))))


class MemoryAttention(nnx.Module):
    """Conditions a frame's embedding on the memory bank."""

    def __init__(
        self,
        width: int,
        memory_width: int,
        hidden: int,
        depth: int,
        grid: tuple[int, int],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.layers = nnx.List(
            [
                MemoryAttentionLayer(width, memory_width, hidden, grid, dtype=dtype, rngs=rngs)
                for _ in range(depth)
            ]
        )
        self.norm = layer_norm(width, eps=1e-5, dtype=dtype, rngs=rngs)
        self.dtype = dtype

    def __call__(
        self,
        tokens: Float[Array, "1 s c"],
        positions: Float[Array, "1 s c"],
        memory: Float[Array, "b t m"],
        memory_pos: Float[Array, "b t m"],
        *,
        unplaced: int,
        valid: Bool[Array, "b t"],
        length: Int[Array, ""] | None = None,
    ) -> Float[Array, "b s c"]:
        """One frame's ``tokens`` with the memories of ``b`` objects.

        The first ``unplaced`` of the ``t`` memory tokens are object pointers, the others whole
        grids; ``valid`` says which of them there are, and keys from ``length`` on are not visited.
        """
        x = (tokens + 0.1 * positions).astype(self.dtype)
        memory, memory_pos = memory.astype(self.dtype), memory_pos.astype(self.dtype)
        for layer in self.layers:
            x = layer(x, memory, memory_pos, unplaced=unplaced, valid=valid, length=length)
        return self.norm(x)
