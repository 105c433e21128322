"""Every module of SAM against upstream's, each fed with what upstream's was fed.

So an error shows in the module that makes it, and does not grow on the way. The measure is the
largest difference over the standard deviation of upstream's output.
"""

import dataclasses
import os
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
if find_spec("segment_anything") is None:
    pytest.skip("segment_anything is not installed", allow_module_level=True)

from convert.reference import build_reference_sam, randomise  # noqa: E402
from convert.sam import convert  # noqa: E402
from samjax.models.functional import bind  # noqa: E402
from samjax.models.prompt_encoder import merge_prompts  # noqa: E402
from samjax.models.sam import vit_b, vit_h, vit_l  # noqa: E402
from tiny_models import SAM_PADDED as TINY  # noqa: E402

TOLERANCE = 1e-5  # of the standard deviation
BATCH, POINTS = 3, 2

MODULES = [
    *("patch embedding", "windowed attention", "windowed block", "global attention"),
    *("global block", "neck", "image embedding", "image positions"),
    *("points: sparse", "points: dense", "boxes: sparse", "points and boxes: sparse"),
    *("masks: dense", "mask downscaling", "two-way layer 0: tokens", "two-way layer 0: image"),
    *("two-way layer 1: tokens", "two-way layer 1: image", "two-way transformer: tokens"),
    *("two-way transformer: image", "final attention", "upscaling", "hypernetwork", "IoU head"),
    *("decoder: low-res logits", "decoder: IoU"),
]


class Recorder:
    """Inputs and outputs of upstream's modules, as they were in one forward pass."""

    def __init__(self, **modules):
        self.inputs, self.outputs = {}, {}
        for name, module in modules.items():
            module.register_forward_hook(self._keep(name), with_kwargs=True)

    def _keep(self, name: str):
        def hook(module, inputs, keywords, output):
            given = [*inputs, *keywords.values()]
            several = isinstance(output, tuple)
            self.inputs[name] = [to_numpy(tensor) for tensor in given]
            self.outputs[name] = [to_numpy(tensor) for tensor in (output if several else [output])]

        return hook


def to_numpy(tensor) -> np.ndarray:
    return tensor.numpy().copy()


def nhwc(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 1, -1)


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())


def reference(config):
    model = randomise(build_reference_sam(config), seed=0)
    _, params = convert({k: to_numpy(v) for k, v in model.state_dict().items()}, config)
    return model, jax.tree.map(jnp.asarray, params)


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    """{module: relative difference} of the tiny model."""
    model, params = reference(TINY)
    rng = np.random.default_rng(0)
    height, width = TINY.image_size
    pixels = rng.normal(0, 1, (BATCH, 3, height, width)).astype(np.float32)
    points = rng.uniform(0, height, (BATCH, POINTS, 2)).astype(np.float32)
    labels = np.array([[1, 0], [0, 1], [1, -1]], np.int32)
    boxes = np.sort(rng.uniform(0, height, (BATCH, 2, 2)), axis=1).reshape(BATCH, 4)
    boxes = boxes.astype(np.float32)
    masks = rng.normal(0, 5, (BATCH, 1, *TINY.low_res_size)).astype(np.float32)

    encoder, prompts, decoder = model.image_encoder, model.prompt_encoder, model.mask_decoder
    layers = decoder.transformer.layers
    recorder = Recorder(
        patches=encoder.patch_embed,
        attention0=encoder.blocks[0].attn,
        attention1=encoder.blocks[1].attn,
        block0=encoder.blocks[0],
        block1=encoder.blocks[1],
        neck=encoder.neck,
        downscaling=prompts.mask_downscaling,
        layer0=layers[0],
        layer1=layers[1],
        transformer=decoder.transformer,
        final=decoder.transformer.final_attn_token_to_image,
        upscaling=decoder.output_upscaling,
        hypernetwork=decoder.output_hypernetworks_mlps[2],
        iou_head=decoder.iou_prediction_head,
    )
    as_torch = torch.from_numpy
    pairs = as_torch(points), as_torch(labels)
    expected = {}
    with torch.inference_mode():
        embedding = encoder(as_torch(pixels))
        expected["image embedding"] = nhwc(to_numpy(embedding))
        expected["image positions"] = nhwc(to_numpy(prompts.get_dense_pe()))[0]
        sparse, dense = prompts(pairs, None, None)
        expected["points: sparse"] = to_numpy(sparse)
        expected["points: dense"] = nhwc(to_numpy(dense))
        sparse, _ = prompts(None, as_torch(boxes), None)
        expected["boxes: sparse"] = to_numpy(sparse)
        sparse, dense = prompts(pairs, as_torch(boxes), as_torch(masks))
        expected["points and boxes: sparse"] = to_numpy(sparse)
        expected["masks: dense"] = nhwc(to_numpy(dense))
        # One image, several prompts: upstream repeats its embedding.
        logits, iou = decoder.predict_masks(embedding[:1], prompts.get_dense_pe(), sparse, dense)
        expected["decoder: low-res logits"], expected["decoder: IoU"] = map(to_numpy, (logits, iou))
    given, got = recorder.inputs, recorder.outputs
    expected["patch embedding"] = got["patches"][0]
    expected["windowed attention"] = got["attention0"][0]
    expected["windowed block"] = got["block0"][0]
    expected["global attention"] = got["attention1"][0]
    expected["global block"] = got["block1"][0]
    expected["neck"] = nhwc(got["neck"][0])
    expected["mask downscaling"] = nhwc(got["downscaling"][0])
    for i in (0, 1):
        expected[f"two-way layer {i}: tokens"] = got[f"layer{i}"][0]
        expected[f"two-way layer {i}: image"] = got[f"layer{i}"][1]
    expected["two-way transformer: tokens"], expected["two-way transformer: image"] = got[
        "transformer"
    ]
    expected["final attention"] = got["final"][0]
    expected["upscaling"] = nhwc(got["upscaling"][0])
    expected["hypernetwork"] = got["hypernetwork"][0]
    expected["IoU head"] = got["iou_head"][0]

    # Everything that ours is fed with, and what it is called with is what upstream's got.
    fed = {
        "pixels": nhwc(pixels),
        "points": merge_prompts(points, labels, None),
        "boxes": merge_prompts(None, None, boxes),
        "points and boxes": merge_prompts(points, labels, boxes),
        "masks": nhwc(masks),
        "embedding": nhwc(to_numpy(embedding[:1])),
        "neck": nhwc(given["neck"][0]),
        "upscaling": nhwc(given["upscaling"][0]),
        **{name: given[name] for name in ("attention0", "attention1", "block0", "block1")},
        **{name: given[name] for name in ("hypernetwork", "iou_head", "final")},
        # upstream: queries, keys, query_pe, key_pe, all (b, tokens, c)
        **{name: given[name] for name in ("layer0", "layer1")},
        "transformer": [
            given["transformer"][2],  # upstream: image (b, c, h, w), its positions, tokens
            *(nhwc(a).reshape(BATCH, -1, a.shape[1]) for a in given["transformer"][:2]),
        ],
    }
    fed = jax.tree.map(jnp.asarray, fed)
    found = jax.jit(run_ours)(params, fed)
    assert set(found) == set(expected) == set(MODULES)
    return {name: relative(found[name], expected[name]) for name in MODULES}


def run_ours(params, fed) -> dict[str, jax.Array]:
    model = bind(TINY, params)
    encoder, decoder = model.image_encoder, model.mask_decoder
    transformer = decoder.transformer
    found = {
        "patch embedding": encoder.patch_embed(fed["pixels"]),
        "windowed attention": encoder.blocks[0].attn(*fed["attention0"]),
        "windowed block": encoder.blocks[0](*fed["block0"]),
        "global attention": encoder.blocks[1].attn(*fed["attention1"]),
        "global block": encoder.blocks[1](*fed["block1"]),
        "neck": encoder.neck(fed["neck"]),
        "image embedding": encoder(fed["pixels"]),
        "image positions": model.prompt_encoder.image_positions(),
        "mask downscaling": model.prompt_encoder.mask_downscaling(fed["masks"]),
        "final attention": transformer.final_attn_token_to_image(*fed["final"]),
        "upscaling": decoder.output_upscaling(fed["upscaling"]),
        "hypernetwork": decoder.output_hypernetworks_mlps[2](*fed["hypernetwork"]),
        "IoU head": decoder.iou_prediction_head(*fed["iou_head"]),
    }
    prompt = model.encode_prompt(*fed["points"])
    found["points: sparse"], found["points: dense"] = prompt.sparse, prompt.dense
    found["boxes: sparse"] = model.encode_prompt(*fed["boxes"]).sparse
    prompt = model.encode_prompt(*fed["points and boxes"], fed["masks"])
    found["points and boxes: sparse"], found["masks: dense"] = prompt.sparse, prompt.dense
    for i in (0, 1):
        tokens, image, token_pe, image_pe = fed[f"layer{i}"]
        valid = jnp.ones(tokens.shape[:2], bool)
        tokens, image = transformer.layers[i](tokens, image, token_pe, image_pe, valid)
        found[f"two-way layer {i}: tokens"], found[f"two-way layer {i}: image"] = tokens, image
    tokens, image, image_pe = fed["transformer"]
    valid = jnp.ones(tokens.shape[:2], bool)
    tokens, image = transformer(tokens, image, image_pe, valid)
    found["two-way transformer: tokens"], found["two-way transformer: image"] = tokens, image
    decoded = model.decode(jnp.repeat(fed["embedding"], BATCH, axis=0), prompt)
    found["decoder: low-res logits"], found["decoder: IoU"] = decoded[:2]
    return found


@pytest.mark.parametrize("name", MODULES)
def test_module(differences: dict[str, float], name: str, record_property):
    record_property("relative difference", differences[name])
    print(f"\n{name}: {differences[name]:.1e} of the standard deviation")
    assert differences[name] <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("variant", [vit_b, vit_l, vit_h])
def test_blocks_of_real_width(variant, record_property):
    """A windowed and a global block at 1024², between real patch embedding and real neck."""
    if variant is not vit_h and not os.environ.get("SAMJAX_EVERY_SIZE"):
        pytest.skip("set SAMJAX_EVERY_SIZE=1 for all three; the whole vit_b is tested elsewhere")
    config = variant()
    vit = dataclasses.replace(config.image_encoder, depth=2, global_blocks=(1,))
    config = dataclasses.replace(config, image_encoder=vit)
    model, params = reference(config)
    encoder = model.image_encoder
    recorder = Recorder(
        patches=encoder.patch_embed, block0=encoder.blocks[0], block1=encoder.blocks[1]
    )
    pixels = np.random.default_rng(0).normal(0, 1, (1, 3, 1024, 1024)).astype(np.float32)
    with torch.inference_mode():
        embedding = nhwc(to_numpy(encoder(torch.from_numpy(pixels))))
    del model, encoder

    @jax.jit
    def run(params, pixels):
        encoder = bind(config, params).image_encoder
        first = encoder.blocks[0](encoder.embed_patches(pixels))
        second = encoder.blocks[1](first)
        return encoder.patch_embed(pixels), first, second, encoder.neck(second)

    outputs = [recorder.outputs[name][0] for name in ("patches", "block0", "block1")]
    stages = ("patch embedding", "windowed block", "global block", "neck")
    found = run(params, jnp.asarray(nhwc(pixels)))
    for stage, ours, theirs in zip(stages, found, [*outputs, embedding], strict=True):
        difference = relative(ours, theirs)
        record_property(stage, difference)
        print(f"\n{variant.__name__}, {stage}: {difference:.1e} of the standard deviation", end="")
        assert difference <= TOLERANCE
