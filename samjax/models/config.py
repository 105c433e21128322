"""What the configs of SAM and SAM 2 have in common: prompts, mask decoder, pixels, JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class PromptableConfig:
    """Sizes of prompt encoder and mask decoder; a subclass adds its ``image_encoder``."""

    family: ClassVar[str]  # as a weights file calls it
    encoder: ClassVar[type]  # the class of ``image_encoder``
    fit: ClassVar[Literal["pad", "stretch"]]  # how images fill the frame: ``samjax.frame``

    num_multimask: int = 3  # masks beside the single one; SAMed: the number of classes
    mask_channels: int = 16  # hidden channels of the mask prompt's encoder
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp_width: int = 2048
    iou_head_width: int = 256
    iou_head_depth: int = 3
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB, of values 0..255
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the model frame, in pixels."""
        return self._encoder.image_size

    @property
    def low_res_size(self) -> tuple[int, int]:
        """(height, width) of mask logits and mask prompts: four per cell of the embedding."""
        gh, gw = self._encoder.grid
        return 4 * gh, 4 * gw

    @property
    def mask_tokens(self) -> int:
        """Number of mask tokens: the single mask, then the others."""
        return self.num_multimask + 1

    @property
    def _encoder(self) -> Any:
        return getattr(self, "image_encoder")  # noqa: B009

    def to_dict(self) -> dict:
        """JSON-able; read back by ``from_dict``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Any:
        """Lists become tuples again; an unknown or missing field is a ``TypeError``."""

        def tuples(fields: dict[str, Any]) -> dict[str, Any]:
            return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}

        encoder = cls.encoder(**tuples(values["image_encoder"]))
        return cls(**{**tuples(values), "image_encoder": encoder})
