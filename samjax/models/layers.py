"""Layers shared by all models: a dense layer with a side path for adapters, and thin wrappers.

Kernels are 2-D ``(in, out)``, a fused ``qkv`` included, so that bridge, LoRA, GaLore and sharding
need no special case.  Parameters are float32; ``dtype`` is the type of the computation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

EMBEDDING_INIT = nnx.initializers.normal(0.02)
Remat = bool | Literal["dots"]  # what of a block the backward pass computes anew


def with_remat(block: Callable[[Array], Array], remat: Remat) -> Callable[[Array], Array]:
    """The block, of which the backward pass keeps everything (False), nothing but the input (True),
    or the products with weights but not those of attention ("dots")."""
    if not remat:
        return block
    policy = None
    if remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    again = jax.checkpoint(lambda x: block(x), policy=policy)
    return _apart(again) if jax.default_backend() == "cpu" else again


def _apart(block: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Keeps XLA's CPU compiler from merging what is computed anew with what was computed before.

    It drops the barriers that `jax.checkpoint` sets, finds everything twice, and keeps the first:
    nothing is saved. A branch that depends on the data it leaves alone. The other branch answers
    where the input's first number is NaN or infinite, and what comes back is NaN there too.
    """

    def apply(x: Array) -> Array:
        function, closed_over = jax.closure_convert(block, x)
        return split(function, x, closed_over)

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def split(function: Callable[..., Array], x: Array, closed_over: list[Array]) -> Array:
        return function(x, *closed_over)

    def forward(function: Callable[..., Array], x: Array, closed_over: list[Array]) -> Any:
        out, pull_back = jax.vjp(function, x, *closed_over)
        return out, (x.ravel()[0], pull_back)

    def backward(_: Any, kept: Any, cotangent: Array) -> Any:
        first, pull_back = kept
        shapes = jax.eval_shape(pull_back, cotangent)
        dx, *rest = jax.lax.cond(
            jnp.abs(first) < jnp.inf,
            lambda: pull_back(cotangent),
            lambda: jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), shapes),
        )
        return dx, rest

    split.defvjp(forward, backward)
    return apply


class SidePath(NamedTuple):
    """A low-rank side path of one column block of a dense layer: ``y[..., block] += s (x a) b``.

    a: ``(in, r)``; b: ``(r, block)``; columns: start and stop of the block in the output;
    dropout: probability of dropping an entry of ``x``, or with ``drop_output`` of the side path's
    output (SAM2LoRA's), active only if ``key`` is given.
    """

    a: Float[Array, "i r"]
    b: Float[Array, "r o"]
    columns: tuple[int, int]
    scale: float = 1.0
    dropout: float = 0.0
    key: Array | None = None
    drop_output: bool = False


class Dense(nnx.Module):
    """``y = x kernel + bias``, plus the side paths that an adapter laid onto it."""

    def __init__(
        self, features_in: int, features_out: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        init = nnx.initializers.xavier_uniform()
        self.kernel = nnx.Param(init(rngs.params(), (features_in, features_out)))
        self.bias = nnx.Param(jnp.zeros((features_out,)))
        self.dtype = dtype
        self.side_paths = ()

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return self.add_bias(self.product(x))

    def product(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """All but the bias: zeros stay zeros."""
        x = x.astype(self.dtype)
        # Flat rows: the gradient of the kernel is then one plain matrix product, half the time.
        y = x.reshape(-1, x.shape[-1]) @ self.kernel[...].astype(self.dtype)
        y = y.reshape(*x.shape[:-1], -1)
        for side in self.side_paths:
            y = _add_side_path(x, y, side)
        return y

    def add_bias(self, y: Float[Array, "*b o"]) -> Float[Array, "*b o"]:
        """What ``product`` leaves out."""
        return y + jnp.broadcast_to(self.bias[...].astype(self.dtype), y.shape)


def _add_side_path(x: Array, y: Array, side: SidePath) -> Array:
    if not side.drop_output:
        x = _drop(x, side)
    delta = side.scale * ((x @ side.a.astype(x.dtype)) @ side.b.astype(x.dtype))
    if side.drop_output:
        delta = _drop(delta, side)
    start, stop = side.columns
    parts = [y[..., :start], y[..., start:stop] + delta, y[..., stop:]]
    return jnp.concatenate(parts, axis=-1)


def _drop(x: Array, side: SidePath) -> Array:
    if not side.dropout or side.key is None:
        return x
    keep = jax.random.bernoulli(side.key, 1 - side.dropout, x.shape)
    return jnp.where(keep, x / (1 - side.dropout), 0)


class Embedding(nnx.Module):
    """Learned vectors, shape ``(n, c)``."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(rngs.params.normal((count, width)))

    def __call__(self) -> Float[Array, "n c"]:
        return self.embedding[...]


class MLP(nnx.Module):
    """Two dense layers around an activation, as in the ViT blocks and the two-way transformer."""

    def __init__(self, width: int, hidden: int, activation, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.lin1 = Dense(width, hidden, dtype=dtype, rngs=rngs)
        self.lin2 = Dense(hidden, width, dtype=dtype, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return self.lin2(self.activation(self.lin1(x)))


class Perceptron(nnx.Module):
    """``depth`` dense layers with ReLU between them: the heads of the mask decoder."""

    def __init__(
        self, width: int, hidden: int, out: int, depth: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        sizes = [width] + [hidden] * (depth - 1) + [out]
        self.layers = nnx.List(
            [Dense(i, o, dtype=dtype, rngs=rngs) for i, o in itertools.pairwise(sizes)]
        )

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """The exact (erf) GELU; JAX's default is the tanh approximation.

    For the backward pass only ``x`` is kept. Left to itself, XLA keeps three arrays of its size.
    """
    return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return gelu(x), x


def _gelu_backward(x: Array, cotangent: Array) -> tuple[Array]:
    # With erf: JAX's GELU has erfc, which a compiler would find twice, and keep the first. The zero
    # waits for the cotangent, or it might compute all this, and keep it, long before.
    x = x + 0 * cotangent
    below = 0.5 * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))
    density = jnp.exp(-0.5 * x * x) * np.asarray(1 / np.sqrt(2 * np.pi), x.dtype)
    return (cotangent * (below + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)


class LayerNorm(nnx.LayerNorm):
    """Flax's over the last axis, of whose input alone the backward pass needs a copy."""

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        assert self.scale is not None
        assert self.bias is not None
        row = (1,) * (x.ndim - 1) + (-1,)
        scale, bias = (p[...].astype(self.dtype).reshape(row) for p in (self.scale, self.bias))
        return _normalise(x.astype(self.dtype), scale, bias, self.epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    return _normalise_forward(x, scale, bias, eps)[0]


def _normalise_forward(x: Array, scale: Array, bias: Array, eps: float) -> tuple[Array, Any]:
    exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = exact.mean(axis=-1, keepdims=True)
    # E[x²] − E[x]² would lose four digits at a mean of 50.
    shrink = jax.lax.rsqrt(jnp.square(exact - mean).mean(axis=-1, keepdims=True) + eps)
    y = (exact - mean) * shrink * scale + bias
    return y.astype(x.dtype), (x, scale, mean, shrink)


def _normalise_backward(eps: float, kept: Any, cotangent: Array) -> tuple[Array, Array, Array]:
    x, scale, mean, shrink = kept
    cotangent = cotangent.astype(mean.dtype)
    scaled = cotangent * scale
    average = scaled.mean(axis=-1, keepdims=True)
    # The zero waits for the cotangent: a compiler would keep x − mean of the forward pass.
    normed = (x + 0 * average - mean) * shrink
    along = (scaled * normed).mean(axis=-1, keepdims=True)
    leading = tuple(range(x.ndim - 1))
    return (
        (shrink * (scaled - average - normed * along)).astype(x.dtype),
        (cotangent * normed).sum(axis=leading, keepdims=True).astype(scale.dtype),
        cotangent.sum(axis=leading, keepdims=True).astype(scale.dtype),
    )


_normalise.defvjp(_normalise_forward, _normalise_backward)


def layer_norm(width: int, *, eps: float, dtype: DTypeLike, rngs: nnx.Rngs) -> LayerNorm:
    """LayerNorm over the last axis; on NHWC arrays it is upstream's ``LayerNorm2d`` as well."""
    return LayerNorm(width, epsilon=eps, dtype=dtype, rngs=rngs)


def conv(
    features_in: int,
    features_out: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    bias: bool = True,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """NHWC convolution with explicit padding (``'SAME'`` differs from PyTorch's under a stride)."""
    return nnx.Conv(
        features_in,
        features_out,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        use_bias=bias,
        dtype=dtype,
        rngs=rngs,
    )
