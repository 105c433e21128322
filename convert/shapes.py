"""How sizes are read off the tensors of a checkpoint, whatever its family.

Most sizes appear in several tensors; the value that most of them agree on is taken, so that a
checkpoint with a missing or mis-shaped tensor is still recognised, and the bridge can then name
that tensor.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import Any

from convert.torch_io import CheckpointError

Shapes = dict[str, tuple[int, ...]]

_LAYER_SHARE = 0.5
"""A block with fewer of its tensors than this share is a stray, not a layer of the model."""


def strip_wrapper(state_dict: Mapping[str, Any], anchor: str) -> tuple[str, dict[str, Any]]:
    """Take off a prefix that a wrapper such as a Lightning module put before every key.

    `anchor` is a key that every checkpoint of the family has, and once. Returns (prefix, state
    dict); the prefix is "" where there is none.
    """
    names = [name for name in state_dict if name.endswith(anchor)]
    prefix = names[0].removesuffix(anchor) if len(names) == 1 else ""
    if not all(name.startswith(prefix) for name in state_dict):
        prefix = ""
    return prefix, {name.removeprefix(prefix): leaf for name, leaf in state_dict.items()}


def mlp_ratio(width: int, hidden: int) -> float:
    """The ratio from which the model gets `hidden` back by `int(width * ratio)`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def infer_prompting(shapes: Shapes, prefix: str = "") -> dict[str, Any]:
    """Sizes of prompt encoder and mask decoder, as fields of the config.

    What is wholly absent gets upstream's size, and the bridge then lists it as missing. Not visible
    in any shape and taken as upstream's: the decoder's 8 heads.
    """
    decoder, prompts = rf"{prefix}mask_decoder\.", rf"{prefix}prompt_encoder\."
    first, second = r"mlp\.(lin1|layers\.0)\.", r"mlp\.(lin2|layers\.1)\."
    heads = re.compile(decoder + r"output_hypernetworks_mlps\.(\d+)\..*")
    iou = re.compile(decoder + r"iou_prediction_head\.layers\.(\d+)\..*")
    iou_depth = count_layers(shapes, iou) or 3
    masks = vote(
        shapes,
        "the number of masks",
        (decoder + r"mask_tokens\.weight", 0),
        (decoder + rf"iou_prediction_head\.layers\.{iou_depth - 1}\.(weight|bias)", 0),
        extra=[count for count in [count_layers(shapes, heads)] if count],
        default=4,
    )
    layers = re.compile(decoder + r"transformer\.layers\.(\d+)\..*")
    return {
        "num_multimask": masks - 1,
        "mask_channels": vote(
            shapes,
            "the channels of the mask prompt",
            (prompts + r"mask_downscaling\.[34]\.(weight|bias)", 0),
            (prompts + r"mask_downscaling\.6\.weight", 1),
            default=16,
        ),
        "decoder_depth": count_layers(shapes, layers) or 2,
        "decoder_mlp_width": vote(
            shapes,
            "the MLP width of the decoder",
            (decoder + r"transformer\.layers\.\d+\." + first + r"(weight|bias)", 0),
            (decoder + r"transformer\.layers\.\d+\." + second + r"weight", 1),
            default=2048,
        ),
        "iou_head_width": vote(
            shapes,
            "the width of the IoU head",
            (decoder + r"iou_prediction_head\.layers\.0\.(weight|bias)", 0),
            (decoder + r"iou_prediction_head\.layers\.1\.weight", 1),
            default=256,
        ),
        "iou_head_depth": iou_depth,
    }


def vote(
    shapes: Shapes,
    what: str,
    *places: tuple[str, int],
    extra: list[int] | None = None,
    default: int | None = None,
) -> int:
    """The length that most tensors have: `places` are (regex on the name, axis)."""
    ballots = collections.Counter(extra or [])
    for pattern, axis in places:
        for name, shape in shapes.items():
            if len(shape) > axis and re.fullmatch(pattern, name):
                ballots[shape[axis]] += 1
    if ballots:
        return ballots.most_common(1)[0][0]
    if default is None:
        raise CheckpointError(f"cannot tell {what}: none of the tensors that show it is there")
    return default


def count_layers(shapes: Shapes, pattern: re.Pattern[str]) -> int:
    """One more than the highest index, leaving out indices with few of a layer's tensors."""
    tensors = collections.Counter(int(m.group(1)) for m in map(pattern.fullmatch, shapes) if m)
    enough = _LAYER_SHARE * max(tensors.values(), default=0)
    return 1 + max((index for index, count in tensors.items() if count >= enough), default=-1)
