"""The masked autoencoder, the denoiser and the projector without a reference: sizes, properties."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.models import denoiser, mae
from samjax.models.denoiser import DenoiserConfig
from samjax.models.functional import abstract_params, bind, init_params
from samjax.models.mae import VARIANTS, MaeConfig, patchify, random_keep, sincos_positions, vit_tiny
from samjax.models.projector import ProjectorConfig
from samjax.trees import flatten
from tiny_models import noisy_params

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = MaeConfig(
    image_size=(12, 20), patch_size=4, width=24, depth=1, heads=3, mlp_ratio=1.5,
    decoder_width=16, decoder_depth=1, decoder_heads=2, mask_ratio=0.6,
)  # fmt: skip
TOKENS = 15
DENOISER = DenoiserConfig(features=12, widths=(24, 16))


@pytest.fixture(scope="module")
def params():
    return noisy_params(TINY)


@pytest.fixture
def images(rng):
    return jnp.asarray(rng.uniform(0, 255, (2, 12, 20, 3)), jnp.float32)


@pytest.mark.parametrize(
    ("variant", "encoder", "decoder", "published"),
    [
        ("vit_base", 85_647_360, 26_008_320, 111.9),
        ("vit_large", 303_099_904, 26_139_392, 329.5),
        ("vit_huge", 630_435_840, 26_178_124, 657.1),
    ],
)
def test_published_sizes(variant, encoder, decoder, published):
    """Upstream counts its two tables of positions as well."""
    config = VARIANTS[variant]()
    sizes = {path: leaf.size for path, leaf in flatten(abstract_params(config)).items()}
    behind = sum(n for path, n in sizes.items() if path.startswith(("decoder_", "mask_")))
    assert (sum(sizes.values()) - behind, behind) == (encoder, decoder)
    tokens = 1 + config.grid[0] * config.grid[1]
    positions = tokens * (config.width + config.decoder_width)
    assert round((encoder + decoder + positions) / 1e6, 1) == published
    if variant == "vit_large":
        assert round((encoder + tokens * config.width) / 1e6, 1) == 303.3


def test_small_variant_is_small():
    leaves = jax.tree.leaves(abstract_params(vit_tiny()))
    assert sum(leaf.size for leaf in leaves) == 218_544


def test_config_survives_json():
    for config in (TINY, vit_tiny((32, 48))):
        assert MaeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(TypeError, match="colour"):
        MaeConfig.from_dict({**TINY.to_dict(), "colour": 1})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": (12, 22)}, r"image_size \(12, 22\) is not a multiple of patch_size 4"),
        ({"width": 28}, "width 28 is not a multiple of heads 3"),
        ({"decoder_heads": 3}, "decoder_width 16 is not a multiple of decoder_heads 3"),
        ({"decoder_width": 18}, "decoder_width 18: sine and cosine"),
        ({"mask_ratio": 1.0}, r"a mask ratio of 1\.0; expected 0 up to less than 1"),
    ],
)
def test_config_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


def test_patches_are_the_pixels_of_the_grid(images):
    patches = np.asarray(patchify(images, 4)).reshape(2, 3, 5, 4, 4, 3)
    for row, column in np.ndindex(3, 5):
        cut = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_array_equal(patches[:, row, column], cut)
    ours = bind(TINY, init_params(TINY)).patches(images.astype(jnp.uint8))
    pixels = (np.floor(images) - np.float32(TINY.pixel_mean)) / np.float32(TINY.pixel_std)
    np.testing.assert_allclose(ours, patchify(jnp.asarray(pixels), 4), atol=1e-6)


def test_positions():
    table = sincos_positions((3, 5), 16)
    assert table.shape == (16, 16)
    assert not table[0].any(), "the class token has none"
    row, column = 2, 3
    angles = 10000.0 ** -(np.arange(4) / 4)
    expected = [np.sin(column * angles), np.cos(column * angles)]
    expected += [np.sin(row * angles), np.cos(row * angles)]
    np.testing.assert_allclose(table[1 + row * 5 + column], np.concatenate(expected), atol=1e-7)


def test_random_keep():
    key = jax.random.key(0)
    ratios = {0.0: 15, 0.6: 6, 0.75: 3, 0.9: 1}
    drawn = jax.jit(lambda: [random_keep(key, 64, TOKENS, ratio) for ratio in ratios])()
    for (keep, mask), visible in zip(drawn, ratios.values(), strict=True):
        assert keep.shape == (64, visible)
        for positions, row in zip(np.asarray(keep), np.asarray(mask), strict=True):
            assert len(set(positions.tolist())) == visible
            np.testing.assert_array_equal(np.flatnonzero(row == 0), np.sort(positions))
        assert set(np.unique(mask)) <= {0.0, 1.0}
    keep = np.asarray(drawn[1][0])
    assert len({tuple(row) for row in keep}) == 64, "every image its own"
    # 384 draws of 15 positions: 25.6 each, with a standard deviation of 3.9
    assert (np.abs(np.bincount(keep.ravel(), minlength=15) - 25.6) < 4 * 3.9).all()


def test_random_keep_refuses():
    for ratio, message in ((1.5, "a mask ratio of 1.5"), (0.95, "none of 15 patches visible")):
        with pytest.raises(ValueError, match=message):
            random_keep(jax.random.key(0), 1, TOKENS, ratio)


def test_what_is_removed_is_not_seen(params, images):
    """Other pixels in removed patches, or the visible patches in another order: the same."""
    keep = jnp.array([[3, 14, 0, 7], [9, 1, 2, 11]])

    @jax.jit
    def run(images, keep):
        model = bind(TINY, params)
        tokens = model.encode(images, keep)
        return tokens, model.decode(tokens, keep)

    tokens, prediction = run(images, keep)
    assert tokens.shape == (2, 5, 24)
    assert prediction.shape == (2, TOKENS, 48)
    patches = np.array(patchify(images, 4))
    hidden = np.ones((2, TOKENS), bool)
    hidden[np.arange(2)[:, None], keep] = False
    patches[hidden] = 255 - patches[hidden]
    grid = patches.reshape(2, 3, 5, 4, 4, 3).swapaxes(2, 3).reshape(images.shape)
    np.testing.assert_array_equal(run(jnp.asarray(grid), keep)[0], tokens)
    order = jnp.array([2, 0, 3, 1])
    shuffled = run(images, keep[:, order])
    np.testing.assert_allclose(shuffled[0][:, 1:], tokens[:, 1:][:, order], atol=1e-5)
    np.testing.assert_allclose(shuffled[1], prediction, atol=1e-5)


def test_all_visible_and_reconstruct(params, images):
    """Without `keep` all are visible; `reconstruct` hides what `random_keep` draws."""
    key = jax.random.key(7)

    @jax.jit
    def run():
        model = bind(TINY, params)
        everything = jnp.broadcast_to(jnp.arange(TOKENS), (2, TOKENS))
        keep, mask = random_keep(key, 2, TOKENS, TINY.mask_ratio)
        plain = [model.decode(model.encode(images, ids), ids) for ids in (None, everything, keep)]
        return plain, mask, model.reconstruct(images, key)

    (none, everything, some), mask, (prediction, hidden) = run()
    np.testing.assert_allclose(none, everything, atol=1e-5)
    np.testing.assert_allclose(prediction, some, atol=1e-5)
    np.testing.assert_array_equal(hidden, mask)
    assert mask.sum(1).tolist() == [9, 9]


def test_another_size_needs_no_other_parameters(params):
    larger = dataclasses.replace(TINY, image_size=(16, 28))
    tokens = jax.eval_shape(bind(larger, params).encode, jnp.zeros((1, 16, 28, 3)))
    assert tokens.shape == (1, 29, 24)
    with pytest.raises(ValueError, match=r"\(12, 20\) \(height, width\), got \(16, 28\)"):
        bind(TINY, params).encode(jnp.zeros((1, 16, 28, 3)))


def test_bfloat16(params, images):
    types = jnp.bfloat16, jnp.float32
    encode = jax.jit(lambda: [bind(TINY, params, dtype=dtype).encode(images) for dtype in types])
    rounded, tokens = encode()
    assert (rounded.dtype, tokens.dtype) == types
    assert jnp.abs(rounded - tokens).max() < 0.05 * jnp.abs(tokens).max()


@pytest.mark.parametrize("remat", [False, True, "dots"])
def test_remat_is_asked_for_in_every_block(remat, monkeypatch):
    """What it then does is `with_remat`'s, and tested with it."""
    asked = []

    def with_remat(block, remat):
        asked.append(remat)
        return block

    monkeypatch.setattr(mae, "with_remat", with_remat)
    monkeypatch.setattr(denoiser, "with_remat", with_remat)
    for config, run in (
        (TINY, lambda model: model.reconstruct(jnp.zeros((1, 12, 20, 3)), jax.random.key(0))[0]),
        (DENOISER, lambda model: model(jnp.zeros((1, 2, 3, 12)))),
    ):
        asked.clear()
        jax.eval_shape(
            lambda p, c=config, r=run: r(bind(c, p, remat=remat)), abstract_params(config)
        )
        assert asked == [remat, remat], "encoder and decoder, stem and doubling: one block each"


def test_denoiser_sizes():
    flat = flatten(abstract_params(DenoiserConfig()))
    assert "stem/shortcut/conv/kernel" not in flat, "256 channels stay 256"
    # Without biases but the last layer's: 3 x 3 and 2 x 2 kernels, two numbers per norm and channel
    stem = 2 * (9 * 256 * 256 + 2 * 256)
    ups = sum(4 * 2 * c * c + 2 * (9 * c * c + 2 * c) for c in (128, 64, 32, 16))
    assert sum(leaf.size for leaf in flat.values()) == stem + ups + 9 * 256 + 32 + 51 == 1_749_779
    out = jax.eval_shape(
        lambda p, x: bind(DenoiserConfig(), p)(x),
        abstract_params(DenoiserConfig()),
        jax.ShapeDtypeStruct((2, 3, 5, 256), jnp.float32),
    )
    assert (out.shape, out.dtype) == ((2, 48, 80, 3), jnp.float32)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_denoiser_norms(rng, norm):
    """A batch norm sees the other examples, a group norm does not; neither the features' scale."""
    config = dataclasses.replace(DENOISER, norm=norm)
    params = init_params(config, seed=2)
    run = jax.jit(lambda x: bind(config, params)(x))
    features = jnp.asarray(rng.normal(size=(3, 4, 5, 12)), jnp.float32)
    out = np.asarray(run(features))
    assert out.shape == (3, 8, 10, 3)
    assert 0 < out.min() < out.max() < 1
    others = np.asarray(run(features.at[1:].multiply(3.0)))
    assert (np.abs(others[0] - out[0]).max() < 1e-6) == (norm == "group")
    # The stem ends in a convolution with norm, but for the shortcut, which is one as well.
    np.testing.assert_allclose(run(100 * features), out, atol=1e-3)


def test_denoiser_refuses():
    for fields, message in (
        ({"widths": (16,)}, "at least one more"),
        ({"norm": "group", "widths": (16, 12)}, "multiples of 8 groups"),
    ):
        with pytest.raises(ValueError, match=message):
            DenoiserConfig(**fields)
    config = DenoiserConfig()
    object.__setattr__(config, "norm", "layer")  # the tests' own check of types would be first
    with pytest.raises(ValueError, match="norm is 'layer', expected 'batch' or 'group'"):
        config.__post_init__()


def test_projector(rng):
    config = ProjectorConfig(features_in=12, hidden=20, features_out=28)
    params = noisy_params(config)
    x = jnp.asarray(rng.normal(size=(2, 3, 5, 12)), jnp.float32)
    each = jax.jit(lambda x: bind(config, params)(x))
    one_by_one = each(x)
    assert one_by_one.shape == (2, 3, 5, 28)
    np.testing.assert_allclose(one_by_one[:, 1, 2], each(x[:, 1, 2]), atol=1e-5)
    pooled = jax.jit(lambda x: bind(dataclasses.replace(config, pool=True), params)(x))(x)
    np.testing.assert_allclose(pooled, each(x.mean((1, 2))), atol=1e-5)
