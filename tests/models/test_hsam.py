"""Properties of H-SAM that need no reference: sizes, noise, gradients, prompts."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compiling
import tiny_models
from samjax.models import hsam
from samjax.models.functional import abstract_params, bind, init_params
from samjax.models.hsam import HSamConfig, HSamPrediction
from samjax.models.hsam_decoder import Prior, drop
from samjax.models.sam import SamConfig, vit_b
from samjax.peft.lora import LoraConfig, init_factors
from samjax.prompt_labels import FOREGROUND, INVALID
from samjax.trees import flatten

TINY = HSamConfig(
    image_encoder=dataclasses.replace(tiny_models.SAM.image_encoder, image_size=(64, 80)),
    num_multimask=2,
    mask_channels=12,
    decoder_depth=1,
    decoder_heads=2,
    decoder_mlp_width=40,
    iou_head_width=20,
)
RELEASED = dataclasses.replace(TINY, cmattn="released")
SILENT = dataclasses.replace(
    TINY, embedding_noise=0.0, cross_dropout=0.0, map_dropout=0.0, class_noise=()
)
BATCH, TOKENS, GRID, FRAME, WIDTH = 2, 3, (4, 5), (64, 80), 32
NO_PROMPT = jnp.zeros((BATCH, 0, 2)), jnp.zeros((BATCH, 0), jnp.int32)
KEYS = [jax.random.key(seed) for seed in (1, 2)]


@pytest.fixture(autouse=True)
def quicker_compilation(monkeypatch, quick_compilation):
    compiling.use_old_emitters(monkeypatch)


@pytest.fixture(scope="module")
def params():
    return tiny_models.noisy_params(TINY)


@pytest.fixture(scope="module")
def features():
    return jnp.asarray(np.random.default_rng(5).normal(size=(BATCH, *GRID, WIDTH)), jnp.float32)


@pytest.fixture(scope="module")
def masks():
    """Two label maps of the frame."""
    labels = np.random.default_rng(6).integers(0, TOKENS, (2, BATCH, *FRAME))
    return jnp.asarray(labels, jnp.uint8)


def of_size(grid: int, classes: int, **fields) -> HSamConfig:
    base = vit_b((16 * grid, 16 * grid)).image_encoder
    return HSamConfig(image_encoder=base, num_multimask=classes, **fields)


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def dense(*sizes: int) -> int:
    """Kernels and biases of dense layers from each size to the next."""
    return sum((a + 1) * b for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize(
    ("grid", "classes", "decoder2"), [(14, 8, 7_423_998), (32, 8, 18_907_530), (32, 1, 17_034_771)]
)
def test_published_sizes(grid, classes, decoder2):
    """Upstream's own numbers less the 143,729 (k = 1: 141,930) that no loss reaches there."""
    tree = abstract_params(of_size(grid, classes))
    tokens, cells, norm = classes + 1, grid * grid, 2 * 256
    attention, half = 4 * dense(256, 256), 3 * dense(256, 128) + dense(128, 256)
    block = 3 * attention + dense(256, 2048, 256) + 4 * norm
    upscaling = (4 * 256 + 1) * 64 + 2 * 64 + (4 * 64 + 1) * 32
    skip_connect = (4 * 64 + 1) * 32 + 2 * 32 + (4 * 32 + 1) * 16 + 2 * 16
    cmattn = 2 * 4 * dense(cells, cells) + dense(cells, 2048, cells) + 4 * cells
    assert count(tree["mask_decoder2"]["transformer"]) == 2 * block + half + norm
    assert count(tree["mask_decoder2"]["cmattn"]) == cmattn + dense(tokens, 1)
    hypernetworks = tokens * dense(256, 256, 256, 256, 256, 16)
    rest = 256 * tokens + upscaling + skip_connect + hypernetworks
    total = 2 * block + half + norm + cmattn + dense(tokens, 1) + rest
    assert count(tree["mask_decoder2"]) == total == decoder2


def test_sams_weights_fit_decoder_1():
    """All of SAM's paths exist, and no others; shapes differ where mask tokens are counted."""
    sam, ours = (
        flatten(abstract_params(config)) for config in (vit_b((224, 224)), of_size(14, classes=8))
    )
    ours = {path: leaf for path, leaf in ours.items() if not path.startswith("mask_decoder2/")}
    extra = {path for path in ours if path not in sam}
    heads = "mask_decoder/output_hypernetworks_mlps/"
    assert {path.removeprefix(heads)[0] for path in extra} == set("45678")
    assert not sam.keys() - ours.keys()
    assert {path for path in sam if sam[path].shape != ours[path].shape} == {
        "mask_decoder/mask_tokens/embedding",
        "mask_decoder/iou_prediction_head/layers/2/kernel",
        "mask_decoder/iou_prediction_head/layers/2/bias",
    }


def test_heads_of_cmattn():
    found = {grid: of_size(grid, 1).cmattn_heads for grid in (14, 32, 7, 6, 10, 5)}
    assert found == {14: 7, 32: 8, 7: 7, 6: 4, 10: 4, 5: 1}
    assert of_size(14, 1, map_heads=14).cmattn_heads == 14


def test_config_survives_json():
    for config in (TINY, SILENT, of_size(14, 8, cmattn="released", map_heads=2)):
        assert HSamConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert HSamConfig.family == "hsam"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"map_heads": 6}, "map_heads 6 does not divide the 20 cells"),
        ({"map_dropout": 1.0}, r"map_dropout must lie in \[0, 1\), got 1.0"),
        ({"class_noise": (0.1, -0.1)}, "must not be negative"),
        ({"image_encoder": tiny_models.SAM_PADDED.image_encoder}, "16 times: patch_size 8"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_initialised_model_with_lora():
    """The factors sit on the image encoder alone; every output has its shape and is float32."""
    params = init_params(TINY)
    factors = init_factors(params, LoraConfig(rank=5, projections=("q", "v")), KEYS[0])
    paths = {path.rpartition("/")[0] for path in flatten(factors)}
    blocks = "image_encoder/blocks/{}/attn/qkv/{}"
    assert paths == {blocks.format(i, block) for i in (0, 1) for block in "qv"}

    def run(params, factors, images, sizes):
        model = bind(TINY, params, adapter=factors, dtype=jnp.bfloat16)
        return model(images, sizes, *NO_PROMPT)

    images, sizes = jnp.zeros((BATCH, *FRAME, 3), jnp.uint8), jnp.full((BATCH, 2), 60)
    found = jax.eval_shape(run, params, factors, images, sizes)
    shapes = [(BATCH, TOKENS, 16, 20), (BATCH, TOKENS), (BATCH, TOKENS, *FRAME)]
    assert [leaf.shape for leaf in found] == shapes
    assert {leaf.dtype for leaf in found} == {jnp.dtype("float32")}


def test_noise_comes_with_the_key(params, features, masks):
    @jax.jit
    def run(key, mask):
        return bind(TINY, params).answer(features, *NO_PROMPT, key, mask)

    first, again = run(KEYS[0], masks[0]), run(KEYS[0], masks[0])
    other_key, other_mask = run(KEYS[1], masks[0]), run(KEYS[0], masks[1])
    np.testing.assert_array_equal(first.logits, again.logits)
    for other in (other_key, other_mask):
        assert np.abs(first.logits - other.logits).max() > 1e-3
        np.testing.assert_array_equal(first.low_res_logits, other.low_res_logits)


def test_without_noise_the_key_does_not_matter(params, features):
    def run(key):
        return bind(SILENT, params).answer(features, *NO_PROMPT, key)

    quiet, silent = jax.jit(lambda key: (run(None), run(key)))(KEYS[0])
    for one, other in zip(quiet, silent, strict=True):
        np.testing.assert_array_equal(one, other)


def test_class_noise_wants_a_label_map(params, features):
    def run(config, key):
        model = bind(config, params)
        return jax.eval_shape(lambda: model.answer(features, *NO_PROMPT, key))

    with pytest.raises(ValueError, match=r"needs the label map: pass mask \(b, h, w\)"):
        run(TINY, KEYS[0])
    run(TINY, None)
    run(RELEASED, KEYS[0])  # its CMAttn has no effect, with or without noise


@pytest.mark.parametrize("config", [TINY, RELEASED], ids=lambda config: config.cmattn)
def test_gradient_of_cmattn(config, params, features):
    """Every tensor learns in the intended form, none in the released one."""

    rng = np.random.default_rng(8)
    low_res, maps, upscaled = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((BATCH, TOKENS, 16, 20), (BATCH, TOKENS, 20), (BATCH, 16, 20, WIDTH // 8))
    )
    prior = Prior(low_res, jnp.zeros((BATCH, TOKENS)), maps, upscaled)

    @jax.jit
    @jax.grad
    def gradient(cmattn):
        decoder = {**params["mask_decoder2"], "cmattn": cmattn}
        model = bind(config, {**params, "mask_decoder2": decoder})
        prompt = model.encode_prompt(*NO_PROMPT)
        logits = model.mask_decoder2(
            features, model.prompt_encoder.image_positions(), prompt, prior
        )
        return jnp.square(logits).sum()

    for path, leaf in flatten(gradient(params["mask_decoder2"]["cmattn"])).items():
        if not path.endswith("k_proj/bias"):  # adds one number to all of a softmax: only rounding
            assert bool(np.any(leaf)) == (config is TINY), path


def test_prompts_in_invalid_slots_do_not_exist(params, features):
    """Moving such a point changes no bit; moving one that exists changes both decoders' masks."""
    coords = jnp.asarray(np.random.default_rng(7).uniform(0, 60, (BATCH, 2, 2)), jnp.float32)
    labels = jnp.tile(jnp.array([[FOREGROUND, INVALID]]), (BATCH, 1))
    run = jax.jit(lambda coords: bind(TINY, params).answer(features, coords, labels))
    first, same, other = run(coords), run(coords.at[:, 1].add(9)), run(coords.at[:, 0].add(9))
    for one, unmoved, moved in zip(first, same, other, strict=True):
        np.testing.assert_array_equal(one, unmoved)
        assert np.abs(one - moved).max() > 1e-3


def test_labels_of_the_grid(rng):
    grid = rng.integers(0, 9, (2, 3, 5)).astype(np.uint8)
    fine = jnp.asarray(grid.repeat(16, 1).repeat(4, 2))
    np.testing.assert_array_equal(hsam.label_grid(fine, (3, 5)), grid)
    ramp = jnp.arange(20, dtype=jnp.uint8).reshape(1, 1, 20)
    np.testing.assert_array_equal(hsam.label_grid(ramp, (1, 3))[0, 0], [3, 10, 16])


def test_rare_classes_get_more_noise():
    sigmas = TINY.class_noise
    sizes = [900, 30, 30, 7, 5, 400, 2, 100, 60]  # equal ones in the order of the classes
    labels = jnp.asarray(np.repeat(np.arange(9), sizes)[None])
    order = [6, 4, 3, 1, 2, 8, 7, 5, 0]
    found = np.asarray(hsam.class_deviations(labels, 9, sigmas))
    np.testing.assert_allclose(found[order], sigmas, rtol=1e-6)
    # Three classes present, and labels of none: the ends of the list and its middle.
    labels = jnp.asarray(np.repeat([0, 3, 7, 255], [50, 9, 20, 99])[None])
    found = np.asarray(hsam.class_deviations(labels, 9, sigmas))
    np.testing.assert_allclose(found[[3, 7, 0]], [0.35, 0.2, 0.0], atol=1e-7)
    # More classes than values; and nothing but background.
    labels = jnp.asarray(np.repeat(np.arange(17), np.arange(1, 18))[None])
    found = np.asarray(hsam.class_deviations(labels, 17, sigmas))
    np.testing.assert_allclose(found[::2], sigmas, rtol=1e-6)
    np.testing.assert_allclose(found[1::2], np.convolve(sigmas, [0.5, 0.5], "valid"), rtol=1e-6)
    assert hsam.class_deviations(jnp.zeros((1, 4), jnp.uint8), 9, sigmas)[0] == 0


def test_class_noise_has_its_mean_and_deviation(rng):
    maps = jnp.asarray(rng.normal(2, 1, (2, 4, 6000)), jnp.float32)
    labels = jnp.asarray(np.repeat([0, 1, 2, 9], [3000, 1000, 500, 1500])[None].repeat(2, 0))
    added = np.asarray(hsam.add_class_noise(maps, labels, (0.4, 0.1, 0.0), KEYS[0]) - maps)
    mean = float(maps.mean())
    for label, sigma in ((0, 0.0), (1, 0.1), (2, 0.4)):
        part = added[:, :, np.asarray(labels[0]) == label]
        assert part.std() == pytest.approx(sigma, rel=0.03, abs=1e-6)
        assert part.mean() == pytest.approx(mean, abs=0.03)
    assert not added[:, :, 4500:].any()


def test_embedding_noise_is_measured_by_the_range(rng):
    x = jnp.asarray(rng.uniform(-3, 5, (2, 30, 40, 32)), jnp.float32)
    added = np.asarray(hsam.disturb_embedding(x, 0.2, KEYS[0]) - x)
    assert added.std() == pytest.approx(0.2 * 8, rel=0.01)
    assert added.mean() == pytest.approx(0, abs=0.02)


def test_dropout_keeps_the_mean():
    x = jnp.full((200, 300), 4.0)
    dropped = np.asarray(drop(x, 0.2, KEYS[0]))
    assert set(np.unique(dropped)) == {0.0, 5.0}
    assert (dropped == 0).mean() == pytest.approx(0.2, abs=0.01)
    assert drop(x, 0.2, None) is x
    assert drop(x, 0.0, KEYS[0]) is x


def test_average_of_constant_logits():
    """One resolution is a quarter of the other; a constant stays one, so this is exact."""
    coarse = jnp.full((1, 2, 3, 5), 2.0).at[:, 1].set(-4.0)
    fine = jnp.full((1, 2, 12, 20), 6.0)
    found = hsam.averaged_logits(HSamPrediction(coarse, jnp.zeros((1, 2)), fine), (12, 20))
    np.testing.assert_allclose(found, np.broadcast_to([4.0, 1.0], (1, 12, 20, 2)), rtol=1e-6)


def test_weight_of_the_second_loss():
    for epoch in (0, 1, 10, 100, 300):
        expected = 0.6 ** (0.990**epoch)
        assert float(hsam.two_level_weight(epoch)) == pytest.approx(expected, rel=1e-5)
        assert float(jax.jit(hsam.two_level_weight)(jnp.int32(epoch))) == pytest.approx(
            expected, rel=1e-5
        )
    assert float(hsam.two_level_weight(0)) == pytest.approx(0.6, rel=1e-6)


def test_is_a_sam():
    assert issubclass(HSamConfig, SamConfig)
    assert TINY.mask_tokens == TOKENS
    assert TINY.low_res_size == (16, 20)
