"""What a SAM 2 checkpoint is, told from the names and shapes of its tensors.

Windows, global blocks, heads and the size of the frame are in no tensor. The first three are taken
from Meta's model of the same width and stages; the frame from the caller.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping
from typing import Any

from convert import shapes as shapes_of
from convert.shapes import Shapes, count_layers, infer_prompting, mlp_ratio, vote
from convert.torch_io import CheckpointError
from samjax.models.hiera import HieraConfig
from samjax.models.sam2_config import ENCODERS, VARIANTS, Sam2Config, sam2

_OTHERS = (
    (r"image_encoder\.(blocks\..*|pos_embed)", "SAM (v1); convert it by: python -m convert.sam"),
    (r"vision_encoder\..*", "Hugging Face's rewriting of SAM 2 (Sam2Model)"),
    (r"w_[ab]_\d+", "a LoRA adapter (SAMed, Sam_LoRA); give it as --adapter"),
    (r"base_model\.model\..*", "a PEFT adapter; give it as --adapter"),
    (r"image_encoder/.*", "a samjax file whose config has been lost"),
)

strip_wrapper = functools.partial(
    shapes_of.strip_wrapper, anchor="image_encoder.trunk.pos_embed_window"
)


def infer_config(
    state_dict: Mapping[str, Any], image_size: tuple[int, int] = (1024, 1024)
) -> Sam2Config:
    """The config of the SAM 2 model that `state_dict` belongs to.

    Args:
        state_dict: {upstream's key: anything with a `shape`}, without a wrapper's prefix.
        image_size: (h, w) of the model frame in pixels.

    Raises:
        CheckpointError: it is not a SAM 2 checkpoint (the message says what it looks like), too
            little of it is there to tell, or its trunk is none of Meta's.
    """
    shapes: Shapes = {name: tuple(leaf.shape) for name, leaf in state_dict.items()}
    _check_is_sam2(shapes)
    # 2.1 has three tensors that 2.0 has not; one of them may be missing, or a stray.
    newer = sum(
        name in shapes
        for name in ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")
    )
    layers = re.compile(r"memory_attention\.layers\.(\d+)\..*")
    return Sam2Config(
        image_encoder=_infer_image_encoder(shapes, image_size),
        pointer_times=newer >= 2,
        occlusion_embedding=newer >= 2,
        memory_width=vote(
            shapes,
            "the channels of a memory",
            (r"maskmem_tpos_enc", 3),
            (r"memory_encoder\.out_proj\.(weight|bias)", 0),
            (r"memory_attention\.layers\.\d+\.cross_attn_image\.[kv]_proj\.weight", 1),
        ),
        memory_depth=count_layers(shapes, layers) or 4,
        memory_mlp_width=vote(
            shapes,
            "the MLP width of the memory attention",
            (r"memory_attention\.layers\.\d+\.linear1\.(weight|bias)", 0),
            (r"memory_attention\.layers\.\d+\.linear2\.weight", 1),
            default=2048,
        ),
        num_memories=vote(shapes, "the number of memories", (r"maskmem_tpos_enc", 0), default=7),
        **infer_prompting(shapes, "sam_"),
    )


def variant_name(config: Sam2Config) -> str:
    """The variant ("sam2.1_hiera_tiny"), whatever its input size; or "custom"."""
    for name, variant in VARIANTS.items():
        known = sam2(*variant, image_size=config.image_size)
        if (known.image_encoder, known.pointer_times) == (
            config.image_encoder,
            config.pointer_times,
        ):
            return name
    return "custom"


def describe(config: Sam2Config) -> str:
    """One line for people, such as "sam2.1_hiera_tiny, image 1024 x 1024, 4 mask tokens"."""
    hiera, name = config.image_encoder, variant_name(config)
    if name == "custom":
        name += f" (width {hiera.width}, stages {hiera.stages})"
    height, width = config.image_size
    return f"{name}, image {height} x {width}, {config.mask_tokens} mask tokens"


def _check_is_sam2(shapes: Shapes) -> None:
    for pattern, what in _OTHERS:
        if any(re.fullmatch(pattern, name) for name in shapes):
            raise CheckpointError(f"not a SAM 2 checkpoint: it looks like {what}")
    parts = ("image_encoder.trunk.", "sam_prompt_encoder.", "sam_mask_decoder.", "memory_")
    absent = [part for part in parts if not any(name.startswith(part) for name in shapes)]
    if len(absent) == len(parts):
        first = ", ".join(list(shapes)[:3])
        raise CheckpointError(
            f"not a SAM 2 checkpoint: none of its tensors is SAM 2's (the first are {first})"
        )
    if absent:
        raise CheckpointError(
            "only a part of a SAM 2 checkpoint: it holds no "
            + " and no ".join(f"{part}*" for part in absent)
        )


def _infer_image_encoder(shapes: Shapes, image_size: tuple[int, int]) -> HieraConfig:
    trunk = r"image_encoder\.trunk\."
    width = vote(
        shapes,
        "the width of the image encoder",
        (trunk + r"patch_embed\.proj\.(weight|bias)", 0),
        (trunk + r"pos_embed(_window)?", 1),
        (trunk + r"blocks\.0\.norm[12]\.(weight|bias)", 0),
    )
    depth = count_layers(shapes, re.compile(trunk + r"blocks\.(\d+)\..*"))
    widths, hidden = [], 0
    for index in range(depth):
        block = trunk + rf"blocks\.{index}\."
        widths.append(
            vote(
                shapes,
                f"the width of block {index}",
                (block + r"norm2\.(weight|bias)", 0),
                (block + r"(attn\.proj|mlp\.layers\.1)\.(weight|bias)", 0),
            )
        )
        hidden = vote(shapes, "the width of an MLP", (block + r"mlp\.layers\.0\.(weight|bias)", 0))
    stages = tuple(len(list(group)) for _, group in itertools.groupby(widths))
    for variant in ENCODERS.values():
        known = HieraConfig(image_size=image_size, **variant)
        if (known.width, known.stages) == (width, stages):
            break
    else:
        listed = ", ".join(
            f"{name} ({(config := HieraConfig(**variant)).width}, {config.stages})"
            for name, variant in ENCODERS.items()
        )
        raise CheckpointError(
            f"a trunk of width {width} with stages {stages}: its windows are in no tensor, and it "
            f"is none of {listed}; give the config in Python: convert.sam2.convert(…, config)"
        )
    table = shapes.get("image_encoder.trunk.pos_embed", ())
    return dataclasses.replace(
        known,
        position_grid=table[2:] if len(table) == 4 else known.position_grid,
        mlp_ratio=mlp_ratio(widths[-1], hidden),
        out_channels=vote(
            shapes,
            "the channels of the image embedding",
            (r"image_encoder\.neck\.convs\.\d+\.conv\.(weight|bias)", 0),
            (r"sam_prompt_encoder\.\w+\.weight", 1),
            (r"no_obj_ptr", 1),
        ),
    )
