"""Run upstream's SAM 2 and ours with the same weights on one image, and compare stage by stage.

Both get the same normalised pixels and the same prompts: two points, and a box with a mask; then
the image and its mask become a memory, and the image is conditioned on it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from convert.reference import build_reference_sam2
from convert.sam2 import to_torch
from convert.torch_io import import_torch
from convert.verify import Stage, example_image, report, stages
from samjax.models.functional import bind
from samjax.models.prompt_encoder import merge_prompts
from samjax.models.sam2 import MemoryBank
from samjax.models.sam2_config import Sam2Config
from samjax.trees import Params

Prompt = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def verify(config: Sam2Config, params: Params, image: Path | None = None) -> list[Stage]:
    """Print the difference at each stage, and fail where it is too large.

    Args:
        config: of the model.
        params: our parameter tree.
        image: an image file; by default a made-up one.

    Raises:
        VerificationError: a stage differs by more than the tolerance (or is not finite).
        ImportError: the reference package is not installed.
        ValueError: a frame that is no square, which upstream cannot build.
    """
    pixels = _square(config) if image is None else _read(image, config)
    prompts = _prompts(config)
    theirs = _run_upstream(config, params, pixels, prompts)
    return report(stages(theirs, _run_ours(config, params, pixels, prompts)))


def _square(config: Sam2Config) -> np.ndarray:
    return example_image(config.image_size)


def _read(path: Path, config: Sam2Config) -> np.ndarray:
    height, width = config.image_size
    with Image.open(path) as image:
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32)


def _prompts(config: Sam2Config) -> dict[str, Prompt]:
    """Coordinates, labels (the padding point among them) and low-res mask logits or None."""
    height, width = config.image_size
    points = np.array([[[0.4 * width, 0.6 * height], [0.9 * width, 0.1 * height]]], np.float32)
    box = np.array([[0.2 * width, 0.3 * height, 0.7 * width, 0.9 * height]], np.float32)
    mask = np.random.default_rng(1).normal(0, 5, (1, *config.low_res_size, 1)).astype(np.float32)
    pair = merge_prompts(points, np.array([[1, 0]]), None, box_first=True)
    return {
        "points": (*pair, None),
        "box and mask": (*merge_prompts(None, None, box, box_first=True), mask),
    }


def _run_upstream(
    config: Sam2Config, params: Params, image: np.ndarray, prompts: dict[str, Prompt]
) -> dict[str, np.ndarray]:
    torch = import_torch()
    model = build_reference_sam2(config)
    weights = {name: torch.from_numpy(array) for name, array in to_torch(params).items()}
    model.load_state_dict(weights, strict=True)
    results: dict[str, np.ndarray] = {}

    def keep(name: str, tensor: Any) -> Any:
        array = tensor.numpy()
        results[name] = np.moveaxis(array, 1, -1).copy() if array.ndim == 4 else array.copy()
        return tensor

    def tokens(tensor: Any) -> Any:
        return tensor.flatten(2).permute(2, 0, 1)

    mean, std = (np.array(v, np.float32) for v in (config.pixel_mean, config.pixel_std))
    pixels = torch.from_numpy(np.moveaxis((image - mean) / std, -1, 0).copy())[None]
    with torch.inference_mode():
        fine, middle, coarse = model.forward_image(pixels)["backbone_fpn"]
        for name, level in (("stride 4", fine), ("stride 8", middle), ("stride 16", coarse)):
            keep(name, level)
        embedding = coarse + model.no_mem_embed.reshape(1, -1, 1, 1)
        logits: Any = None
        score: Any = None
        for name, (coords, labels, mask) in prompts.items():
            # Without the padding point, which upstream appends itself.
            points = torch.from_numpy(coords[:, :-1]), torch.from_numpy(labels[:, :-1])
            given = None if mask is None else torch.from_numpy(np.moveaxis(mask, -1, 1).copy())
            sparse, dense = model.sam_prompt_encoder(points, None, given)
            logits, iou, _, score = model.sam_mask_decoder.predict_masks(
                embedding,
                model.sam_prompt_encoder.get_dense_pe(),
                sparse,
                dense,
                False,
                [fine, middle],
            )
            results[f"{name}: low-res logits"] = logits.numpy()
            results[f"{name}: predicted IoU"] = iou.numpy()
            results[f"{name}: object score"] = score.numpy()[:, 0]
        size = config.image_size
        mask = torch.nn.functional.interpolate(logits[:, :1], size=size, mode="bilinear")
        grid = config.image_encoder.grid
        memory, positions = model._encode_new_memory([tokens(coarse)], [grid], mask, score, False)
        keep("memory", memory)
        record = {
            "maskmem_features": memory,
            "maskmem_pos_enc": positions,
            "obj_ptr": torch.from_numpy(_pointer(config)),
        }
        place = model.image_encoder.neck.position_encoding(coarse)
        outputs = {"cond_frame_outputs": {0: record}, "non_cond_frame_outputs": {}}
        conditioned = model._prepare_memory_conditioned_features(
            1, False, [tokens(coarse)], [tokens(place)], [grid], outputs, 2
        )
        keep("conditioned embedding", conditioned)
    return results


def _pointer(config: Sam2Config) -> np.ndarray:
    width = config.image_encoder.out_channels
    return np.random.default_rng(2).normal(size=(1, width)).astype(np.float32)


def _run_ours(
    config: Sam2Config, params: Params, image: np.ndarray, prompts: dict[str, Prompt]
) -> dict[str, np.ndarray]:
    given = {k: tuple(None if x is None else jnp.asarray(x) for x in p) for k, p in prompts.items()}
    with jax.default_matmul_precision("highest"):
        return jax.device_get(_run(config, params, jnp.asarray(image), given))


@functools.partial(jax.jit, static_argnums=0)
def _run(
    config: Sam2Config, params: Params, image: jax.Array, prompts: dict[str, Any]
) -> dict[str, jax.Array]:
    model, results = bind(config, params), {}
    features = model.encode_image(image[None])
    results["stride 4"], results["stride 8"] = features.high_res
    results["stride 16"] = features.embedding
    embedding = model.without_memory(features.embedding)
    for name in ("points", "box and mask"):
        prompt = model.encode_prompt(*prompts[name])
        found = model.decode(embedding, prompt, features.high_res)
        results[f"{name}: low-res logits"] = found.low_res_logits
        results[f"{name}: predicted IoU"] = found.iou
        results[f"{name}: object score"] = found.object_score_logits
    logits, score = found.low_res_logits[:, 0], found.object_score_logits
    memory = model.encode_memory(features.embedding, logits, score, jnp.zeros(1, bool))
    results["memory"] = memory
    bank = MemoryBank(
        features=memory[:, None],
        ages=jnp.full((1, 1), config.num_memories),
        valid=jnp.ones((1, 1), bool),
        pointers=jnp.asarray(_pointer(config))[None],
        pointer_times=jnp.ones((1, 1), jnp.int32),
        pointer_valid=jnp.ones((1, 1), bool),
        pointer_span=jnp.float32(1),
    )
    results["conditioned embedding"] = model.condition(features.embedding, bank)
    return results
