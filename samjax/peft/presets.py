"""What each method of fine-tuning trains of SAM or SAM 2, and by which optimizer.

A method is a list of strict rules (``samjax.peft.paths``) that label every parameter ``freeze``,
``adamw`` or ``galore``.  Low-rank factors (``samjax.peft.lora``) are no parameters of the model and
come beside: ``lora`` and ``lora+decoder`` have them.

* ``lora``: factors only, in the parts that its config names.
* ``lora+decoder``: factors in the image encoder; prompt encoder and mask decoder outright, as SAMed
  (arXiv 2304.13785) does.
* ``decoder``: the mask decoder.
* ``full``: everything.
* ``galore``: everything, the matrices of encoder blocks and two-way transformer by GaLore.
* ``galore+decoder``: the encoder's blocks, their matrices by GaLore, and prompt encoder and mask
  decoder; patch embedding, positions and neck stay, as in MedSAGa (Annie2603/MedSAGa).
"""

from __future__ import annotations

from typing import Any

import jax
import optax

from samjax.peft.paths import FREEZE, label_by_path

ADAMW, GALORE = "adamw", "galore"

MASK_HEAD = "mask_decoder/(mask_tokens|output_hypernetworks_mlps|iou_prediction_head)/.*"
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
_PROMPTING = ("(prompt_encoder|mask_decoder)/.*", ADAMW)
_REST = (".*", FREEZE)

RULES: dict[str, list[tuple[str, str]]] = {
    "lora": [_REST],
    "lora+decoder": [_STAYS, _PROMPTING, _REST],
    "decoder": [(UNREACHED, FREEZE), ("mask_decoder/.*", ADAMW), _REST],
    "full": [_STAYS, (".*", ADAMW)],
    "galore": [_STAYS, (f"{_MATRICES}|{_DECODER_MATRICES}", GALORE), (".*", ADAMW)],
    "galore+decoder": [_STAYS, (_MATRICES, GALORE), (_BLOCK + ".*", ADAMW), _PROMPTING, _REST],
}
WITH_FACTORS = ("lora", "lora+decoder")


def label_for(params: Any, method: str, *, fresh_head: bool = False) -> Any:
    """A tree like ``params`` (of a SAM or SAM 2) with a label at each leaf.

    A fresh mask head (``mask_tokens`` and what hangs on them) is trained under every method.
    Raises ``ValueError`` for an unknown method.
    """
    if method not in RULES:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(RULES)}")
    head = [(MASK_HEAD, ADAMW)] if fresh_head else []
    return label_by_path(params, [*head, *RULES[method]])


def by_label(
    labels: Any, **transforms: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """``optax.partition`` of the transforms whose label occurs, and nothing for ``freeze``.

    Raises ``ValueError`` naming the labels that have no transform.
    """
    found = set(jax.tree.leaves(labels))
    if missing := sorted(found - {FREEZE, *transforms}):
        raise ValueError(f"no transform for the labels {', '.join(missing)}")
    chosen = {label: transforms[label] for label in sorted(found - {FREEZE})}
    if FREEZE in found:
        chosen[FREEZE] = optax.set_to_zero()
    return optax.partition(chosen, labels)
