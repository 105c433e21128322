"""Properties of SAM that need no reference: sizes, prompts, batches, attention in chunks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from samjax.models import functional, vit
from samjax.models.ops import normalise_pixels
from samjax.models.prompt_encoder import merge_prompts
from samjax.models.sam import VARIANTS, SamConfig, vit_b, vit_xs
from samjax.models.vit import ViTConfig
from samjax.prompt_labels import INVALID
from tiny_models import SAM as TINY
from tiny_models import noisy_params

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def params():
    return noisy_params(TINY)


@pytest.fixture(scope="module")
def sam(params):
    return functional.bind(TINY, params)


@pytest.fixture(scope="module")
def embedding():
    return jnp.asarray(np.random.default_rng(5).normal(size=(2, 3, 5, 32)), jnp.float32)


@pytest.fixture(scope="module")
def decode(params):
    """Embedding, coordinates and labels to all logits and IoU in one array (b, m, 12 * 20 + 1)."""

    @jax.jit
    def run(embedding, coords, labels):
        sam = functional.bind(TINY, params)
        logits, iou = sam.decode(embedding, sam.encode_prompt(coords, labels))[:2]
        return jnp.concatenate([logits.reshape(*iou.shape, -1), iou[..., None]], axis=-1)

    return run


def prompts(rng, count):
    coords = rng.uniform(0, 48, (2, count, 2)).astype(np.float32)
    return coords, np.tile(np.resize(np.int32([1, 0, 2, 3, -1]), count), (2, 1))


@pytest.mark.parametrize(
    ("variant", "count"), [("vit_b", 93_735_728), ("vit_l", 312_343_088), ("vit_h", 641_090_864)]
)
def test_published_sizes(variant, count):
    leaves = jax.tree.leaves(functional.abstract_params(VARIANTS[variant]()))
    assert sum(leaf.size for leaf in leaves) == count


def test_small_variant_is_small():
    leaves = jax.tree.leaves(functional.abstract_params(vit_xs()))
    assert sum(leaf.size for leaf in leaves) < 1_000_000


def test_config_survives_json():
    for config in (TINY, vit_b((512, 768)), vit_xs()):
        assert SamConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(TypeError, match="colour"):
        SamConfig.from_dict({**TINY.to_dict(), "colour": 1})


def test_config_refuses_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match=r"image_size \(100, 80\) is not a multiple of patch_size"):
        ViTConfig(image_size=(100, 80))
    with pytest.raises(ValueError, match="width 25 is not a multiple of heads 3"):
        ViTConfig(width=25, heads=3)


def test_shapes_of_a_rectangle(sam, params):
    images, sizes = jnp.zeros((2, 48, 80, 3)), jnp.full((2, 2), 40)
    coords, labels = jnp.zeros((2, 4, 2)), jnp.ones((2, 4), int)
    embedding = jax.eval_shape(sam.encode_image, images, sizes)
    assert embedding.shape == (2, 3, 5, 32)
    prediction = jax.eval_shape(sam, images, sizes, coords, labels)
    assert prediction.low_res_logits.shape == (2, 3, *TINY.low_res_size) == (2, 3, 12, 20)
    assert prediction.iou.shape == (2, 3)
    masks = jnp.zeros((2, 12, 20, 1))
    assert jax.eval_shape(sam.encode_prompt, coords, labels, masks).dense.shape == (2, 3, 5, 32)


def test_encoder_refuses_another_frame(sam):
    with pytest.raises(ValueError, match=r"\(48, 80\) \(height, width\), got \(80, 48\)"):
        sam.image_encoder(jnp.zeros((1, 80, 48, 3)))


def test_padding_is_zero_after_normalising(sam, rng):
    images = rng.uniform(0, 255, (2, 48, 80, 3)).astype(np.float32)
    sizes = jnp.array([[48, 33], [20, 80]])
    x = np.asarray(normalise_pixels(TINY, jnp.asarray(images), sizes))
    mean, std = np.float32(TINY.pixel_mean), np.float32(TINY.pixel_std)
    expected = (images - mean) / std
    expected[0, :, 33:] = 0
    expected[1, 20:] = 0
    np.testing.assert_allclose(x, expected, atol=1e-6)


def test_attention_in_chunks(params, rng, monkeypatch):
    """The output and the gradient are those of the whole, unchunked attention."""
    config = ViTConfig(image_size=(64, 80), width=24, depth=1, heads=3, global_blocks=(0,))
    attention = vit.Attention(24, 3, config.grid, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for table in (attention.rel_pos_h, attention.rel_pos_w):
        table[...] = jnp.asarray(rng.normal(size=table.shape), jnp.float32)
    x = jnp.asarray(rng.normal(size=(2, 4, 5, 24)), jnp.float32)

    def run(most):
        monkeypatch.setattr(vit, "MAX_TOKENS", 0)
        monkeypatch.setattr(vit, "MAX_SCORES", 2 * 3 * most * 20)

        def loss(x):
            out = attention(x)
            return jnp.vdot(out, jnp.cos(jnp.arange(x.size, dtype=jnp.float32))), out

        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(x)
        return out, gradient

    whole, whole_gradient = run(most=20)
    for most, rows in ((10, 2), (5, 1)):
        out, gradient = run(most)
        assert vit._rows_per_chunk(2 * 3, 4, 5) == rows
        np.testing.assert_allclose(out, whole, atol=2e-6)
        np.testing.assert_allclose(gradient, whole_gradient, atol=1e-5)


def test_rows_per_chunk():
    assert vit._rows_per_chunk(12, 64, 64) == 2
    assert vit._rows_per_chunk(300, 14, 14) == 14, "windows are never cut"
    assert vit._rows_per_chunk(12, 48, 64) == 3
    assert vit._rows_per_chunk(12, 31, 64) == 1, "a prime: row by row"
    assert vit._rows_per_chunk(12, 2, 1000) == 1, "a row is the least there is"


@pytest.mark.parametrize("grid", [(3, 5), (20, 15)])
def test_the_bias_is_the_same_folded_or_added(rng, grid):
    """Against the formula written out; the larger grid is beyond the folded form."""
    (gh, gw), d = grid, 7
    q, k, v, table_h, table_w = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((2, 3, gh, gw, d), *[(2, 3, gh * gw, d)] * 2, (gh, gh, d), (gw, gw, d))
    )
    scores = np.einsum("bnrwd,bnkd->bnrwk", q, k).reshape(2, 3, gh, gw, gh, gw) * d**-0.5
    scores += np.einsum("bnrwd,rkd->bnrwk", q, table_h)[..., :, None]
    scores += np.einsum("bnrwd,wkd->bnrwk", q, table_w)[..., None, :]
    weights = np.exp(scores.reshape(2, 3, gh * gw, gh * gw))
    expected = weights @ v / weights.sum(-1, keepdims=True)
    out = vit._attend(*(jnp.asarray(x) for x in (q, k, v, table_h, table_w)))
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_no_whole_attention_matrix(params, monkeypatch):
    """With chunks, no array of the program has a (query, key) pair for all queries at once."""
    attention = functional.bind(TINY, params).image_encoder.blocks[1].attn

    def pairs():
        program = jax.make_jaxpr(jax.grad(lambda x: attention(x).sum()))(jnp.zeros((1, 3, 5, 24)))
        sizes = [variable.aval.size for step in program.eqns for variable in step.outvars]
        return sizes.count(TINY.image_encoder.heads * 15 * 15)

    assert pairs() > 0
    monkeypatch.setattr(vit, "MAX_TOKENS", 0)
    monkeypatch.setattr(vit, "MAX_SCORES", TINY.image_encoder.heads * 5 * 15)
    assert pairs() == 0


def test_points_and_image_share_their_positions(sam):
    """(x, y) in pixels of the frame against (row, column) of the grid: swapping shows."""
    grid = np.asarray(sam.prompt_encoder.image_positions())
    rows, columns = np.meshgrid(np.arange(3), np.arange(5), indexing="ij")
    centres = np.stack([16 * columns + 7.5, 16 * rows + 7.5], axis=-1).reshape(1, 15, 2)
    labels = jnp.ones((1, 15), int)
    sparse = sam.encode_prompt(jnp.asarray(centres, jnp.float32), labels).sparse
    foreground = sam.prompt_encoder.point_embeddings[1]()
    np.testing.assert_allclose(sparse[0] - foreground, grid.reshape(15, 32), atol=2e-5)


def test_labels_choose_the_embedding(sam, rng):
    coords = jnp.asarray(rng.uniform(0, 48, (1, 1, 2)), jnp.float32)
    encoder = sam.prompt_encoder

    def sparse(label):
        return encoder(coords, jnp.array([[label]])).sparse[0]

    for label in (0, 1, 2, 3):
        np.testing.assert_allclose(
            sparse(label) - encoder.point_embeddings[label](),
            sparse(0) - encoder.point_embeddings[0](),
            atol=1e-6,
        )
    np.testing.assert_array_equal(sparse(-1), encoder.not_a_point_embed())  # without a position


def test_merge_prompts(rng):
    points = rng.uniform(0, 48, (3, 2, 2))
    labels = np.tile([1, 0], (3, 1))
    boxes = rng.uniform(0, 48, (3, 4))

    coords, kinds = merge_prompts(points, labels, None)
    assert kinds.tolist() == [[1, 0, -1]] * 3  # upstream's padding point
    np.testing.assert_allclose(coords[:, :2], points, rtol=1e-6)
    np.testing.assert_array_equal(coords[:, 2], 0)

    coords, kinds = merge_prompts(None, None, boxes)
    assert kinds.tolist() == [[2, 3]] * 3
    np.testing.assert_allclose(coords.reshape(3, 4), boxes, rtol=1e-6)

    coords, kinds = merge_prompts(points, labels, boxes)
    assert kinds.tolist() == [[1, 0, 2, 3]] * 3
    assert (coords.dtype, kinds.dtype) == (np.float32, np.int32)

    coords, kinds = merge_prompts(None, None, None, batch=4)
    assert (coords.shape, kinds.shape) == ((4, 0, 2), (4, 0))


def test_invalid_slots_do_not_exist(decode, embedding, rng):
    coords, labels = prompts(rng, 2)
    expected = decode(embedding, coords, labels)
    for junk in (0.0, 31.0):
        padded = np.concatenate([coords, np.full((2, 1, 2), junk, np.float32)], axis=1)
        kinds = np.concatenate([labels, np.full((2, 1), INVALID, np.int32)], axis=1)
        np.testing.assert_allclose(decode(embedding, padded, kinds), expected, atol=2e-5)
    kinds[:, 2:] = -1  # upstream's padding point does exist
    assert np.abs(decode(embedding, padded, kinds) - expected).max() > 1e-3


def test_no_prompt_equals_invalid_prompts(decode, embedding, rng):
    coords, _ = prompts(rng, 3)
    nothing = decode(embedding, np.zeros((2, 0, 2), np.float32), np.zeros((2, 0), np.int32))
    invalid = decode(embedding, coords, np.full((2, 3), INVALID, np.int32))
    np.testing.assert_allclose(invalid, nothing, atol=2e-5)


def test_invalid_slots_have_no_gradient(sam, embedding, rng):
    coords, labels = prompts(rng, 3)
    labels[0, 2], labels[1, 0] = INVALID, INVALID

    prompt = sam.encode_prompt(jnp.asarray(coords), jnp.asarray(labels))
    image = embedding.reshape(2, 15, 32)

    @jax.jit
    @jax.grad
    def gradient(sparse):
        transformer = sam.mask_decoder.transformer
        tokens, updated = transformer(sparse, image, jnp.sin(image), prompt.valid)
        return tokens[:, 1].std() + updated.std()

    found = np.abs(gradient(prompt.sparse))
    assert np.isfinite(found).all()
    assert (found.max(axis=-1) > 0).tolist() == [[True, True, False], [False, True, True]]


def test_order_of_points_does_not_matter(decode, embedding, rng):
    coords, labels = prompts(rng, 3)
    order = [2, 0, 1]
    expected = decode(embedding, coords, labels)
    np.testing.assert_allclose(
        decode(embedding, coords[:, order], labels[:, order]), expected, atol=2e-5
    )
    swapped = decode(embedding, coords[:, order], labels)  # the points with others' labels
    assert np.abs(swapped - expected).max() > 1e-3


def test_members_of_a_batch_do_not_see_each_other(decode, embedding, rng):
    coords, labels = prompts(rng, 3)
    labels[1] = [2, 3, INVALID]
    both = decode(embedding, coords, labels)
    swapped = decode(embedding[::-1], coords[::-1], labels[::-1])
    np.testing.assert_allclose(swapped, both[::-1], atol=2e-5)
    coords[1] += 9
    other = decode(embedding.at[1].set(0), coords, labels)
    np.testing.assert_allclose(other[0], both[0], atol=2e-5)
    assert np.abs(other[1] - both[1]).max() > 1e-3


def test_images_of_a_batch_do_not_see_each_other(sam, rng):
    images = jnp.asarray(rng.uniform(0, 255, (2, 48, 80, 3)), jnp.float32)
    sizes = jnp.array([[48, 70], [31, 80]])
    encode = jax.jit(sam.encode_image)
    both = encode(images, sizes)
    other = encode(images.at[1].set(0), sizes.at[1].set(48))
    np.testing.assert_allclose(other[0], both[0], atol=1e-5)
    assert np.abs(other[1] - both[1]).max() > 1e-2


def test_mask_prompt_reaches_its_place(sam):
    """A mask that differs in one corner changes the dense prompt in that corner's token only."""
    coords, labels = jnp.zeros((1, 1, 2)), jnp.ones((1, 1), int)
    masks = jnp.zeros((1, 12, 20, 1))
    plain = sam.encode_prompt(coords, labels, masks).dense
    corner = sam.encode_prompt(coords, labels, masks.at[0, :4, 16:].set(3.0)).dense
    changed = np.abs(corner - plain).max(axis=-1)[0] > 0
    assert np.argwhere(changed).tolist() == [[0, 4]]
    without = sam.encode_prompt(coords, labels).dense
    np.testing.assert_array_equal(without[0, 1, 2], sam.prompt_encoder.no_mask_embed()[0])
