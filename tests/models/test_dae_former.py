"""DAE-Former without a reference: sizes, refusals, what an answer depends on, adapters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from compiling import use_old_emitters
from samjax.models import dae_former, functional
from samjax.models.dae_blocks import ChannelAttention, PatchExpand, attend_efficiently
from samjax.models.dae_former import DaeFormerConfig, init_as_upstream
from samjax.models.layers import with_remat
from samjax.models.ops import normalise_pixels
from samjax.trees import flatten, unflatten

TINY = DaeFormerConfig(
    image_size=(32, 48),
    num_multimask=4,
    dims=(8, 12, 20),
    depths=(1, 1, 1),
    decoder_depth=1,
    channel_heads=4,
)


@pytest.fixture(autouse=True)
def compiled_quickly(quick_compilation, monkeypatch):
    use_old_emitters(monkeypatch)


@pytest.fixture(scope="module")
def params():
    return functional.init_params(TINY, seed=3)


def inputs(count=2, points=3):
    images = np.random.default_rng(0).uniform(0, 255, (count, *TINY.image_size, 3))
    sizes = jnp.full((count, 2), jnp.array(TINY.image_size))
    coords, labels = jnp.zeros((count, points, 2)), jnp.ones((count, points), int)
    return jnp.asarray(images, jnp.float32), sizes, coords, labels


@jax.jit
def run(params, *given):
    return functional.bind(TINY, params)(*given)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (DaeFormerConfig(), 29_690_201),
        (DaeFormerConfig(image_size=(512, 224), num_multimask=3), 29_690_201 - 5 * 129),
    ],
)
def test_number_of_parameters(config, count):
    leaves = jax.tree.leaves(functional.abstract_params(config))
    assert sum(leaf.size for leaf in leaves) == count


def test_config_survives_json():
    for config in (TINY, DaeFormerConfig()):
        assert DaeFormerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(TypeError, match="colour"):
        DaeFormerConfig.from_dict({**TINY.to_dict(), "colour": 1})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": (224, 200)}, r"image_size \(224, 200\) is not a multiple of 16"),
        ({"image_size": (0, 32)}, r"image_size \(0, 32\) is not a multiple of 16"),
        ({"dims": (8, 12, 18)}, r"dims \(8, 12, 18\) are not multiples of channel_heads 4"),
        ({"dims": (8, 11, 20), "channel_heads": 1}, r"dims \(8, 11, 20\): the second and the"),
        ({"num_multimask": 0}, "num_multimask is 0, expected at least one class"),
    ],
)
def test_config_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


def test_shapes_and_types():
    config = DaeFormerConfig(
        image_size=(224, 160), num_multimask=3, depths=(1, 1, 1), decoder_depth=1
    )
    params = functional.abstract_params(config)
    images, sizes = jnp.zeros((2, 224, 160, 3), jnp.uint8), jnp.full((2, 2), 160)
    prompt = jnp.zeros((2, 1, 2)), jnp.ones((2, 1), int)

    def both(params):
        model = functional.bind(config, params, dtype=jnp.bfloat16)
        features = model.encode_image(images, sizes)
        return features, model.answer(features, *prompt)

    features, (logits, iou, *_) = jax.eval_shape(both, params)
    shapes = [(2, 56, 40, 128), (2, 28, 20, 320), (2, 14, 10, 512)]
    assert [(f.shape, f.dtype) for f in features] == [(s, jnp.bfloat16) for s in shapes]
    assert (logits.shape, logits.dtype) == ((2, 4, 224, 160), jnp.float32)
    assert (iou.shape, iou.dtype) == ((2, 4), jnp.float32)
    assert logits.shape[1:] == (config.mask_tokens, *config.low_res_size)


def test_pixels_end_at_plus_and_minus_one():
    images = jnp.array([0, 127.5, 255]).reshape(1, 1, 3, 1) * jnp.ones((1, 1, 1, 3))
    found = normalise_pixels(TINY, images, jnp.array([[1, 3]]))
    np.testing.assert_array_equal(found[0, 0, :, 0], [-1, 0, 1])


def test_encoder_refuses_another_frame(params):
    model = functional.bind(TINY, params)
    with pytest.raises(ValueError, match=r"\(32, 48\) \(height, width\), got \(48, 32\)"):
        model.image_encoder(jnp.zeros((1, 48, 32, 3)))


def test_what_an_answer_depends_on(params):
    """Its own image, neither the prompt nor the other image; the two ways to call agree."""
    images, sizes, coords, labels = inputs()
    logits, iou = run(params, images, sizes, coords, labels)[:2]
    assert iou.shape == (2, 5)
    assert not iou.any()
    other = run(params, images, sizes, coords + 7, labels - 1).low_res_logits
    np.testing.assert_array_equal(other, logits)
    changed = images.at[1].set(255 - images[1])
    other = run(params, changed, sizes, coords, labels).low_res_logits
    np.testing.assert_allclose(other[0], logits[0], atol=1e-6)
    assert np.abs(other[1] - logits[1]).max() > 0.1


def test_every_block_can_be_computed_anew(params, monkeypatch):
    """The dual blocks, both cross blocks, and the two expansions with what follows."""
    asked = []

    def counted(block, remat):
        asked.append(remat)
        return with_remat(block, remat)

    monkeypatch.setattr(dae_former, "with_remat", counted)
    model = functional.bind(TINY, params, remat=True)
    assert jax.eval_shape(model, *inputs()).low_res_logits.shape == (2, 5, 32, 48)
    assert asked == [True] * (3 + 2 + 2 + 2)


def test_attention_is_a_product_of_two_softmaxes(rng):
    keys, queries, values = (rng.normal(size=(2, 6, c)) for c in (3, 3, 5))
    over_channels = np.exp(queries) / np.exp(queries).sum(2, keepdims=True)
    over_tokens = np.exp(keys) / np.exp(keys).sum(1, keepdims=True)
    expected = over_channels @ over_tokens.swapaxes(1, 2) @ values
    found = attend_efficiently(*(jnp.asarray(x, jnp.float32) for x in (keys, queries, values)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_an_empty_image_has_a_gradient():
    """All channels are zero: no length is divided by."""
    attention = ChannelAttention(8, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    gradient = jax.jit(jax.grad(lambda x: attention(x).sum()))(jnp.zeros((1, 2, 3, 8)))
    assert np.isfinite(gradient).all()


def test_expansion_keeps_places():
    """Channel (row, column, c) of token (y, x) lands at pixel (2 y + row, 2 x + column)."""
    expand = PatchExpand(12, 3, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    expand.expand.kernel[...] = jnp.eye(12)
    x = np.random.default_rng(0).normal(size=(1, 4, 5, 12)).astype(np.float32)
    token = x[0, 3, 1].reshape(2, 2, 3)[1, 0]
    expected = (token - token.mean()) / np.sqrt(token.var() + 1e-5)
    np.testing.assert_allclose(expand(jnp.asarray(x))[0, 7, 2], expected, atol=1e-5)


def test_an_adapter_on_a_layer_without_bias(params, rng):
    path = "image_encoder/stages/1/blocks/0/channel_attn/qkv"
    x, a, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 12), (12, 2), (2, 12)))
    adapter = unflatten({f"{path}/v/a": jnp.asarray(a), f"{path}/v/b": jnp.asarray(b)})
    model = functional.bind(TINY, params, adapter=adapter, adapter_scale=0.5)
    found = model.image_encoder.stages[1].blocks[0].channel_attn.qkv(jnp.asarray(x))
    expected = x @ np.asarray(flatten(params)[f"{path}/kernel"])
    expected[:, 24:] += 0.5 * x @ a @ b
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_initialisation_as_upstream():
    flat, again, other = (
        {path: np.asarray(leaf) for path, leaf in flatten(init_as_upstream(TINY, seed)).items()}
        for seed in (5, 5, 6)
    )
    kernels = [path for path in flat if path.endswith("kernel")]
    assert all((flat[k] == again[k]).all() and (flat[k] != other[k]).any() for k in kernels)
    assert {leaf.dtype for leaf in flat.values()} == {np.dtype("float32")}
    for path, leaf in flat.items():
        if path.endswith("scale"):
            assert (leaf == 1).all(), path
        elif path.endswith("bias"):
            of_a_norm = f"{path.removesuffix('bias')}scale" in flat
            starts_at_zero = of_a_norm or path.startswith("decoder")
            assert starts_at_zero == (not leaf.any()), path
    widest = {
        "image_encoder/stages/0/patch_embed/proj/kernel": 147**-0.5,
        "image_encoder/stages/1/blocks/0/mlp1/fc1/bias": 12**-0.5,
        "image_encoder/stages/1/blocks/0/mlp1/dwconv/kernel": 1 / 3,
        "decoder_1/blocks/0/mlp1/dwconv/kernel": (6 / (9 + 9 * 48)) ** 0.5,
        "decoder_2/expand/kernel": (6 / (20 + 40)) ** 0.5,
    }
    for path, bound in widest.items():
        largest = np.abs(flat[path]).max()
        assert 0.9 * bound < largest <= bound, path
