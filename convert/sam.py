"""SAM (v1) checkpoints of Meta's PyTorch code to samjax and back.

    python -m convert.sam --ckpt sam_vit_b_01ec64.pth --verify
    python -m convert.sam --ckpt sam_vit_b_01ec64.safetensors --to-torch back.pth

Upstream: facebookresearch/segment-anything@dca509f, `build_sam.py` and `modeling/`. The model's
sizes are read from the checkpoint itself (`convert.sam_shapes`), so fine-tuned files with other
numbers of masks or other input sizes convert as well.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert import bridge, command
from convert.command import Loaded
from convert.sam_shapes import describe, infer_config, strip_wrapper, variant_name
from samjax.models.functional import init_params
from samjax.models.sam import VARIANTS, SamConfig
from samjax.trees import Params

if TYPE_CHECKING:
    from samjax.predictor import SamModel

NAMES: bridge.Names = [
    ("image_encoder/patch_embed/{p}", "image_encoder.patch_embed.proj.{p}"),
    ("image_encoder/neck/conv1/{p}", "image_encoder.neck.0.{p}"),
    ("image_encoder/neck/norm1/{p}", "image_encoder.neck.1.{p}"),
    ("image_encoder/neck/conv2/{p}", "image_encoder.neck.2.{p}"),
    ("image_encoder/neck/norm2/{p}", "image_encoder.neck.3.{p}"),
    (
        "prompt_encoder/pe_gaussian",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    ("prompt_encoder/mask_downscaling/conv1/{p}", "prompt_encoder.mask_downscaling.0.{p}"),
    ("prompt_encoder/mask_downscaling/norm1/{p}", "prompt_encoder.mask_downscaling.1.{p}"),
    ("prompt_encoder/mask_downscaling/conv2/{p}", "prompt_encoder.mask_downscaling.3.{p}"),
    ("prompt_encoder/mask_downscaling/norm2/{p}", "prompt_encoder.mask_downscaling.4.{p}"),
    ("prompt_encoder/mask_downscaling/conv3/{p}", "prompt_encoder.mask_downscaling.6.{p}"),
    ("mask_decoder/output_upscaling/deconv1/{p}", "mask_decoder.output_upscaling.0.{p}"),
    ("mask_decoder/output_upscaling/norm/{p}", "mask_decoder.output_upscaling.1.{p}"),
    ("mask_decoder/output_upscaling/deconv2/{p}", "mask_decoder.output_upscaling.3.{p}"),
    ("{p}", "{p}"),
]

LEAVES: bridge.Leaves = [
    ("deconv*/kernel", "weight", "i o h w -> h w o i"),
    ("kernel", "weight", "o i h w -> h w i o"),
    ("kernel", "weight", "o i -> i o"),
    ("embedding", "weight", "n c -> n c"),
    ("scale", "weight", "c -> c"),
    ("bias", "bias", "c -> c"),
    ("pos_embed", "pos_embed", "b h w c -> b h w c"),
    ("rel_pos_[hw]", "*", "s c -> s c"),
    ("pe_gaussian", "pe_gaussian", "d c -> d c"),
]


def _verify(config: SamConfig, params: Params, image: Path | None) -> Any:
    from convert.sam_verify import verify

    return verify(config, params, image)


FAMILY = command.Family(
    command="convert.sam",
    config=SamConfig,
    mark="image_encoder.blocks.",
    names=NAMES,
    leaves=LEAVES,
    variants=tuple(VARIANTS),
    infer_config=infer_config,
    strip_wrapper=strip_wrapper,
    variant_name=variant_name,
    describe=describe,
    key=None,
    suffix=".pth",
    verify=_verify,
)
convert, to_torch = FAMILY.convert, FAMILY.to_torch


def load(path: str | Path, variant: str | None = None, key: str | None = None) -> Loaded:
    """`convert.command.load` for SAM."""
    return command.load((FAMILY,), path, variant, key)


def _build(variant: str, checkpoint: str | Path | None = None) -> SamModel:
    if checkpoint is None:
        config = VARIANTS[variant]()
        params = init_params(config)
    else:
        loaded = load(checkpoint, variant)
        config, params = loaded.config, loaded.params
    from samjax.predictor import SamModel

    return SamModel(config, params)


sam_model_registry: dict[str, Callable[..., SamModel]] = {
    "default": functools.partial(_build, "vit_h"),
    **{name: functools.partial(_build, name) for name in ("vit_h", "vit_l", "vit_b")},
}
"""As upstream's: `sam_model_registry["vit_b"](checkpoint=path)`, for a `.pth` or a converted file.
Without a checkpoint the model is randomly initialised."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 1 after an error, when nothing was written."""
    return command.main((FAMILY,), argv)


if __name__ == "__main__":
    sys.exit(main())
