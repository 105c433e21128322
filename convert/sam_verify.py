"""Run upstream's SAM and ours with the same weights on one image, and compare stage by stage.

Both get the same normalised pixels and the same prompts: two points (upstream adds its padding
point), and a box with a mask. The measure is the largest absolute difference over the standard
deviation of upstream's result, in float32 with exact matrix products.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from convert import verify as verify_by
from convert.reference import build_reference_sam
from convert.sam import to_torch
from convert.torch_io import import_torch
from convert.verify import TOLERANCE, Stage, report, stages
from samjax.models.functional import bind
from samjax.models.mask_decoder import MaskPrediction
from samjax.models.ops import normalise_pixels
from samjax.models.prompt_encoder import EncodedPrompt, merge_prompts
from samjax.models.sam import SamConfig
from samjax.predictor.sam import ResizeToFrame
from samjax.trees import Params


def verify(config: SamConfig, params: Params, image: Path | None = None) -> list[Stage]:
    """Print the difference at each stage, and fail where it is too large.

    Args:
        config: of the model.
        params: our parameter tree.
        image: an image file; by default a made-up image that leaves a padded margin.

    Raises:
        VerificationError: a stage differs by more than `TOLERANCE` (or is not finite).
        ImportError: the reference package is not installed.
    """
    pixels = example_image(config) if image is None else read(image, config)
    return report(compare(config, params, pixels), TOLERANCE)


def compare(config: SamConfig, params: Params, image: np.ndarray) -> list[Stage]:
    """Both models' results at each stage.

    Args:
        config: of the model.
        params: our parameter tree.
        image: (h, w, 3) RGB of 0..255, at most the size of the model frame; the rest is padding.
    """
    prompts = _prompts(config, image.shape[:2])
    theirs = _run_upstream(config, params, image, prompts)
    ours = _run_ours(config, params, image, prompts)
    return stages(theirs, ours)


def example_image(config: SamConfig) -> np.ndarray:
    """A made-up image narrower than the frame, so that there is padding."""
    height, width = config.image_size
    return verify_by.example_image((height, max(1, int(0.8 * width))))


def read(path: Path, config: SamConfig) -> np.ndarray:
    """An image file, resized to fit the frame, aspect kept: float32 (h, w, 3) of 0..255."""
    with Image.open(path) as image:
        rgb = np.asarray(image.convert("RGB"))
    return ResizeToFrame(config.image_size).apply_image(rgb).astype(np.float32)


def _prompts(config: SamConfig, size: tuple[int, int]) -> dict[str, dict[str, np.ndarray]]:
    """Two prompts, in pixels of the frame."""
    height, width = size
    inside, outside = [0.4 * width, 0.6 * height], [0.9 * width, 0.1 * height]
    corner, opposite = [0.2 * width, 0.3 * height], [0.7 * width, 0.9 * height]
    rng = np.random.default_rng(1)
    return {
        "points": {
            "points": np.array([[inside, outside]], np.float32),
            "labels": np.array([[1, 0]], np.int32),
        },
        "box and mask": {
            "boxes": np.array([corner + opposite], np.float32),
            "mask": rng.normal(0, 5, (1, *config.low_res_size)).astype(np.float32),
        },
    }


def _run_upstream(
    config: SamConfig, params: Params, image: np.ndarray, prompts: dict[str, dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    torch = import_torch()
    model = build_reference_sam(config)
    weights = {name: torch.from_numpy(array) for name, array in to_torch(params).items()}
    model.load_state_dict(weights, strict=True)
    del weights
    results: dict[str, np.ndarray] = {}

    def keep(name: str, channels_first: bool) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            array = output.numpy()
            results[name] = array.transpose(0, 2, 3, 1) if channels_first else array.copy()

        return hook

    encoder = model.image_encoder
    encoder.patch_embed.register_forward_hook(keep("patch embedding", False))
    for index, block in enumerate(encoder.blocks):
        block.register_forward_hook(keep(f"block {index}", False))
    encoder.register_forward_hook(keep("image embedding", True))
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    with torch.inference_mode():
        pixels = (pixels - model.pixel_mean) / model.pixel_std
        height, width = config.image_size
        bottom, right = height - image.shape[0], width - image.shape[1]
        embedding = encoder(torch.nn.functional.pad(pixels, (0, right, 0, bottom)))
        for name, given in prompts.items():
            tensors = {kind: torch.from_numpy(array) for kind, array in given.items()}
            points = (tensors["points"], tensors["labels"]) if "points" in tensors else None
            mask = tensors["mask"][:, None] if "mask" in tensors else None
            sparse, dense = model.prompt_encoder(points, tensors.get("boxes"), mask)
            decoded = model.mask_decoder.predict_masks(
                embedding, model.prompt_encoder.get_dense_pe(), sparse, dense
            )
            results[f"{name}: sparse prompt"] = sparse.numpy()
            results[f"{name}: dense prompt"] = dense.numpy().transpose(0, 2, 3, 1)
            results[f"{name}: low-res logits"] = decoded[0].numpy()
            results[f"{name}: predicted IoU"] = decoded[1].numpy()
    return results


def _run_ours(
    config: SamConfig, params: Params, image: np.ndarray, prompts: dict[str, dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    frame = np.zeros((1, *config.image_size, 3), np.float32)
    frame[0, : image.shape[0], : image.shape[1]] = image

    with jax.default_matmul_precision("highest"):
        encoded = _encode(config, params, frame, jnp.array([image.shape[:2]], jnp.int32))
        results = {name: np.asarray(stage) for name, stage in encoded.items()}
        for name, given in prompts.items():
            coords, labels = merge_prompts(
                given.get("points"), given.get("labels"), given.get("boxes")
            )
            mask = given["mask"][..., None] if "mask" in given else None
            prompt, decoded = _decode(
                config, params, encoded["image embedding"], coords, labels, mask
            )
            results[f"{name}: sparse prompt"] = np.asarray(prompt.sparse)
            results[f"{name}: dense prompt"] = np.asarray(prompt.dense)
            results[f"{name}: low-res logits"] = np.asarray(decoded.low_res_logits)
            results[f"{name}: predicted IoU"] = np.asarray(decoded.iou)
    return results


@functools.partial(jax.jit, static_argnums=0)
def _encode(
    config: SamConfig, params: Params, frame: jax.Array, sizes: jax.Array
) -> dict[str, jax.Array]:
    """Every stage of the image encoder, by its name."""
    model = bind(config, params)
    encoder, found = model.image_encoder, {}
    pixels = normalise_pixels(config, frame, sizes)
    found["patch embedding"] = encoder.patch_embed(pixels)
    x = encoder.embed_patches(pixels)
    for index, block in enumerate(encoder.blocks):
        x = found[f"block {index}"] = block(x)
    found["image embedding"] = encoder.neck(x)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _decode(
    config: SamConfig,
    params: Params,
    embedding: jax.Array,
    coords: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None,
) -> tuple[EncodedPrompt, MaskPrediction]:
    model = bind(config, params)
    prompt = model.encode_prompt(coords, labels, mask)
    return prompt, model.decode(embedding, prompt)
