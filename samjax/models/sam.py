"""Segment Anything (SAM v1): configuration, assembly, forward pass.

Paper: Kirillov et al., arXiv 2304.02643.  Upstream: facebookresearch/segment-anything@dca509f,
``segment_anything/modeling/sam.py`` and ``build_sam.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from samjax.models.config import PromptableConfig
from samjax.models.layers import Remat
from samjax.models.mask_decoder import MaskDecoder, MaskPrediction
from samjax.models.ops import normalise_pixels
from samjax.models.prompt_encoder import EncodedPrompt, PromptEncoder
from samjax.models.vit import ImageEncoder, ViTConfig


@dataclass(frozen=True, kw_only=True)
class SamConfig(PromptableConfig):
    """Everything that fixes the shape of a SAM model; the defaults are ``vit_b``'s."""

    family: ClassVar[str] = "sam"
    encoder: ClassVar[type] = ViTConfig
    fit: ClassVar = "pad"

    image_encoder: ViTConfig = field(default_factory=ViTConfig)

    def build(self, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs) -> Sam:
        """The module; called abstractly by ``samjax.models.functional``."""
        return Sam(self, dtype=dtype, remat=remat, rngs=rngs)


def vit_b(image_size: tuple[int, int] = (1024, 1024)) -> SamConfig:
    """SAM ViT-B, 93.7 M parameters at 1024²."""
    return SamConfig(image_encoder=ViTConfig(image_size=image_size))


def vit_l(image_size: tuple[int, int] = (1024, 1024)) -> SamConfig:
    """SAM ViT-L, 312.3 M parameters at 1024²."""
    return SamConfig(
        image_encoder=ViTConfig(
            image_size=image_size, width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)
        )
    )


def vit_h(image_size: tuple[int, int] = (1024, 1024)) -> SamConfig:
    """SAM ViT-H, 641.1 M parameters at 1024²."""
    return SamConfig(
        image_encoder=ViTConfig(
            image_size=image_size, width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)
        )
    )


def vit_xs(image_size: tuple[int, int] = (256, 256)) -> SamConfig:
    """A small SAM of our own (0.98 M parameters): demonstrations, tests, a first run on CPU."""
    return SamConfig(
        image_encoder=ViTConfig(
            image_size=image_size,
            patch_size=16,
            width=96,
            depth=6,
            heads=2,
            window=8,
            global_blocks=(2, 5),
            out_channels=64,
        ),
        decoder_mlp_width=128,
        iou_head_width=64,
    )


VARIANTS = {"vit_b": vit_b, "vit_l": vit_l, "vit_h": vit_h, "vit_xs": vit_xs}


class Sam(nnx.Module):
    """Image encoder, prompt encoder and mask decoder."""

    def __init__(self, config: SamConfig, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs):
        vit = config.image_encoder
        self.image_encoder = ImageEncoder(vit, dtype=dtype, remat=remat, rngs=rngs)
        self.prompt_encoder = PromptEncoder(
            vit.out_channels, vit.grid, vit.image_size, config.mask_channels, dtype=dtype, rngs=rngs
        )
        self.mask_decoder = MaskDecoder(
            vit.out_channels,
            config.mask_tokens,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            mlp_width=config.decoder_mlp_width,
            iou_head_width=config.iou_head_width,
            iou_head_depth=config.iou_head_depth,
            dtype=dtype,
            rngs=rngs,
        )
        self.config = config

    def encode_image(
        self, images: Num[Array, "b h w 3"], sizes: Int[Array, "b 2"]
    ) -> Float[Array, "b gh gw c"]:
        """Images of 0..255 RGB in the model frame, and their unpadded (height, width) in it."""
        return self.image_encoder(normalise_pixels(self.config, images, sizes))

    def encode_prompt(
        self,
        coords: Float[Array, "b p 2"],
        labels: Int[Array, "b p"],
        mask_logits: Float[Array, "b h4 w4 1"] | None = None,
    ) -> EncodedPrompt:
        """See ``PromptEncoder``; coordinates in pixels of the model frame."""
        return self.prompt_encoder(coords, labels, mask_logits)

    def decode(
        self, image_embedding: Float[Array, "b gh gw c"], prompt: EncodedPrompt
    ) -> MaskPrediction:
        """One prompt per embedding; repeat the embedding for several prompts of one image."""
        return self.mask_decoder(image_embedding, self.prompt_encoder.image_positions(), prompt)

    def __call__(
        self,
        images: Num[Array, "b h w 3"],
        sizes: Int[Array, "b 2"],
        coords: Float[Array, "b p 2"],
        labels: Int[Array, "b p"],
    ) -> MaskPrediction:
        """The whole model on a batch: image i with prompt i."""
        return self.answer(self.encode_image(images, sizes), coords, labels)

    def answer(
        self,
        features: Float[Array, "b gh gw c"],
        coords: Float[Array, "b p 2"],
        labels: Int[Array, "b p"],
    ) -> MaskPrediction:
        """What ``__call__`` makes of ``encode_image``'s output."""
        return self.decode(features, self.encode_prompt(coords, labels))
