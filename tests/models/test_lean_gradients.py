"""Functions with a backward pass of their own: equal to what JAX derives, and they keep little."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from samjax.models.attention import LOWEST, mix_values
from samjax.models.layers import gelu, layer_norm

TOLERANCE = {"float32": 2e-6, "bfloat16": 3e-2}


def compare(ours, plain, arguments, dtype):
    """Values and gradients of a random sum over what both give, relative to their size."""
    arguments = [jnp.asarray(a, dtype) for a in arguments]
    weights = np.random.default_rng(1).normal(size=ours(*arguments).shape)

    def both(function):
        def loss(*arguments):
            return (function(*arguments).astype(jnp.float32) * weights).sum()

        places = tuple(range(len(arguments)))
        return function(*arguments), *jax.jit(jax.grad(loss, argnums=places))(*arguments)

    for found, expected in zip(both(ours), both(plain), strict=True):
        assert found.dtype == expected.dtype == dtype
        found, expected = (np.asarray(x, np.float32) for x in (found, expected))
        assert np.abs(found - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu(rng, dtype):
    x = np.concatenate([rng.normal(size=200) * 3, [0.0, -30.0, 30.0]])
    compare(gelu, lambda x: jax.nn.gelu(x, approximate=False), [x], dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm(rng, dtype):
    ours = layer_norm(24, eps=1e-6, dtype=dtype, rngs=nnx.Rngs(0))
    flax = nnx.LayerNorm(24, epsilon=1e-6, use_fast_variance=False, dtype=dtype, rngs=nnx.Rngs(0))

    def run(module, x, scale, bias):
        graph, _ = nnx.split(module)
        return nnx.merge(graph, {"scale": scale, "bias": bias})(x)

    x = rng.normal(size=(3, 5, 24)) * 2 + (50 if dtype == "float32" else 1)
    scale, bias = rng.normal(size=24), rng.normal(size=24)
    compare(lambda *a: run(ours, *a), lambda *a: run(flax, *a), [x, scale, bias], dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(rng, dtype, masked):
    q, k, v = (rng.normal(size=(2, 3, length, 8)) for length in (6, 9, 9))
    bias = jnp.where(rng.random((2, 9)) < 0.6, 0.0, LOWEST).at[:, 0].set(0.0) if masked else None

    def plain(q, k, v):
        scores = jnp.einsum("bnsd,bntd->bnst", q, k, preferred_element_type=jnp.float32)
        scores = scores if bias is None else scores + bias[:, None, None, :]
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bnst,bnte->bnse", weights, v)

    compare(lambda q, k, v: mix_values(q, k, v, bias), plain, [q, k, v], dtype)


def test_nothing_of_the_size_of_the_scores_is_kept(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2, 64, 4)), jnp.float32) for _ in range(3))
    _, pull_back = jax.vjp(mix_values, q, k, v)
    kept = jax.tree.leaves(pull_back)
    assert max(leaf.size for leaf in kept) == q.size
