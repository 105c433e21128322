"""Run upstream's SAM and ours with the same weights on one image, and compare stage by stage.

Both get the same normalised pixels and the same prompts: two points (upstream adds its padding
point), and a box with a mask. The measure is the largest absolute difference over the standard
deviation of upstream's result, in float32 with exact matrix products.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from convert.reference import build_reference_sam
from convert.sam import to_torch
from convert.torch_io import import_torch
from samjax.models.functional import bind
from samjax.models.mask_decoder import MaskPrediction
from samjax.models.prompt_encoder import EncodedPrompt, merge_prompts
from samjax.models.sam import SamConfig
from samjax.predictor.sam import ResizeToFrame
from samjax.trees import Params

TOLERANCE = 1e-4
"""Largest difference allowed, in standard deviations; torch against itself in float64: 4e-6."""


class VerificationError(ValueError):
    """The two models do not agree."""


@dataclass(frozen=True)
class Stage:
    """How far the two models are apart after one stage.

    Attributes:
        difference: largest absolute difference.
        deviation: standard deviation of upstream's result.
    """

    name: str
    difference: float
    deviation: float

    @property
    def relative(self) -> float:
        """The difference in standard deviations."""
        return self.difference / (self.deviation or 1.0)


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
    stages = compare(config, params, pixels)
    print(f"  {'stage':<28} {'largest difference':>18} {'over the std':>13}")
    for stage in stages:
        print(f"  {stage.name:<28} {stage.difference:>18.2e} {stage.relative:>13.2e}")
    worst = [stage for stage in stages if not stage.relative <= TOLERANCE]
    if worst:
        raise VerificationError(
            f"differs from Meta's model by more than {TOLERANCE:g} of the standard deviation at: "
            + ", ".join(f"{stage.name} ({stage.relative:.1e})" for stage in worst)
        )
    return stages


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
    stages = []
    for name, expected in theirs.items():
        found = ours[name]
        if found.shape != expected.shape:
            raise VerificationError(f"{name}: shape {found.shape}, upstream {expected.shape}")
        difference = np.abs(found.astype(np.float64) - expected).max(initial=0.0)
        stages.append(Stage(name, float(difference), float(expected.astype(np.float64).std())))
    return stages


def example_image(config: SamConfig) -> np.ndarray:
    """A made-up image, always the same: float32 (h, w, 3) of 0..255, narrower than the frame."""
    height, width = config.image_size
    width = max(1, int(0.8 * width))
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / np.float32(max(height, width))
    disc = (x - 0.4) ** 2 + (y - 0.6) ** 2 < 0.04
    channels = np.stack([255 * x, 255 * y, np.where(disc, 220, 60)], axis=-1)
    return np.clip(channels + rng.normal(0, 20, channels.shape), 0, 255).astype(np.float32)


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
        stages = _encode(config, params, frame, jnp.array([image.shape[:2]], jnp.int32))
        results = {name: np.asarray(stage) for name, stage in stages.items()}
        for name, given in prompts.items():
            coords, labels = merge_prompts(
                given.get("points"), given.get("labels"), given.get("boxes")
            )
            mask = given["mask"][..., None] if "mask" in given else None
            prompt, decoded = _decode(
                config, params, stages["image embedding"], coords, labels, mask
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
    encoder, stages = model.image_encoder, {}
    pixels = model.normalise(frame, sizes)
    stages["patch embedding"] = encoder.patch_embed(pixels)
    x = encoder.embed_patches(pixels)
    for index, block in enumerate(encoder.blocks):
        x = stages[f"block {index}"] = block(x)
    stages["image embedding"] = encoder.neck(x)
    return stages


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
