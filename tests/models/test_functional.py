"""The functional boundary: plain trees in, a callable model out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.models import functional
from samjax.trees import flatten, unflatten
from tiny_models import SAM as TINY
from tiny_models import noisy_params

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def params():
    return noisy_params(TINY)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(2)
    return {
        "images": jnp.asarray(rng.uniform(0, 255, (2, 48, 80, 3)), jnp.float32),
        "sizes": jnp.array([[48, 70], [31, 80]]),
        "coords": jnp.asarray(rng.uniform(0, 48, (2, 3, 2)), jnp.float32),
        "labels": jnp.array([[1, 0, -1], [2, 3, -2]]),
    }


def loss(params, batch, **options):
    """Depends on every parameter of the image encoder."""
    model = functional.bind(TINY, params, **options)
    embedding = model.encode_image(batch["images"], batch["sizes"]).astype(jnp.float32)
    return jnp.vdot(embedding, jnp.sin(jnp.arange(embedding.size, dtype=jnp.float32)))


def test_abstract_params():
    abstract = flatten(functional.abstract_params(TINY))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in abstract.values())
    assert {leaf.dtype for leaf in abstract.values()} == {jnp.dtype("float32")}
    shapes = {path: leaf.shape for path, leaf in abstract.items()}
    expected = {
        "image_encoder/patch_embed/kernel": (16, 16, 3, 24),
        "image_encoder/pos_embed": (1, 3, 5, 24),
        "image_encoder/blocks/0/attn/rel_pos_h": (3, 8),  # windowed
        "image_encoder/blocks/1/attn/rel_pos_h": (5, 8),  # global
        "image_encoder/blocks/1/attn/rel_pos_w": (9, 8),
        "image_encoder/blocks/1/attn/qkv/kernel": (24, 72),
        "image_encoder/blocks/1/mlp/lin1/kernel": (24, 36),
        "image_encoder/neck/conv2/kernel": (3, 3, 32, 32),
        "prompt_encoder/pe_gaussian": (2, 16),
        "prompt_encoder/point_embeddings/3/embedding": (1, 32),
        "prompt_encoder/mask_downscaling/conv2/kernel": (2, 2, 3, 12),
        "mask_decoder/mask_tokens/embedding": (3, 32),
        "mask_decoder/transformer/layers/1/cross_attn_image_to_token/q_proj/kernel": (32, 16),
        "mask_decoder/transformer/layers/0/mlp/lin2/kernel": (40, 32),
        "mask_decoder/output_upscaling/deconv1/kernel": (2, 2, 8, 32),
        "mask_decoder/output_hypernetworks_mlps/2/layers/2/kernel": (32, 4),
        "mask_decoder/iou_prediction_head/layers/0/kernel": (32, 20),
    }
    assert expected == {path: shapes.get(path) for path in expected}


def test_init_is_a_function_of_the_seed():
    first, again, other = (flatten(functional.init_params(TINY, seed)) for seed in (5, 5, 6))
    abstract = flatten(functional.abstract_params(TINY))
    assert {k: (v.shape, v.dtype) for k, v in first.items()} == {
        k: (v.shape, v.dtype) for k, v in abstract.items()
    }
    for path in first:
        np.testing.assert_array_equal(first[path], again[path], err_msg=path)
        assert np.isfinite(first[path]).all()
    kernel = "image_encoder/blocks/0/attn/qkv/kernel"
    assert not np.allclose(first[kernel], other[kernel])
    assert not np.allclose(first[kernel], first[kernel.replace("/0/", "/1/")])


def test_bind_names_everything_that_does_not_fit():
    flat = flatten(functional.abstract_params(TINY))
    del flat["image_encoder/pos_embed"], flat["mask_decoder/iou_token/embedding"]
    flat["image_encoder/blocks/9/attn/qkv/kernel"] = jnp.zeros((24, 72))
    flat["image_encoder/neck/conv1/kernel"] = jnp.zeros((1, 1, 24, 31))
    with pytest.raises(ValueError, match="do not fit the model") as error:
        functional.bind(TINY, unflatten(flat))
    assert str(error.value).splitlines()[1:] == [
        "  missing: image_encoder/pos_embed",
        "  missing: mask_decoder/iou_token/embedding",
        "  unknown: image_encoder/blocks/9/attn/qkv/kernel",
        "  image_encoder/neck/conv1/kernel: expected shape (1, 1, 24, 32), got (1, 1, 24, 31)",
    ]


def test_bind_names_every_factor_that_does_not_fit(params):
    qkv = "image_encoder/blocks/0/attn/qkv"
    a, b = jnp.zeros((24, 2)), jnp.zeros((2, 24))
    factors = {
        f"{qkv}/q/a": a,
        f"{qkv}/q/b": b,
        f"{qkv}/v/a": a,
        f"{qkv}/k/b": b,
        f"{qkv}/all/a": a,
        f"{qkv}/all/b": b,
        f"{qkv}/z/a": a,
        "image_encoder/blocks/7/attn/qkv/q/a": a,
        "image_encoder/blocks/x/attn/qkv/q/a": a,
        "image_encoder/neck/conv1/all/a": a,
        "image_encoder/blocks/0/attn/proj/all/c": a,
    }
    with pytest.raises(ValueError, match="adapter does not fit") as error:
        functional.bind(TINY, params, adapter=unflatten(factors))
    message = str(error.value)
    for line in (
        f"{qkv}/v/a: its other half is missing",
        f"{qkv}/k/b: its other half is missing",
        f"{qkv}/all: expected shapes ((24, 2), (2, 72)), got ((24, 2), (2, 24))",
        f"{qkv}/z/a: unknown block 'z'",
        "image_encoder/blocks/7/attn/qkv/q/a: the model has no such layer",
        "image_encoder/blocks/x/attn/qkv/q/a: the model has no such layer",
        "image_encoder/neck/conv1/all/a: the model has no dense layer there",
        "image_encoder/blocks/0/attn/proj/all/c: expected factors named a and b",
    ):
        assert line in message
    assert f"{qkv}/q" not in message
    assert len(message.splitlines()) == 9


def test_bind_leaves_no_trace(params):
    """The abstract module is cached; neither parameters nor adapters may stay in it."""
    doubled = jax.tree.map(lambda leaf: 2 * leaf, params)
    factors = {"image_encoder/blocks/0/attn/qkv/q/a": jnp.ones((24, 2))}
    factors["image_encoder/blocks/0/attn/qkv/q/b"] = jnp.ones((2, 24))
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 2, 2, 24)), jnp.float32)

    def qkv(params, **options):
        return functional.bind(TINY, params, **options).image_encoder.blocks[0].attn.qkv(x)

    plain = qkv(params)
    assert np.abs(qkv(params, adapter=unflatten(factors)) - plain).max() > 1e-2
    np.testing.assert_array_equal(qkv(doubled), 2 * plain)
    np.testing.assert_array_equal(qkv(params), plain)


def test_remat_changes_neither_output_nor_gradient(params, batch):
    plain, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    remat = jax.jit(jax.value_and_grad(lambda params, batch: loss(params, batch, remat=True)))
    recomputed, recomputed_gradient = remat(params, batch)
    np.testing.assert_allclose(recomputed, plain, rtol=1e-5)
    recomputed_gradient = flatten(recomputed_gradient)
    for path, leaf in flatten(gradient).items():
        scale = max(np.abs(leaf).max(), 1e-3)
        np.testing.assert_allclose(
            recomputed_gradient[path], leaf, atol=1e-5 * scale, rtol=1e-4, err_msg=path
        )


def test_remat_keeps_less(params, batch):
    """XLA's CPU compiler merges what plain `jax.checkpoint` computes anew with the first time."""

    def kept(remat):
        gradient = jax.jit(jax.grad(lambda p: loss(p, many, remat=remat)))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    many = {name: np.repeat(array, 16, axis=0) for name, array in batch.items()}
    assert kept(remat=True) < kept(remat="dots") < 0.9 * kept(remat=False)


def test_what_is_no_number_stays_none_through_remat(params, batch):
    broken = {**batch, "images": jnp.full_like(batch["images"], jnp.nan)}
    gradient = jax.jit(jax.grad(lambda p: loss(p, broken, remat=True)))(params)
    assert all(np.isnan(leaf).all() for path, leaf in flatten(gradient).items() if "qkv" in path)


def test_bfloat16_is_close_and_leaves_the_parameters_alone(params, batch):
    def encode(dtype):
        bound = functional.bind(TINY, params, dtype=dtype)
        return jax.jit(bound.encode_image)(batch["images"], batch["sizes"])

    exact, rounded = encode(jnp.float32), encode(jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    error = np.std(np.asarray(rounded, np.float32) - exact) / np.std(exact)
    assert 1e-4 < error < 0.05

    gradient = jax.eval_shape(jax.grad(lambda p: loss(p, batch, dtype=jnp.bfloat16)), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    whole = functional.bind(TINY, params, dtype=jnp.bfloat16)
    for leaf in jax.tree.leaves(jax.eval_shape(lambda batch: whole(**batch), batch)):
        assert leaf.dtype == jnp.float32
