"""Segment Anything in JAX and Flax NNX, for fine-tuning on medical images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from samjax.models.functional import bind, init_params
    from samjax.models.sam import SamConfig, vit_b, vit_h, vit_l, vit_xs
    from samjax.models.sam2_config import Sam2Config
    from samjax.models.weights import load_weights, resize_params, save_weights
    from samjax.peft.adapter_files import read_adapter, write_adapter
    from samjax.peft.lora import Adapter, LoraConfig, merge
    from samjax.predictor import SAM2ImagePredictor, SamModel, SamPredictor
    from samjax.video import SAM2VideoPredictor

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "LoraConfig",
    "SAM2ImagePredictor",
    "SAM2VideoPredictor",
    "Sam2Config",
    "SamConfig",
    "SamModel",
    "SamPredictor",
    "bind",
    "init_params",
    "load_weights",
    "merge",
    "read_adapter",
    "resize_params",
    "save_weights",
    "vit_b",
    "vit_h",
    "vit_l",
    "vit_xs",
    "write_adapter",
]

_HOME = {
    "samjax.models.functional": ("bind", "init_params"),
    "samjax.models.sam": ("SamConfig", "vit_b", "vit_h", "vit_l", "vit_xs"),
    "samjax.models.sam2_config": ("Sam2Config",),
    "samjax.models.weights": ("load_weights", "resize_params", "save_weights"),
    "samjax.peft.adapter_files": ("read_adapter", "write_adapter"),
    "samjax.peft.lora": ("Adapter", "LoraConfig", "merge"),
    "samjax.predictor": ("SAM2ImagePredictor", "SamModel", "SamPredictor"),
    "samjax.video": ("SAM2VideoPredictor",),
}


def __getattr__(name: str) -> Any:
    # On first use, so that the data room's worker processes do not load the models.
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'samjax' has no attribute {name!r}")
