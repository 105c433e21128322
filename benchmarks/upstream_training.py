"""A training step of Meta's modules in PyTorch, with PEFT's LoRA or galore-torch's AdamW.

What the benchmarks of our own step compare with: the same model, batch, loss (Dice + CE of the
single mask, without a prompt) and trained parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from convert import reference
from samjax.models.sam2_config import Sam2Config
from samjax.models.weights import Config

_BLOCK = r"image_encoder\.(trunk\.)?blocks\.\d+\."
_ENCODER_MATRIX = _BLOCK + r"(attn\.(qkv|proj)|mlp\.(lin[12]|layers\.[01]))\.weight"
_DECODER_MATRIX = r"(sam_)?mask_decoder\.transformer\..*(_proj|lin[12]|layers\.[01])\.weight"
_NOT_REACHED = (
    r"pe_layer|point_embeddings|not_a_point|mask_downscaling|iou_prediction_head|pred_obj_score"
    r"|output_hypernetworks_mlps\.[1-9]|memory|maskmem|obj_ptr|no_mem_pos|no_obj|mask_downsample"
)


def make_step(
    config: Config, method: str, rank: int, batch: dict[str, np.ndarray], *, device: str, half: bool
) -> tuple[Any, Callable[[], float]]:
    """(the model, a function that makes one step and returns its loss); ``half``: autocast."""
    import torch
    from torch.nn import functional

    torch.manual_seed(0)
    sam2 = isinstance(config, Sam2Config)
    build = reference.build_reference_sam2 if sam2 else reference.build_reference_sam
    model = reference.randomise(build(config), 0).to(device).train()
    optimizer = prepare(model, method, rank)
    mean, std = (np.array(v, np.float32) for v in (config.pixel_mean, config.pixel_std))
    pixels = ((batch["image"] - mean) / std).transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(pixels, np.float32)).to(device)
    target = torch.from_numpy(batch["mask"].astype(np.float32)).to(device)

    def logits() -> Any:
        if sam2:
            levels = model.forward_image(images)["backbone_fpn"]
            embedding = levels[2] + model.no_mem_embed.reshape(1, -1, 1, 1)
            prompts, decoder, high = model.sam_prompt_encoder, model.sam_mask_decoder, levels[:2]
        else:
            embedding = model.image_encoder(images)
            prompts, decoder, high = model.prompt_encoder, model.mask_decoder, None
        sparse, dense = prompts(None, None, None)
        positions = prompts.get_dense_pe()
        found = []
        for i in range(len(images)):  # upstream's decoder takes one image at a time
            one = embedding[i : i + 1], positions, sparse[:1], dense[:1]
            if sam2:
                found.append(decoder.predict_masks(*one, False, [h[i : i + 1] for h in high])[0])
            else:
                found.append(decoder.predict_masks(*one)[0])
        masks = torch.cat(found)[:, :1]
        return functional.interpolate(masks.float(), target.shape[1:], mode="bilinear")[:, 0]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            z = logits()
        p = z.sigmoid()
        both, total = (p * target).sum((1, 2)), p.sum((1, 2)) + target.sum((1, 2))
        dice = 1 - (2 * both + 1) / (total + 1)
        loss = (0.5 * functional.binary_cross_entropy_with_logits(z, target) + 0.5 * dice).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return model, step


def prepare(model: Any, method: str, rank: int) -> Any:
    """Chooses what is trained, as ``samjax.peft.presets`` does, and its optimizer."""
    import torch

    if method.startswith("lora"):
        import peft

        target = _BLOCK.removesuffix(r"\.") + r"\.attn\.qkv"
        peft.inject_adapter_in_model(
            peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=target), model
        )
    plain, projected = [], []
    for name, parameter in model.named_parameters():
        own = re.sub(r"\.base_layer", "", name)
        decoder = re.match(r"(sam_)?(mask_decoder|prompt_encoder)\.", own) is not None
        trained = {
            "full": True,
            "decoder": re.match(r"(sam_)?mask_decoder\.", own) is not None,
            "lora": "lora_" in name,
            "lora+decoder": "lora_" in name or decoder,
            "galore": True,
            "galore+decoder": decoder or re.match(_BLOCK, own) is not None,
        }[method] and not re.search(_NOT_REACHED, own)
        parameter.requires_grad_(trained)
        if trained:
            matrix = re.fullmatch(_ENCODER_MATRIX, own) or (
                method == "galore" and re.fullmatch(_DECODER_MATRIX, own)
            )
            (projected if method.startswith("galore") and matrix else plain).append(parameter)
    if not projected:
        return torch.optim.AdamW(plain, lr=1e-4, weight_decay=0.01)
    options = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": plain}, {"params": projected, **options}]
    return reference.galore_module("adamw").AdamW(
        groups, lr=1e-4, weight_decay=0.01, no_deprecation_warning=True
    )
