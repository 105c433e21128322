"""Every module of SAM 2 against upstream's, each fed with what upstream's was fed.

So an error shows in the module that makes it, and does not grow on the way. The measure is the
largest difference over the standard deviation of upstream's output.
"""

import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
if find_spec("sam2") is None:
    pytest.skip("sam2 is not installed", allow_module_level=True)

import torch.nn.functional as F  # noqa: E402

import tiny_models  # noqa: E402
from convert.reference import import_sam2  # noqa: E402
from sam2_reference import as_torch, nchw, relative, sam2_pair, tokens  # noqa: E402
from samjax.models import ops  # noqa: E402
from samjax.models.functional import bind  # noqa: E402
from samjax.models.sam2 import ImageFeatures, MemoryBank  # noqa: E402
from samjax.models.sam2_config import VARIANTS, sam2  # noqa: E402
from samjax.trees import flatten, unflatten  # noqa: E402

TOLERANCE = 1e-5  # of the standard deviation, for a module; 1e-4 for a whole model
CONFIGS = {"2.1": tiny_models.SAM2, "2.0": tiny_models.SAM2_0}
EVERY_SIZE = "SAMJAX_EVERY_SIZE"  # set it to test all eight models at 1024², not two of them


@pytest.fixture(autouse=True)
def quick(request, quick_compilation):
    """But for the tests at full size, which take longer to run than to compile."""
    if request.node.get_closest_marker("slow"):
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(scope="module")
def inputs(config):
    rng = np.random.default_rng(1)
    (gh, gw), width = config.image_encoder.grid, config.image_encoder.out_channels

    def normal(*shape, scale=1.0):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    labels = np.array([[1, 0, -1], [2, 3, -1]], np.int32)
    arrays = {
        "pixels": normal(2, *config.image_size, 3),
        "embedding": normal(2, gh, gw, width),
        "high_res": (normal(2, 4 * gh, 4 * gw, width // 8), normal(2, 2 * gh, 2 * gw, width // 4)),
        "coords": rng.uniform(0, 128, (2, 3, 2)).astype(np.float32) * (labels >= 0)[..., None],
        "labels": labels,
        "mask_logits": normal(2, 4 * gh, 4 * gw, 1, scale=5.0),
        "masks": (rng.uniform(size=(2, *config.image_size)) > [[[0.7]], [[1.0]]]).astype("f"),
        "memories": normal(4, 2, gh, gw, config.memory_width),
        "pointers": normal(4, 2, width),
    }
    return jax.tree.map(jnp.asarray, arrays)


def test_trunk_block_by_block(config, inputs):
    """Each block is fed with the output of upstream's block before it."""
    theirs, params = sam2_pair(config)
    trunk = theirs.image_encoder.trunk
    fed, came = {}, {}

    def keep(index):
        def hook(module, given, output):
            fed[index], came[index] = given[0].numpy(), output.numpy()

        return hook

    for i, block in enumerate(trunk.blocks):
        block.register_forward_hook(keep(i))
    with torch.no_grad():
        stages = trunk(nchw(inputs["pixels"]))

    @jax.jit
    def ours(params, pixels, fed, stages):
        encoder = bind(config, params).image_encoder
        blocks = {i: block(fed[i]) for i, block in enumerate(encoder.trunk.blocks)}
        return encoder.trunk.embed_patches(pixels), blocks, encoder.neck(stages)

    nhwc = [np.moveaxis(np.asarray(x), 1, -1) for x in stages]
    patches, blocks, levels = ours(params, inputs["pixels"], fed, nhwc)
    assert relative(patches, fed[0]) < TOLERANCE
    assert {
        i: relative(blocks[i], came[i]) for i in came if relative(blocks[i], came[i]) > 1e-5
    } == {}
    with torch.no_grad():
        expected, _ = theirs.image_encoder.neck(stages)
    for found, level in zip(levels, expected, strict=True):
        assert relative(found, np.moveaxis(np.asarray(level), 1, -1)) < TOLERANCE


def test_image_features(config, inputs):
    theirs, params = sam2_pair(config)
    pixels = np.asarray(inputs["pixels"]) * np.float32(config.pixel_std)
    pixels = jnp.asarray(pixels + np.float32(config.pixel_mean))
    found = jax.jit(lambda p, x: bind(config, p).encode_image(x))(params, pixels)
    with torch.no_grad():
        expected = theirs.forward_image(nchw(inputs["pixels"]))["backbone_fpn"]
    for ours, level in zip((*found.high_res, found.embedding), expected, strict=True):
        assert relative(ours, np.moveaxis(np.asarray(level), 1, -1)) < TOLERANCE


@pytest.mark.parametrize("with_mask", [False, True])
def test_decoder(config, inputs, with_mask):
    """All mask tokens, the IoU, the object score and the tokens behind the pointers."""
    theirs, params = sam2_pair(config)
    mask_logits = inputs["mask_logits"] if with_mask else None

    @jax.jit
    def ours(params):
        model = bind(config, params)
        prompt = model.encode_prompt(inputs["coords"], inputs["labels"], mask_logits)
        return prompt, model.decode(inputs["embedding"], prompt, inputs["high_res"])

    prompt, found = ours(params)
    with torch.no_grad():
        points = (
            as_torch(inputs["coords"])[:, :-1],
            as_torch(inputs["labels"])[:, :-1],
        )
        masks = None if mask_logits is None else nchw(mask_logits)
        prompt_of_theirs = theirs.sam_prompt_encoder(points=points, boxes=None, masks=masks)
        sparse, dense = (tensor.detach() for tensor in prompt_of_theirs)
        expected = theirs.sam_mask_decoder.predict_masks(
            image_embeddings=nchw(inputs["embedding"]),
            image_pe=theirs.sam_prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=[nchw(x) for x in inputs["high_res"]],
        )
    assert relative(prompt.sparse, sparse) < TOLERANCE
    assert relative(prompt.dense, np.moveaxis(np.asarray(dense), 1, -1)) < TOLERANCE
    logits, iou, mask_tokens, score = (np.asarray(x) for x in expected)
    assert relative(found.low_res_logits, logits) < TOLERANCE
    assert relative(found.iou, iou) < TOLERANCE
    assert relative(found.mask_tokens, mask_tokens) < TOLERANCE
    assert relative(found.object_score_logits, score[:, 0]) < TOLERANCE


@pytest.mark.parametrize("present", [True, False])
@pytest.mark.parametrize("multimask", [True, False])
def test_segment(config, inputs, multimask, present):
    """The choice among the masks, objects that are not there, and pointers."""
    theirs, params = sam2_pair(config)
    segment = jax.jit(
        lambda p, coords: bind(config, p).segment(
            inputs["embedding"], inputs["high_res"], coords, inputs["labels"], multimask=multimask
        )
    )
    offset = 1e4 if present else -1e4
    bias = "mask_decoder/pred_obj_score_head/layers/2/bias"
    flat = flatten(params)
    params = unflatten({**flat, bias: flat[bias] + offset})
    their_bias = theirs.sam_mask_decoder.pred_obj_score_head.layers[-1].bias
    for seed in range(3):
        coords = np.random.default_rng(seed).uniform(0, 128, (2, 3, 2)).astype(np.float32)
        coords[:, -1] = 0
        found = segment(params, jnp.asarray(coords))
        with torch.no_grad():
            their_bias += offset
            expected = theirs._forward_sam_heads(
                nchw(inputs["embedding"]),
                {
                    "point_coords": as_torch(coords)[:, :-1],
                    "point_labels": as_torch(inputs["labels"])[:, :-1],
                },
                high_res_features=[nchw(x) for x in inputs["high_res"]],
                multimask_output=multimask,
            )
            their_bias -= offset
        _, _, iou, low_res, _, pointer, score = (np.asarray(x) for x in expected)
        assert ((score > 0) == present).all()
        assert relative(found.low_res_logits, low_res[:, 0]) < TOLERANCE
        assert np.abs(found.iou - iou.max(axis=1)).max() < TOLERANCE  # of 1
        assert relative(found.pointer, pointer) < TOLERANCE


def test_mask_as_prompt(config, inputs):
    theirs, params = sam2_pair(config)
    features = ImageFeatures(inputs["embedding"], inputs["high_res"])
    features = jax.tree.map(jnp.asarray, features)
    found = jax.jit(lambda p: bind(config, p).segment_mask(features, inputs["masks"]))(params)
    with torch.no_grad():
        expected = theirs._use_mask_as_output(
            nchw(inputs["embedding"]),
            [nchw(x) for x in inputs["high_res"]],
            as_torch(inputs["masks"])[:, None],
        )
    _, _, _, low_res, _, pointer, score = (np.asarray(x) for x in expected)
    assert relative(found.low_res_logits, low_res[:, 0]) < TOLERANCE
    assert relative(found.pointer, pointer) < TOLERANCE
    assert found.object_score_logits.tolist() == score[:, 0].tolist() == [10.0, -10.0]


@pytest.mark.parametrize("prompted", [True, False])
def test_memory_encoder(config, inputs, prompted):
    theirs, params = sam2_pair(config)
    low_res, score = inputs["mask_logits"][..., 0], jnp.array([3.0, -2.0])
    found = jax.jit(
        lambda p: bind(config, p).encode_memory(
            inputs["embedding"], low_res, score, jnp.full(2, prompted)
        )
    )(params)
    with torch.no_grad():
        masks = F.interpolate(as_torch(low_res)[:, None], config.image_size, mode="bilinear")
        expected, _ = theirs._encode_new_memory(
            [tokens(inputs["embedding"])],
            [config.image_encoder.grid],
            masks,
            as_torch(score)[:, None],
            prompted,
        )
    assert relative(found, np.moveaxis(np.asarray(expected), 1, -1)) < TOLERANCE


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("slots", [6, 9])
def test_memory_attention(config, inputs, reverse, slots):
    """Two conditioning frames, one of them ahead, and two tracked frames; empty slots behind."""
    theirs, params = sam2_pair(config)
    gh, gw = config.image_encoder.grid
    embedding, memories, pointers = (inputs[k] for k in ("embedding", "memories", "pointers"))
    frame, num_frames, sign = 5, 20, -1 if reverse else 1
    places = [frame - 4 * sign, frame + 3 * sign, frame - 1 * sign, frame - 2 * sign]

    def record(i):
        positions = theirs.memory_encoder.position_encoding(torch.zeros(1, 1, gh, gw))
        return {
            "maskmem_features": nchw(memories[i][:1]),
            "maskmem_pos_enc": [positions],
            "obj_ptr": as_torch(pointers[i])[:1],
        }

    records = {place: record(i) for i, place in enumerate(places)}
    with torch.no_grad():
        positions = theirs.image_encoder.neck.position_encoding(torch.zeros(1, 1, gh, gw))
        expected = theirs._prepare_memory_conditioned_features(
            frame,
            False,
            [tokens(embedding[:1])],
            [positions.flatten(2).permute(2, 0, 1)],
            [(gh, gw)],
            {
                "cond_frame_outputs": {t: records[t] for t in places[:2]},
                "non_cond_frame_outputs": {t: records[t] for t in places[2:]},
            },
            num_frames,
            reverse,
        )

    def slotted(values, count):
        return (
            jnp.zeros((1, count, *values.shape[1:]), values.dtype).at[0, : len(values)].set(values)
        )

    far = config.num_memories
    bank = MemoryBank(
        features=slotted(memories[:, 0], slots),
        ages=jnp.maximum(slotted(jnp.array([far, far, 1, 2]), slots), 1),
        valid=slotted(jnp.ones(4, bool), slots),
        pointers=slotted(pointers[jnp.array([0, 2, 3]), 0], slots),  # not of the frame ahead
        pointer_times=slotted(jnp.array([4, 1, 2]), slots),
        pointer_valid=slotted(jnp.ones(3, bool), slots),
        pointer_span=jnp.float32(config.num_pointers - 1),
    )
    found = jax.jit(lambda p, bank: bind(config, p).condition(embedding[:1], bank))(params, bank)
    assert relative(found, np.moveaxis(np.asarray(expected), 1, -1)) < TOLERANCE


def test_resizing(rng):
    """Bicubic position tables, antialiased masks and fixed sine positions."""
    x = rng.normal(size=(2, 3, 7, 5)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(x), (33, 40), mode="bicubic").numpy()
    rows, columns = ops.cubic_matrix(7, 33), ops.cubic_matrix(5, 40)
    assert np.abs(np.einsum("Hh,Ww,bchw->bcHW", rows, columns, x) - expected).max() < 3e-6
    for size in ((3, 4), (7, 2), (20, 31), (64, 5)):
        expected = F.interpolate(torch.from_numpy(x), size, mode="bilinear", antialias=True)
        found = ops.resize_antialiased(jnp.asarray(x), size)
        assert np.abs(np.asarray(found) - expected.numpy()).max() < 3e-6
    import_sam2()
    from sam2.modeling.position_encoding import PositionEmbeddingSine

    expected = PositionEmbeddingSine(64)(torch.zeros(1, 1, 9, 14))[0].permute(1, 2, 0)
    assert np.abs(ops.sine_positions((9, 14), 64) - expected.numpy()).max() < 2e-6


QUICK = ("sam2.1_hiera_tiny",)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_whole_model_at_1024(name):
    """Image features and masks of Meta's own sizes: a batch of two images, each kind of prompt."""
    if name not in QUICK and not os.environ.get(EVERY_SIZE):
        pytest.skip(f"set {EVERY_SIZE}=1 for all eight models (20 minutes, 8 GB)")
    config = sam2(*VARIANTS[name])
    theirs, params = sam2_pair(config)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 32, 32, 3)).repeat(32, 1).repeat(32, 2).astype(np.float32)
    images = pixels * np.float32(config.pixel_std) + np.float32(config.pixel_mean)
    features = jax.jit(lambda params, images: bind(config, params).encode_image(images))(
        params, images
    )
    with torch.no_grad():
        *levels, embedding = theirs.forward_image(nchw(pixels))["backbone_fpn"]
    differences = {
        place: relative(found, np.moveaxis(np.asarray(expected), 1, -1))
        for place, found, expected in zip(
            ("stride 4", "stride 8", "embedding"),
            (*features.high_res, features.embedding),
            (*levels, embedding),
            strict=True,
        )
    }

    @jax.jit
    def decode(params, features, *prompt):
        model = bind(config, params)
        embedding = model.without_memory(features.embedding)
        return model.decode(embedding, model.encode_prompt(*prompt), features.high_res)

    corners = np.sort(rng.uniform(0, 1024, (2, 2, 2)), axis=1)
    mask = rng.normal(size=(2, 16, 16, 1)).repeat(16, 1).repeat(16, 2)
    for kind, coords, labels, masks in (
        ("points", rng.uniform(0, 1024, (2, 2, 2)), [[1, 0], [1, 1]], None),
        ("boxes", corners, [[2, 3], [2, 3]], None),
        ("masks", rng.uniform(0, 1024, (2, 1, 2)), [[1], [0]], 10 * mask),
    ):
        coords = jnp.asarray(coords, jnp.float32)
        labels = jnp.array(labels)
        masks = None if masks is None else jnp.asarray(masks, jnp.float32)
        padding = jnp.zeros((2, 1, 2)), jnp.full((2, 1), -1)
        ours = [jnp.concatenate(pair, 1) for pair in zip((coords, labels), padding, strict=True)]
        found = decode(params, features, *ours, masks)
        with torch.no_grad():
            sparse, dense = theirs.sam_prompt_encoder(
                points=(as_torch(coords), as_torch(labels)),
                boxes=None,
                masks=None if masks is None else nchw(masks),
            )
            logits, iou, _, score = theirs.sam_mask_decoder.predict_masks(
                image_embeddings=embedding + theirs.no_mem_embed.reshape(1, -1, 1, 1),
                image_pe=theirs.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                repeat_image=False,
                high_res_features=levels,
            )
        score = score.numpy()[:, 0]
        differences |= {
            f"{kind}: logits": relative(found.low_res_logits, logits),
            f"{kind}: iou": float(np.abs(found.iou - iou.numpy()).max()),
            f"{kind}: score": float(
                np.abs(found.object_score_logits - score).max() / np.abs(score).max()
            ),
        }
    print(name, {place: f"{value:.1e}" for place, value in differences.items()})
    assert max(differences.values()) < 1e-4
