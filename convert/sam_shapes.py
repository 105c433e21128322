"""What a SAM (v1) checkpoint is, told from the names and shapes of its tensors alone."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from convert import shapes as shapes_of
from convert.shapes import Shapes, count_layers, infer_prompting, mlp_ratio, vote
from convert.torch_io import CheckpointError
from samjax.models.sam import VARIANTS, SamConfig
from samjax.models.vit import ViTConfig

_SAM2 = "SAM 2; convert it by: python -m convert.sam2"
_OTHERS = (
    (r"(sam_mask_decoder\.|sam_prompt_encoder\.|image_encoder\.trunk\.|memory_).*", _SAM2),
    (r"image_encoder\.patch_embed\.seq\..*", "MobileSAM (its image encoder is a TinyViT)"),
    (r"mask_decoder\.hf_token\.weight", "HQ-SAM"),
    (r"vision_encoder\..*", "Hugging Face's rewriting of SAM (SamModel)"),
    (r"w_[ab]_\d+", "a LoRA adapter (SAMed, Sam_LoRA); give it as --adapter"),
    (r"base_model\.model\..*", "a PEFT adapter; give it as --adapter"),
    (r"image_encoder/.*", "a samjax file whose config has been lost"),
)


strip_wrapper = functools.partial(shapes_of.strip_wrapper, anchor="image_encoder.pos_embed")


def infer_config(state_dict: Mapping[str, Any]) -> SamConfig:
    """The config of the SAM model that `state_dict` belongs to.

    Args:
        state_dict: {upstream's key: anything with a `shape`}, without a wrapper's prefix.

    Recognised: width, depth, heads, MLP width, window, global blocks, image and patch size of the
    image encoder, channels, mask tokens (SAMed: one a class, and one), depths and widths of the
    decoder. Not visible in any shape and taken as upstream's: the decoder's 8 heads.

    Raises:
        CheckpointError: it is not a SAM checkpoint (the message says what it looks like), or too
            little of it is there to tell.
    """
    found: Shapes = {name: tuple(leaf.shape) for name, leaf in state_dict.items()}
    _check_is_sam(found)
    return SamConfig(image_encoder=_infer_image_encoder(found), **infer_prompting(found))


def variant_name(config: SamConfig) -> str:
    """The variant whose image encoder this is ("vit_b"), whatever its input size; or "custom"."""
    vit = _without_image_size(config.image_encoder)
    for name, variant in VARIANTS.items():
        if vit == _without_image_size(variant().image_encoder):
            return name
    return "custom"


def _without_image_size(vit: ViTConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(vit).items() if name != "image_size"}


def describe(config: SamConfig) -> str:
    """One line for people, such as "vit_b, image 1024 x 1024, 4 mask tokens"."""
    vit, name = config.image_encoder, variant_name(config)
    if name == "custom":
        name += f" (width {vit.width}, depth {vit.depth}, heads {vit.heads})"
    height, width = config.image_size
    return f"{name}, image {height} x {width}, {config.mask_tokens} mask tokens"


def _check_is_sam(shapes: Shapes) -> None:
    for pattern, what in _OTHERS:
        if any(re.fullmatch(pattern, name) for name in shapes):
            raise CheckpointError(f"not a SAM (v1) checkpoint: it looks like {what}")
    parts = ("image_encoder.blocks.", "prompt_encoder.", "mask_decoder.")
    absent = [part for part in parts if not any(name.startswith(part) for name in shapes)]
    if len(absent) == len(parts):
        first = ", ".join(list(shapes)[:3])
        raise CheckpointError(
            f"not a SAM (v1) checkpoint: none of its tensors is SAM's (the first are {first})"
        )
    if absent:
        raise CheckpointError(
            "only a part of a SAM checkpoint: it holds no "
            + " and no ".join(f"{part}*" for part in absent)
        )


def _infer_image_encoder(shapes: Shapes) -> ViTConfig:
    block = r"image_encoder\.blocks\.\d+\."
    width = vote(
        shapes,
        "the width of the image encoder",
        (block + r"norm[12]\.(weight|bias)", 0),
        (block + r"(attn\.proj|mlp\.lin2)\.bias", 0),
        (r"image_encoder\.patch_embed\.proj\.bias", 0),
    )
    head_dim = vote(shapes, "the width of a head", (block + r"attn\.rel_pos_[hw]", 1))
    hidden = vote(shapes, "the width of an MLP", (block + r"mlp\.lin1\.(weight|bias)", 0))
    patch = vote(
        shapes,
        "the patch size",
        (r"image_encoder\.patch_embed\.proj\.weight", 2),
        (r"image_encoder\.patch_embed\.proj\.weight", 3),
        default=16,
    )
    depth = count_layers(shapes, re.compile(r"image_encoder\.blocks\.(\d+)\..*"))
    if width % head_dim:
        raise CheckpointError(f"a width of {width} is not a multiple of the head's, {head_dim}")
    heads = width // head_dim
    grid, window, global_blocks = _infer_windows(shapes, depth, (width, heads))
    return ViTConfig(
        image_size=(grid[0] * patch, grid[1] * patch),
        patch_size=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio(width, hidden),
        window=window,
        global_blocks=global_blocks,
        out_channels=vote(
            shapes,
            "the channels of the image embedding",
            (r"image_encoder\.neck\.\d\.(weight|bias)", 0),
            (r"prompt_encoder\.\w+\.weight", 1),
            (r"mask_decoder\.transformer\.layers\.\d+\.norm\d\.(weight|bias)", 0),
        ),
    )


def _infer_windows(
    shapes: Shapes, depth: int, size: tuple[int, int]
) -> tuple[tuple[int, int], int, tuple[int, ...]]:
    """(grid, window, global blocks), from the position embedding and each block's tables.

    A table of 2 n - 1 rows belongs to an attention over n tokens along that axis: the window's
    side, or the grid's in a global block.
    """
    sides = []  # of each block: tokens along height and width, None where the table is missing
    for index in range(depth):
        names = [f"image_encoder.blocks.{index}.attn.rel_pos_{axis}" for axis in "hw"]
        sides.append([(shapes[name][0] + 1) // 2 if name in shapes else None for name in names])
    embedded = shapes.get("image_encoder.pos_embed", ())
    tabled = [tuple(pair) for pair in sides if None not in pair]
    if not tabled:
        raise CheckpointError("cannot tell the window: no block has relative positions")
    if len(embedded) == 4 and (embedded[1:3] in tabled or len(set(tabled)) == 1):
        grid = embedded[1], embedded[2]
    else:
        grid = max(set(tabled), key=lambda pair: pair[0] * pair[1])
    others = [side for pair in tabled if pair != grid for side in pair]
    if others:
        window = collections.Counter(others).most_common(1)[0][0]
        is_global = [_is_global(pair, grid, window) for pair in sides]
        return grid, window, tuple(index for index, yes in enumerate(is_global) if yes)
    # Every block sees the whole grid; where the grid is as large as the window, that is also what
    # a windowed block of a named variant does.
    if grid[0] == grid[1]:
        for variant in VARIANTS.values():
            known = variant().image_encoder
            if size == (known.width, known.heads) and grid[0] == known.window:
                return grid, known.window, known.global_blocks
    return grid, ViTConfig().window, tuple(range(depth))


def _is_global(pair: list[int | None], grid: tuple[int, int], window: int) -> bool:
    """By majority of the block's two tables; a table that fits neither has no vote."""
    votes = [
        (side == cells) - (side == window)
        for side, cells in zip(pair, grid, strict=True)
        if side is not None and cells != window
    ]
    return sum(votes) > 0
