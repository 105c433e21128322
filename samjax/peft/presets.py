"""What each method of fine-tuning trains of SAM or SAM 2, and by which optimizer.

A method is a list of rules (``samjax.peft.paths``), of which the first that matches counts.  They
label every parameter ``freeze``, ``adamw`` or ``galore``, or ``still``: fresh, without a gradient.
Low-rank factors (``samjax.peft.lora``) are no parameters of the model and come beside: ``lora`` and
``lora+decoder`` have them.

* ``lora``: factors only, in the parts that its config names.
* ``lora+decoder``: factors in the image encoder; prompt encoder and mask decoder outright, as SAMed
  (arXiv 2304.13785) does.
* ``lora+heads``: factors in both; prompt encoder and mask decoder outright but for the two-way
  transformer, as SAMed's small form (SAMed_s).
* ``decoder``: the mask decoder.
* ``prompting``: prompt encoder and mask decoder.
* ``full``: everything.
* ``galore``: everything, the matrices of encoder blocks and two-way transformer by GaLore.
* ``galore+decoder``: the encoder's blocks, their matrices by GaLore, and prompt encoder and mask
  decoder; patch embedding, positions and neck stay, as in MedSAGa (Annie2603/MedSAGa).
* ``blocks+decoder``: the same parameters, without GaLore; ``blocks``: the encoder's blocks alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import optax

from samjax.peft.paths import FREEZE, in_order, label_by_path

ADAMW, GALORE = "adamw", "galore"
STILL = "still"  # part of what a run adds to its base, but no loss moves it

MASK_HEAD = "mask_decoder/(mask_tokens|output_hypernetworks_mlps|iou_prediction_head)/.*"
_IOU_HEAD = "mask_decoder/iou_prediction_head/.*"
BUFFER = "prompt_encoder/pe_gaussian"  # fixed random features, a buffer upstream
# What the loss of a mask does not reach: without a gradient, weight decay alone would act.
UNREACHED = (
    "prompt_encoder/mask_downscaling/.*"
    "|mask_decoder/(iou_prediction_head|pred_obj_score_head|output_hypernetworks_mlps/[1-9][0-9]*)/.*"
    "|(memory_|mask_downsample/|pointer_|no_memory_pos_|no_object_|occluded_).*"
)
_BLOCK = r"image_encoder/(trunk/)?blocks/\d+/"
_MATRICES = _BLOCK + "(attn/(qkv|proj)|mlp/lin[12])/kernel"
_DECODER_MATRICES = "mask_decoder/transformer/.*(_proj|lin[12])/kernel"

_STAYS = (f"{BUFFER}|{UNREACHED}", FREEZE)
_PROMPTING = ("(prompt_encoder|mask_decoder2?)/.*", ADAMW)  # H-SAM has two decoders
_REST = (".*", FREEZE)

Method = Literal[
    "lora",
    "lora+decoder",
    "lora+heads",
    "decoder",
    "prompting",
    "full",
    "galore",
    "galore+decoder",
    "blocks",
    "blocks+decoder",
]
RULES: dict[str, list[tuple[str, str]]] = {
    "lora": [_REST],
    "lora+decoder": [_STAYS, _PROMPTING, _REST],
    "lora+heads": [_STAYS, ("mask_decoder/transformer/.*", FREEZE), _PROMPTING, _REST],
    "prompting": [_STAYS, _PROMPTING, _REST],
    "decoder": [(UNREACHED, FREEZE), ("mask_decoder/.*", ADAMW), _REST],
    "full": [_STAYS, (".*", ADAMW)],
    "galore": [_STAYS, (f"{_MATRICES}|{_DECODER_MATRICES}", GALORE), (".*", ADAMW)],
    "galore+decoder": [_STAYS, (_MATRICES, GALORE), (_BLOCK + ".*", ADAMW), _PROMPTING, _REST],
    "blocks+decoder": [_STAYS, (_BLOCK + ".*", ADAMW), _PROMPTING, _REST],
    "blocks": [_STAYS, (_BLOCK + ".*", ADAMW), _REST],
}
EVERY_PROMPT = ("points", "negatives", "box")
# Methods with factors, and the parts that have them; empty: those that the user names.
FACTORS_OF: dict[str, tuple[str, ...]] = {
    "lora": (),
    "lora+decoder": ("image_encoder",),
    "lora+heads": ("image_encoder", "mask_decoder"),
}


def label_for(
    params: Any,
    method: str,
    *,
    fresh_head: bool = False,
    prompts: Sequence[str] = EVERY_PROMPT,
) -> Any:
    """A tree like ``params`` (of a SAM or SAM 2) with a label at each leaf.

    A fresh mask head (``mask_tokens`` and what hangs on them) is trained under every method.
    ``prompts`` are those of the training data (``none``, positive ``points``, ``negatives``,
    ``box``, ``points+box``): embeddings of points that never come stay as they are.
    Raises ``ValueError`` for an unknown method.
    """
    if method not in RULES:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(RULES)}")
    head = [(_IOU_HEAD, STILL), (MASK_HEAD, ADAMW)] if fresh_head else []
    given = {part for prompt in prompts for part in prompt.split("+")}
    padded = "points" in prompts or ("box" in given and "memory_attention" in params)  # SAM 2
    absent = {
        "point_embeddings/0": "negatives" not in given,
        "point_embeddings/1": "points" not in given,
        "point_embeddings/[23]": "box" not in given,  # its corners
        "not_a_point_embed": not padded,
    }
    points = [(f"prompt_encoder/{name}/.*", FREEZE) for name, gone in absent.items() if gone]
    return label_by_path(params, in_order([*head, *points, *RULES[method]]))


def by_label(
    labels: Any, **transforms: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """``optax.partition`` of the transforms whose label occurs; ``freeze`` and ``still`` have none.

    Raises ``ValueError`` naming the labels that have no transform.
    """
    found = set(jax.tree.leaves(labels))
    if missing := sorted(found - {FREEZE, STILL, *transforms}):
        raise ValueError(f"no transform for the labels {', '.join(missing)}")
    chosen = {label: transforms.get(label, optax.set_to_zero()) for label in sorted(found)}
    return optax.partition(chosen, labels)
