"""The blocks of DAE-Former: attention over positions, attention over channels, Mix-FFN.

Paper: Azad et al., "DAE-Former" (arXiv 2212.13504), §2; the parts are those of Efficient Attention
(arXiv 1812.01243), XCiT (arXiv 2106.09681) and SegFormer (arXiv 2105.15203).  Upstream:
mindflow-institue/DAEFormer@9460d3a, ``networks/DAEFormer.py`` and ``networks/segformer.py``.

What differs from upstream, and what is as odd as there: ``samjax/models/dae_former.py``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from samjax.models.layers import Dense, gelu, layer_norm
from samjax.models.memory_encoder import DepthwiseConv

LAYER_NORM_EPS = 1e-5
NORM_FLOOR = 1e-12  # the least length that a vector is divided by, as PyTorch's ``normalize``
FFN_RATIO = 4  # hidden channels per channel of a Mix-FFN


class BiasFreeDense(Dense):
    """``y = x kernel``, plus the side paths that an adapter laid onto it."""

    def __init__(self, features_in: int, features_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.kernel = nnx.Param(init(rngs.params(), (features_in, features_out)))
        self.dtype = dtype
        self.side_paths = ()

    @property
    def bias(self) -> Array:
        """What ``Dense`` adds: a zero that is no parameter."""
        return jnp.zeros((self.kernel.shape[1],))


class Temperature(nnx.Module):
    """A learned factor per head, shape ``(heads,)``."""

    def __init__(self, heads: int):
        self.scale = nnx.Param(jnp.ones((heads,)))

    def __call__(self) -> Float[Array, " heads"]:
        return self.scale[...]


def attend_efficiently(
    keys: Float[Array, "b n k"], queries: Float[Array, "b n k"], values: Float[Array, "b n c"]
) -> Float[Array, "b n c"]:
    """``softmax(Q) (softmax(K)ᵀ V)``: keys sum to 1 over the tokens, queries over the channels.

    The cost grows with the number of tokens, not with its square.  There is no scaling by √k.
    Both softmaxes are taken in float32; the result has the type of ``values``.
    """
    dtype = values.dtype
    keys = jax.nn.softmax(keys.astype(jnp.float32), axis=1).astype(dtype)
    queries = jax.nn.softmax(queries.astype(jnp.float32), axis=2).astype(dtype)
    context = jnp.einsum("bnk,bnc->bkc", keys, values, preferred_element_type=jnp.float32)
    return jnp.einsum("bnk,bkc->bnc", queries, context.astype(dtype))


class EfficientAttention(nnx.Module):
    """Attention over positions, with one head."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.keys = Dense(width, width, dtype=dtype, rngs=rngs)
        self.queries = Dense(width, width, dtype=dtype, rngs=rngs)
        self.values = Dense(width, width, dtype=dtype, rngs=rngs)
        self.reprojection = Dense(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw c"]:
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        attended = attend_efficiently(self.keys(tokens), self.queries(tokens), self.values(tokens))
        return self.reprojection(attended).reshape(x.shape)


class ChannelAttention(nnx.Module):
    """Attention among the ``c / heads`` channels of each head ("transpose attention").

    A channel is the vector of its values at all tokens.  Queries and keys have length 1, so that
    a score is a cosine times the head's temperature.
    """

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.qkv = BiasFreeDense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.temperature = Temperature(heads)
        self.proj = Dense(width, width, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw c"]:
        b, gh, gw, c = x.shape
        qkv = self.qkv(x).reshape(b, gh * gw, 3, self.heads, c // self.heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)  # b n heads d
        q, k = (_to_length_one(y).astype(v.dtype) for y in (q, k))
        scores = jnp.einsum("bnhd,bnhe->bhde", q, k, preferred_element_type=jnp.float32)
        scores = scores * self.temperature().reshape(1, self.heads, 1, 1)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhde,bnhe->bnhd", weights, v)
        return self.proj(out.reshape(b, gh, gw, c))


def _to_length_one(x: Float[Array, "b n h d"]) -> Float[Array, "b n h d"]:
    """Each channel divided by its length over the tokens, in float32."""
    x = x.astype(jnp.float32)
    # The floor is put under the square: the root of a zero has no gradient.
    square = jnp.sum(x * x, axis=1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(square, NORM_FLOOR**2))


class MixFFN(nnx.Module):
    """Dense, depthwise 3 × 3 with a residual, norm, GELU, dense: upstream's ``MixFFN_skip``."""

    def __init__(self, width: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.fc1 = Dense(width, hidden, dtype=dtype, rngs=rngs)
        self.dwconv = DepthwiseConv(hidden, 3, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(hidden, eps=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)
        self.fc2 = Dense(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw c"]:
        hidden = self.fc1(x)
        return self.fc2(gelu(self.norm(self.dwconv(hidden) + hidden)))


class DualBlock(nnx.Module):
    """Attention over positions, Mix-FFN, attention over channels, Mix-FFN; all pre-norm."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def norm() -> nnx.LayerNorm:
            return layer_norm(width, eps=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)

        self.norm1, self.norm2, self.norm3, self.norm4 = norm(), norm(), norm(), norm()
        self.attn = EfficientAttention(width, dtype=dtype, rngs=rngs)
        self.mlp1 = MixFFN(width, FFN_RATIO * width, dtype=dtype, rngs=rngs)
        self.channel_attn = ChannelAttention(width, heads, dtype=dtype, rngs=rngs)
        self.mlp2 = MixFFN(width, FFN_RATIO * width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw c"]:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp1(self.norm2(x))
        x = x + self.channel_attn(self.norm3(x))
        return x + self.mlp2(self.norm4(x))


class CrossAttention(nnx.Module):
    """The decoder's values, gathered by keys and queries that are both the skip connection."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.reprojection = Dense(width, 2 * width, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(2 * width, eps=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)

    def __call__(
        self, values: Float[Array, "b gh gw c"], skip: Float[Array, "b gh gw c"]
    ) -> Float[Array, "b gh gw c2"]:
        """Twice the channels, normalised."""
        b, gh, gw, c = skip.shape
        keys, values = skip.reshape(b, -1, c), values.reshape(b, -1, c)
        attended = attend_efficiently(keys, keys, values).reshape(b, gh, gw, c)
        return self.norm(self.reprojection(attended))


class CrossBlock(nnx.Module):
    """Decoder features and a skip connection of the same shape, joined; ``2 · width`` channels."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = layer_norm(width, eps=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)
        self.attn = CrossAttention(width, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(2 * width, eps=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)
        self.mlp = MixFFN(2 * width, FFN_RATIO * width, dtype=dtype, rngs=rngs)

    def __call__(self, joined: Float[Array, "b gh gw c2"]) -> Float[Array, "b gh gw c2"]:
        """``joined``: the decoder's channels, then the skip connection's."""
        x, skip = jnp.split(joined, 2, axis=-1)
        joined = joined + self.attn(self.norm1(x), self.norm1(skip))
        return joined + self.mlp(self.norm2(joined))


class PatchExpand(nnx.Module):
    """Each token becomes ``factor × factor`` tokens of ``out`` channels, normalised."""

    def __init__(self, width: int, out: int, factor: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.expand = BiasFreeDense(width, factor * factor * out, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(out, eps=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)
        self.factor = factor

    def __call__(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh2 gw2 o"]:
        b, gh, gw, _ = x.shape
        factor = self.factor
        x = self.expand(x).reshape(b, gh, gw, factor, factor, -1).swapaxes(2, 3)
        return self.norm(x.reshape(b, factor * gh, factor * gw, -1))
