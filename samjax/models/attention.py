"""Scaled dot-product attention that never holds the whole matrix of scores on a CPU.

On a CPU, long sequences run through square blocks of queries and keys with a running softmax (as
FlashAttention does, arXiv 2205.14135, algorithm 1), so that a block's scores stay in the cache:
measured 1.1 times the time of PyTorch's own kernel, where the plain product takes 2 to 3 times.
Other backends fuse the plain product.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

BLOCK = 1024  # queries, and by default keys, of one block: 4 MiB of scores
LOWEST = -1e30  # the score of a key that is not there; finite, so that no difference is NaN


def attend(
    q: Float[Array, "b n s d"],
    k: Float[Array, "b n t d"],
    v: Float[Array, "b n t e"],
    *,
    valid: Bool[Array, "b t"] | None = None,
    length: Int[Array, ""] | None = None,
    block: int = BLOCK,
) -> Float[Array, "b n s e"]:
    """``softmax(q kᵀ / √d) v`` for each of ``n`` heads.

    ``valid`` says which keys there are; every row needs one.  Keys from ``length`` on, if given,
    have to be invalid: a CPU does not visit them, so that the time depends on ``length`` and the
    compiled program does not.  Not differentiable with a ``length``.  ``block`` is the number of
    keys taken at a time.
    """
    q = q * q.shape[-1] ** -0.5
    bias = None if valid is None else jnp.where(valid, 0.0, LOWEST).astype(jnp.float32)
    # Short on either side, the scores are small; else a CPU reads them from memory several times.
    if min(q.shape[2], k.shape[2]) <= BLOCK // 2 or jax.default_backend() != "cpu":
        return mix_values(q, k, v, bias)
    return _attend_in_blocks(q, k, v, bias, length, block)


@jax.custom_vjp
def mix_values(
    q: Float[Array, "b n s d"],
    k: Float[Array, "b n t d"],
    v: Float[Array, "b n t e"],
    bias: Float[Array, "b t"] | None = None,
) -> Float[Array, "b n s e"]:
    """``softmax(q kᵀ + bias) v``, of queries that are scaled already.

    For the backward pass no array of the size of the scores is kept: it computes them anew, from
    the sum of each row (as FlashAttention's, algorithm 4).  ``bias`` has no gradient.
    """
    return _mix(q, k, v, bias)[0]


def _mix(q, k, v, bias):
    scores = jnp.einsum("bnsd,bntd->bnst", q, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias[:, None, None, :]
    top = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum(
        "bnst,bnte->bnse", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (out / total).astype(v.dtype), (top + jnp.log(total))[..., 0]


def _mix_forward(q, k, v, bias):
    out, log_total = _mix(q, k, v, bias)
    return out, (q, k, v, bias, out, log_total)


def _mix_backward(kept, cotangent):
    q, k, v, bias, out, log_total = kept
    inner = (cotangent * out).astype(jnp.float32).sum(axis=-1)
    # Transposed, or a compiler would find the scores of the forward pass and keep those; and with
    # a zero that waits for the cotangent, or it might compute them, and keep them, long before.
    late = q + (0 * inner)[..., None].astype(q.dtype)
    scores = jnp.einsum("bntd,bnsd->bnts", k, late, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias[:, None, :, None]
    weights = jnp.exp(scores - log_total[:, :, None, :])
    of_weights = jnp.einsum("bnte,bnse->bnts", v, cotangent, preferred_element_type=jnp.float32)
    of_scores = (weights * (of_weights - inner[:, :, None, :])).astype(q.dtype)
    return (
        jnp.einsum("bnts,bntd->bnsd", of_scores, k),
        jnp.einsum("bnts,bnsd->bntd", of_scores, q),
        jnp.einsum("bnts,bnse->bnte", weights.astype(v.dtype), cotangent),
        None if bias is None else jnp.zeros_like(bias),
    )


mix_values.defvjp(_mix_forward, _mix_backward)


class _Sums(NamedTuple):
    """A softmax over the keys seen so far: the highest score, Σ exp and Σ exp · v below it."""

    top: Float[Array, "s 1"]
    total: Float[Array, "s 1"]
    weighted: Float[Array, "s e"]


def _attend_in_blocks(q, k, v, bias, length, block):
    b, n, s, d = q.shape
    t, e = v.shape[2:]
    q = _pad(q, 2, BLOCK)
    if bias is None and t % block:
        bias = jnp.zeros((1, t), jnp.float32)
    if bias is not None:
        bias = _pad(jnp.broadcast_to(bias, (b, t)), 1, block, LOWEST)
    k, v = _pad(k, 2, block), _pad(v, 2, block)
    blocks = k.shape[2] // block

    def one_head(head):
        queries, keys, values, row = head

        def absorb(sums: _Sums, index: Array, query: Array) -> _Sums:
            start = index * block
            key = jax.lax.dynamic_slice_in_dim(keys, start, block)
            value = jax.lax.dynamic_slice_in_dim(values, start, block)
            scores = jnp.matmul(query, key.T, preferred_element_type=jnp.float32)
            if row is not None:
                scores = scores + jax.lax.dynamic_slice_in_dim(row, start, block)[None]
            top = jnp.maximum(sums.top, scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - top)
            shrink = jnp.exp(sums.top - top)
            added = jnp.matmul(
                weights.astype(value.dtype), value, preferred_element_type=jnp.float32
            )
            total = sums.total * shrink + weights.sum(axis=-1, keepdims=True)
            return _Sums(top, total, sums.weighted * shrink + added)

        def one_block(query):
            sums = _Sums(
                jnp.full((BLOCK, 1), LOWEST, jnp.float32),
                jnp.zeros((BLOCK, 1), jnp.float32),
                jnp.zeros((BLOCK, e), jnp.float32),
            )
            if length is None:
                # Recomputed in the backward pass, else every block's scores would be kept.
                step = jax.checkpoint(lambda sums, index: (absorb(sums, index, query), None))
                sums, _ = jax.lax.scan(step, sums, jnp.arange(blocks))
            else:
                last = jnp.minimum((length + block - 1) // block, blocks)
                sums = jax.lax.fori_loop(0, last, lambda i, sums: absorb(sums, i, query), sums)
            return (sums.weighted / sums.total).astype(v.dtype)

        return jax.lax.map(one_block, queries.reshape(-1, BLOCK, d)).reshape(-1, e)

    heads = q.reshape(b * n, -1, d), k.reshape(b * n, -1, d), v.reshape(b * n, -1, e)
    rows = None if bias is None else jnp.repeat(bias, n, axis=0)
    out = jax.lax.map(one_head, (*heads, rows))
    return out.reshape(b, n, -1, e)[:, :, :s]


def _pad(x: Array, axis: int, multiple: int, value: float = 0.0) -> Array:
    extra = -x.shape[axis] % multiple
    if not extra:
        return x
    widths = [(0, extra if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)
