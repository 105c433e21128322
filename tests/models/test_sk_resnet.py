"""SimCLRv2's network: its size, what training hands back, and what does not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.models.functional import abstract_params, bind, init_params
from samjax.models.sk_resnet import SkResNetConfig
from samjax.trees import flatten, unflatten
from tiny_models import noisy_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = SkResNetConfig(
    image_size=(37, 22),
    blocks=(1, 1),
    width_multiplier=1,
    channels=6,
    sk_ratio=1.25,
    sk_min_channels=9,
    head_layers=2,
    head_channels=7,
)


@pytest.fixture(scope="module")
def params() -> dict:
    """Noise may make a variance negative, hence the magnitude."""
    noisy = flatten(noisy_params(TINY))
    noisy = {k: np.abs(v) if k.endswith("/variance") else v for k, v in noisy.items()}
    return jax.tree.map(jnp.asarray, unflatten(noisy))


@pytest.fixture
def images(rng) -> jax.Array:
    """Of a colour and a roughness each: the norms divide by how much pictures differ."""
    roughness, colour = np.float32([10, 60, 110])[:, None, None, None], (3, 1, 1, 3)
    noise = rng.uniform(-1, 1, (3, *TINY.image_size, 3))
    images = np.clip(rng.uniform(50, 205, colour) + roughness * noise, 0, 255)
    return jnp.asarray(images, jnp.float32)


@jax.jit
def infer(params, images):
    return bind(TINY, params)(images)


@jax.jit
def train(params, images):
    return bind(TINY, params)(images, train=True)


def test_published_size():
    """Upstream's table says 140 M, and its count has the running statistics but not the head."""
    config = SkResNetConfig()
    sizes = {path: leaf.size for path, leaf in flatten(abstract_params(config)).items()}
    in_head = sum(size for path, size in sizes.items() if path.startswith("head/"))
    assert (sum(sizes.values()) - in_head, in_head) == (140_428_864, 34_111_872)
    assert config.feature_channels == 4096
    convolutions = [path for path in sizes if path.endswith("kernel") and "head/" not in path]
    assert len(convolutions) == 3 + 16 * 5 + 4  # stem, bottlenecks, shortcuts


def test_selection_has_a_least_width():
    config = SkResNetConfig()
    assert [config.selection_channels(w) for w in (128, 256, 512, 1024)] == [32, 32, 32, 64]
    assert TINY.selection_channels(6) == 9
    assert TINY.selection_channels(12) == 15


def test_config_survives_json():
    assert SkResNetConfig.from_dict(TINY.to_dict()) == TINY
    listed = {**TINY.to_dict(), "blocks": [1, 1], "image_size": [37, 22]}
    assert SkResNetConfig.from_dict(listed) == TINY
    with pytest.raises(TypeError, match="depth"):
        SkResNetConfig.from_dict({"depth": 50})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"blocks": ()}, "blocks is 0"),
        ({"blocks": (3, 0)}, "blocks is 0"),
        ({"sk_ratio": 0.0}, "sk_ratio is 0.0"),
        ({"head_layers": 0}, "head_layers is 0"),
        ({"channels": 1}, "half of channels is 0"),
    ],
)
def test_sizes_are_positive(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(TINY, **change)


def test_fresh_norms_are_almost_the_identity():
    flat = flatten(init_params(TINY))
    assert all(np.all(v == 0) for k, v in flat.items() if k.endswith("/mean"))
    assert all(np.all(v == 1) for k, v in flat.items() if k.endswith("/variance"))
    norms = 3 + 2 * 5 + 2  # stem, blocks with shortcuts, head
    assert sum(k.endswith("/mean") for k in flat) == sum(k.endswith("/scale") for k in flat)
    assert sum(k.endswith("/mean") for k in flat) == norms
    assert sum(k.endswith("norm/bias") for k in flat) == norms - 1  # not the head's last


def test_features_of_any_size(params):
    def features(images):
        return bind(TINY, params).features(images)

    for height, width in ((37, 22), (9, 5), (1, 1)):
        for dtype in (jnp.float32, jnp.uint8):
            found = jax.eval_shape(features, jax.ShapeDtypeStruct((3, height, width, 3), dtype))
            assert (found.shape, found.dtype) == ((3, TINY.feature_channels), jnp.float32)
    assert TINY.feature_channels == 48


def test_inference_keeps_examples_apart_and_training_does_not(params, images):
    other = images.at[0].set(images[0, ::-1])
    before, after = infer(params, images), infer(params, other)
    np.testing.assert_array_equal(before[1:], after[1:])
    assert np.abs(before[0] - after[0]).max() > 1e-4
    assert np.abs(train(params, images)[0][1:] - train(params, other)[0][1:]).max() > 1e-4


def test_training_hands_back_all_statistics(params, images):
    flat, found = flatten(params), flatten(train(params, images)[1])
    assert set(found) == {path for path in flat if path.endswith(("/mean", "/variance"))}
    assert all(found[path].shape == flat[path].shape for path in found)
    assert all(np.abs(found[path] - flat[path]).max() > 1e-4 for path in found)
    _, of_trunk = jax.eval_shape(
        lambda images: bind(TINY, params).features(images, train=True), images
    )
    assert set(flatten(of_trunk)) == {path for path in found if not path.startswith("head/")}


def test_a_tenth_of_the_batch_comes_in(params, images):
    """Of its mean and of its biased variance; pixels are divided by 255 and no more."""
    first = bind(TINY, params).stem[0].conv(images / 255)
    values = np.asarray(first, np.float64).reshape(-1, 3)
    old, new = (tree["stem"]["0"]["norm"] for tree in (params, train(params, images)[1]))
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * values.mean(0), atol=1e-6)
    expected = 0.9 * old["variance"] + 0.1 * values.var(0)
    np.testing.assert_allclose(new["variance"], expected, atol=1e-6)


def test_with_the_statistics_of_a_batch_inference_is_training(params, images):
    flat = flatten(params)
    flat |= {k: jnp.zeros_like(v) for k, v in flat.items() if k.endswith(("/mean", "/variance"))}
    trained, statistics = train(unflatten(flat), images)
    flat |= {path: 10 * leaf for path, leaf in flatten(statistics).items()}
    np.testing.assert_allclose(infer(unflatten(flat), images), trained, atol=1e-5)


@pytest.mark.parametrize(("remat", "expected"), [(False, 0), (True, 2), ("dots", 2)])
def test_remat_is_per_bottleneck(params, images, remat, expected):
    for options in ({}, {"train": True}):

        def run(images, options=options):
            return bind(TINY, params, remat=remat)(images, **options)

        primitives = [str(e.primitive) for e in jax.make_jaxpr(run)(images).eqns]
        assert sum(name in ("remat2", "checkpoint") for name in primitives) == expected


def test_bfloat16_is_near(params, images):
    exact = infer(params, images)
    rough = jax.jit(lambda p, x: bind(TINY, p, dtype=jnp.bfloat16)(x))(params, images)
    assert rough.dtype == jnp.float32
    assert 0 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()
