"""SAM 2 and 2.1 checkpoints of Meta's PyTorch code to samjax and back.

    python -m convert.sam2 --ckpt sam2.1_hiera_base_plus.pt --verify
    python -m convert.sam2 --ckpt facebook/sam2.1-hiera-tiny
    python -m convert.sam2 --ckpt sam2.1_hiera_base_plus.safetensors --to-torch back.pt

Upstream: facebookresearch/sam2@2b90b9f, `sam2/build_sam.py` and `sam2/modeling/`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from convert import bridge, command
from convert.command import Loaded
from convert.sam2_shapes import describe, infer_config, strip_wrapper, variant_name
from samjax.models.sam2_config import VARIANTS, Sam2Config
from samjax.trees import Params

NAMES: bridge.Names = [
    ("image_encoder/trunk/patch_embed/{p}", "image_encoder.trunk.patch_embed.proj.{p}"),
    ("image_encoder/neck/convs/{i}/{p}", "image_encoder.neck.convs.{i}.conv.{p}"),
    ("image_encoder/{b}/mlp/lin1/{p}", "image_encoder.{b}.mlp.layers.0.{p}"),
    ("image_encoder/{b}/mlp/lin2/{p}", "image_encoder.{b}.mlp.layers.1.{p}"),
    (
        "prompt_encoder/pe_gaussian",
        "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    ("prompt_encoder/mask_downscaling/conv1/{p}", "sam_prompt_encoder.mask_downscaling.0.{p}"),
    ("prompt_encoder/mask_downscaling/norm1/{p}", "sam_prompt_encoder.mask_downscaling.1.{p}"),
    ("prompt_encoder/mask_downscaling/conv2/{p}", "sam_prompt_encoder.mask_downscaling.3.{p}"),
    ("prompt_encoder/mask_downscaling/norm2/{p}", "sam_prompt_encoder.mask_downscaling.4.{p}"),
    ("prompt_encoder/mask_downscaling/conv3/{p}", "sam_prompt_encoder.mask_downscaling.6.{p}"),
    ("prompt_encoder/{p}", "sam_prompt_encoder.{p}"),
    ("mask_decoder/output_upscaling/deconv1/{p}", "sam_mask_decoder.output_upscaling.0.{p}"),
    ("mask_decoder/output_upscaling/norm/{p}", "sam_mask_decoder.output_upscaling.1.{p}"),
    ("mask_decoder/output_upscaling/deconv2/{p}", "sam_mask_decoder.output_upscaling.3.{p}"),
    ("mask_decoder/{b}/mlp/lin1/{p}", "sam_mask_decoder.{b}.mlp.layers.0.{p}"),
    ("mask_decoder/{b}/mlp/lin2/{p}", "sam_mask_decoder.{b}.mlp.layers.1.{p}"),
    ("mask_decoder/{p}", "sam_mask_decoder.{p}"),
    *(
        pair
        for i in range(4)
        for pair in (
            (
                f"memory_encoder/mask_downsampler/convs/{i}/{{p}}",
                f"memory_encoder.mask_downsampler.encoder.{3 * i}.{{p}}",
            ),
            (
                f"memory_encoder/mask_downsampler/norms/{i}/{{p}}",
                f"memory_encoder.mask_downsampler.encoder.{3 * i + 1}.{{p}}",
            ),
        )
    ),
    (
        "memory_encoder/mask_downsampler/out/{p}",
        "memory_encoder.mask_downsampler.encoder.12.{p}",
    ),
    ("memory_encoder/fuser/{p}", "memory_encoder.fuser.layers.{p}"),
    ("memory_time_embed", "maskmem_tpos_enc"),
    ("no_memory_embed", "no_mem_embed"),
    ("no_memory_pos_embed", "no_mem_pos_enc"),
    ("no_object_embed", "no_obj_ptr"),
    ("occluded_embed", "no_obj_embed_spatial"),
    ("pointer_proj/{p}", "obj_ptr_proj.{p}"),
    ("pointer_time_proj/{p}", "obj_ptr_tpos_proj.{p}"),
    ("{p}", "{p}"),
]

LEAVES: bridge.Leaves = [
    ("deconv*/kernel", "weight", "i o h w -> h w o i"),
    ("kernel", "weight", "o i h w -> h w i o"),
    ("kernel", "weight", "o i -> i o"),
    ("embedding", "weight", "n c -> n c"),
    ("scale", "weight", "c -> c"),
    ("bias", "bias", "c -> c"),
    ("pos_embed*", "*", "b c h w -> b h w c"),
    ("*", "*", "..."),
]


def _verify(config: Sam2Config, params: Params, image: Path | None) -> Any:
    from convert.sam2_verify import verify

    return verify(config, params, image)


FAMILY = command.Family(
    command="convert.sam2",
    config=Sam2Config,
    mark="image_encoder.trunk.",
    names=NAMES,
    leaves=LEAVES,
    variants=tuple(VARIANTS),
    infer_config=infer_config,
    strip_wrapper=strip_wrapper,
    variant_name=variant_name,
    describe=describe,
    key="model",  # as the published files, and as upstream's builder reads them
    suffix=".pt",
    verify=_verify,
)
convert, to_torch = FAMILY.convert, FAMILY.to_torch


def load(path: str | Path, variant: str | None = None, key: str | None = None) -> Loaded:
    """`convert.command.load` for SAM 2."""
    return command.load((FAMILY,), path, variant, key)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 1 after an error, when nothing was written."""
    return command.main((FAMILY,), argv)


if __name__ == "__main__":
    sys.exit(main())
