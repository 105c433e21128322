"""The sizes of SAM 2 and 2.1, and Meta's eight models.

Paper: Ravi et al., "SAM 2: Segment Anything in Images and Videos" (arXiv 2408.00714).  Upstream:
facebookresearch/sam2@2b90b9f, ``sam2/configs/``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from flax import nnx
from jax.typing import DTypeLike

from samjax.models.config import PromptableConfig
from samjax.models.hiera import HieraConfig
from samjax.models.layers import Remat


@dataclass(frozen=True, kw_only=True)
class Sam2Config(PromptableConfig):
    """Everything that fixes the shape of a SAM 2 model; defaults: 2.1's ``hiera_base_plus``."""

    family: ClassVar[str] = "sam2"
    encoder: ClassVar[type] = HieraConfig
    fit: ClassVar = "stretch"

    image_encoder: HieraConfig = field(default_factory=HieraConfig)
    pointer_times: bool = True  # 2.1: object pointers carry their distance in time
    occlusion_embedding: bool = True  # 2.1: memories of frames without the object are marked
    memory_width: int = 64  # channels of a spatial memory
    memory_depth: int = 4  # layers of the memory attention
    memory_mlp_width: int = 2048
    num_memories: int = 7  # spatial memories of a frame: a conditioning frame and the last six
    num_pointers: int = 16  # object pointers of a frame, at most (conditioning frames not counted)

    def build(self, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs) -> nnx.Module:
        """The module; called abstractly by ``samjax.models.functional``."""
        from samjax.models.sam2 import Sam2

        return Sam2(self, dtype=dtype, remat=remat, rngs=rngs)


ENCODERS: dict[str, dict[str, Any]] = {
    "hiera_tiny": {
        "width": 96,
        "heads": 1,
        "stages": (1, 2, 7, 2),
        "global_blocks": (5, 7, 9),
        "position_grid": (7, 7),
    },
    "hiera_small": {
        "width": 96,
        "heads": 1,
        "stages": (1, 2, 11, 2),
        "global_blocks": (7, 10, 13),
        "position_grid": (7, 7),
    },
    "hiera_base_plus": {},
    "hiera_large": {
        "width": 144,
        "heads": 2,
        "stages": (2, 6, 36, 4),
        "global_blocks": (23, 33, 43),
        "position_grid": (7, 7),
        "windows": (8, 4, 16, 8),
    },
}


def sam2(
    encoder: str, version: str = "2.1", image_size: tuple[int, int] = (1024, 1024)
) -> Sam2Config:
    """A model of Meta's: ``encoder`` of ``ENCODERS``, ``version`` "2.0" or "2.1"."""
    if encoder not in ENCODERS or version not in ("2.0", "2.1"):
        known = ", ".join(ENCODERS)
        raise ValueError(f"SAM {version} with {encoder!r}: there are {known}, as 2.0 and 2.1")
    newer = version == "2.1"
    return Sam2Config(
        image_encoder=HieraConfig(image_size=image_size, **ENCODERS[encoder]),
        pointer_times=newer,
        occlusion_embedding=newer,
    )


VARIANTS = {
    f"{prefix}_{encoder}": (encoder, version)
    for prefix, version in (("sam2", "2.0"), ("sam2.1", "2.1"))
    for encoder in ENCODERS
}
"""{name as in Meta's files: arguments of ``sam2``}."""
