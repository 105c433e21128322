"""DAE-Former, a baseline without prompts: configuration, assembly, forward pass, initialisation.

Paper: Azad et al., "DAE-Former: Dual Attention-guided Efficient Transformer for Medical Image
Segmentation" (arXiv 2212.13504).  Upstream: mindflow-institue/DAEFormer@9460d3a,
``networks/DAEFormer.py`` and ``networks/segformer.py``.

A U-shaped transformer: three stages at a quarter, an eighth and a sixteenth of the frame, and a
decoder that joins each skip connection by cross-attention.  It answers as ``samjax.models.sam.Sam``
does, so that what trains and measures SAM also trains and measures it.

Taken over from upstream, because numbers depend on it:

* the deepest level has no decoder blocks, only the expansion to twice the resolution;
* cross-attention projects neither keys nor queries nor values; its keys and its queries are both
  the skip connection; one LayerNorm serves both inputs; its output is normalised before it is
  added; its Mix-FFN is twice, not four times, as wide inside as outside;
* attention over positions has one head, whatever ``head_count`` is; softmax(Q) and softmax(K) are
  not scaled, and queries are normalised over channels;
* the Mix-FFN is ``MixFFN_skip``: a residual around its depthwise convolution, and a LayerNorm;
* encoder and decoder start differently (``init_as_upstream``).

Differs from upstream: parameters that upstream makes but that no output depends on are left out.
They are the skip path of ``decoder_2`` and two of the three norms of every Mix-FFN, 18,382,864 of
the 48,073,065 parameters for eight classes; 29,690,201 stay.  As they get no gradient, SGD and
AdamW of torch do not touch them either.  The frame may be any rectangle whose sides are multiples
of 16 (upstream: 224 × 224).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from samjax.models.dae_blocks import LAYER_NORM_EPS, CrossBlock, DualBlock, PatchExpand
from samjax.models.functional import abstract_params
from samjax.models.layers import Dense, Remat, conv, layer_norm, with_remat
from samjax.models.mask_decoder import MaskPrediction
from samjax.models.ops import normalise_pixels
from samjax.trees import Params, flatten, unflatten

STRIDE = 16  # pixels per token side in the last stage
PATCHES = ((7, 4, 3), (3, 2, 1), (3, 2, 1))  # kernel, stride and padding before each stage

Features = tuple[
    Float[Array, "b h4 w4 c4"], Float[Array, "b h8 w8 c8"], Float[Array, "b h16 w16 c16"]
]


@dataclass(frozen=True, kw_only=True)
class DaeFormerConfig:
    """Everything that fixes the shape of a DAE-Former; the defaults are upstream's for Synapse.

    Raises ``ValueError`` naming a size that does not divide.
    """

    family: ClassVar[str] = "dae_former"
    fit: ClassVar = "stretch"

    image_size: tuple[int, int] = (224, 224)  # (height, width) of the model frame, in pixels
    num_multimask: int = 8  # foreground classes k; the maps are k + 1, background first
    dims: tuple[int, int, int] = (128, 320, 512)  # channels of the three stages
    depths: tuple[int, int, int] = (2, 2, 2)  # dual blocks of each stage of the encoder
    decoder_depth: int = 2  # dual blocks after each of the two skip connections
    channel_heads: int = 8  # heads of the attention over channels
    # Of values 0..255: ToTensor, then Normalize(0.5, 0.5).
    pixel_mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    pixel_std: tuple[float, float, float] = (127.5, 127.5, 127.5)

    def __post_init__(self):
        if any(side < STRIDE or side % STRIDE for side in self.image_size):
            raise ValueError(f"image_size {self.image_size} is not a multiple of {STRIDE}")
        if any(width % self.channel_heads for width in self.dims):
            raise ValueError(
                f"dims {self.dims} are not multiples of channel_heads {self.channel_heads}"
            )
        if any(width % 2 for width in self.dims[1:]):
            raise ValueError(f"dims {self.dims}: the second and the third are halved, so even")
        if self.num_multimask < 1:
            raise ValueError(f"num_multimask is {self.num_multimask}, expected at least one class")

    @property
    def low_res_size(self) -> tuple[int, int]:
        """(height, width) of the logits: those of the frame."""
        return self.image_size

    @property
    def mask_tokens(self) -> int:
        """Number of maps: the background, then the classes."""
        return self.num_multimask + 1

    def build(self, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs) -> DaeFormer:
        """The module; called abstractly by ``samjax.models.functional``."""
        return DaeFormer(self, dtype=dtype, remat=remat, rngs=rngs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; read back by ``from_dict``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DaeFormerConfig:
        """Lists become tuples again; an unknown field is a ``TypeError``."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**fields)


class PatchEmbed(nnx.Module):
    """A strided convolution whose patches overlap, and a norm."""

    def __init__(
        self,
        width_in: int,
        width: int,
        patch: tuple[int, int, int],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        kernel, stride, padding = patch
        self.proj = conv(
            width_in, width, kernel, stride=stride, padding=padding, dtype=dtype, rngs=rngs
        )
        self.norm = layer_norm(width, eps=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b gh gw c"]:
        return self.norm(self.proj(x))


class EncoderStage(nnx.Module):
    """Patch embedding, dual blocks, and a norm of what they give."""

    def __init__(
        self,
        config: DaeFormerConfig,
        index: int,
        *,
        dtype: DTypeLike,
        remat: Remat,
        rngs: nnx.Rngs,
    ):
        width, heads = config.dims[index], config.channel_heads
        width_in = config.dims[index - 1] if index else 3
        self.patch_embed = PatchEmbed(width_in, width, PATCHES[index], dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(_dual_blocks(config.depths[index], width, heads, dtype, rngs))
        self.norm = layer_norm(width, eps=LAYER_NORM_EPS, dtype=dtype, rngs=rngs)
        self.remat: Remat = remat

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b gh gw c"]:
        x = self.patch_embed(x)
        for block in self.blocks:
            x = with_remat(block, self.remat)(x)
        return self.norm(x)


def _dual_blocks(
    count: int, width: int, heads: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> list[DualBlock]:
    return [DualBlock(width, heads, dtype=dtype, rngs=rngs) for _ in range(count)]


class ImageEncoder(nnx.Module):
    """Normalised images to one map of tokens per stage, finest first.

    ``dtype`` is the type of the computation (parameters stay float32); ``remat`` says
    what of each block the backward pass computes anew (``layers.with_remat``).
    """

    def __init__(self, config: DaeFormerConfig, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs):
        self.stages = nnx.List(
            [EncoderStage(config, i, dtype=dtype, remat=remat, rngs=rngs) for i in range(3)]
        )
        self.config = config

    def __call__(self, images: Float[Array, "b h w 3"]) -> Features:
        if images.shape[1:3] != self.config.image_size:
            raise ValueError(
                f"the image encoder takes images of {self.config.image_size} (height, width), "
                f"got {images.shape[1:3]}"
            )
        first = self.stages[0](images)
        second = self.stages[1](first)
        return first, second, self.stages[2](second)


class DecoderStage(nnx.Module):
    """Joins the features from below with a skip connection, and raises the resolution."""

    def __init__(
        self,
        config: DaeFormerConfig,
        index: int,
        *,
        dtype: DTypeLike,
        remat: Remat,
        rngs: nnx.Rngs,
    ):
        width, heads = config.dims[index], config.channel_heads
        below = config.dims[index + 1] // 2
        out, factor = (width, 4) if index == 0 else (width // 2, 2)
        self.x1_linear = Dense(below, width, dtype=dtype, rngs=rngs)
        self.cross_attn = CrossBlock(width, dtype=dtype, rngs=rngs)
        self.concat_linear = Dense(2 * width, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(_dual_blocks(config.decoder_depth, width, heads, dtype, rngs))
        self.layer_up = PatchExpand(width, out, factor, dtype=dtype, rngs=rngs)
        if index == 0:
            self.last_layer = Dense(out, config.mask_tokens, dtype=dtype, rngs=rngs)
        self.last = index == 0
        self.remat: Remat = remat

    def __call__(
        self, x: Float[Array, "b gh gw i"], skip: Float[Array, "b gh gw c"]
    ) -> Float[Array, "b gh2 gw2 o"]:
        """The next stage's features; of the last stage the logits, at the frame's size."""
        joined = jnp.concatenate([self.x1_linear(x), skip], axis=-1)
        joined = with_remat(self.cross_attn, self.remat)(joined)
        x = self.concat_linear(joined)
        for block in self.blocks:
            x = with_remat(block, self.remat)(x)
        return with_remat(self._finish, self.remat)(x)

    def _finish(self, x: Array) -> Array:
        x = self.layer_up(x)
        return self.last_layer(x) if self.last else x


class DaeFormer(nnx.Module):
    """Image encoder and decoder.  ``decoder_2`` is the deepest level, ``decoder_0`` the last."""

    def __init__(self, config: DaeFormerConfig, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs):
        deepest = config.dims[2]
        self.image_encoder = ImageEncoder(config, dtype=dtype, remat=remat, rngs=rngs)
        self.decoder_2 = PatchExpand(deepest, deepest // 2, 2, dtype=dtype, rngs=rngs)
        self.decoder_1 = DecoderStage(config, 1, dtype=dtype, remat=remat, rngs=rngs)
        self.decoder_0 = DecoderStage(config, 0, dtype=dtype, remat=remat, rngs=rngs)
        self.config = config

    def encode_image(self, images: Num[Array, "b h w 3"], sizes: Int[Array, "b 2"]) -> Features:
        """Images of 0..255 RGB in the model frame, and their unpadded (height, width) in it.

        Returns the three stages' features, finest first.
        """
        return self.image_encoder(normalise_pixels(self.config, images, sizes))

    def answer(
        self, features: Features, coords: Float[Array, "b p 2"], labels: Int[Array, "b p"]
    ) -> MaskPrediction:
        """What ``__call__`` makes of ``encode_image``'s output; the prompt is not looked at.

        ``low_res_logits``: float32 ``(b, k + 1, h, w)`` at the frame's size, background first, to
        be compared by a softmax; ``iou``: zeros, as the model predicts none.
        """
        first, second, third = features
        x = self.decoder_1(self.decoder_2(third), second)
        logits = jnp.moveaxis(self.decoder_0(x, first), -1, 1).astype(jnp.float32)
        return MaskPrediction(logits, jnp.zeros(logits.shape[:2], jnp.float32))

    def __call__(
        self,
        images: Num[Array, "b h w 3"],
        sizes: Int[Array, "b 2"],
        coords: Float[Array, "b p 2"],
        labels: Int[Array, "b p"],
    ) -> MaskPrediction:
        """The whole model on a batch."""
        return self.answer(self.encode_image(images, sizes), coords, labels)


def init_as_upstream(config: DaeFormerConfig, seed: int = 0) -> Params:
    """Fresh float32 parameters from the distributions that upstream's are from.

    The encoder has torch's defaults: kernels and biases uniform within ``± 1 / √fan_in``.  The
    decoder has Xavier-uniform kernels and zero biases.  A depthwise kernel counts as torch counts
    it, 9 in and ``9 c`` out, so that the decoder's start small.  ``functional.init_params`` draws
    every model by one rule instead: dense layers as this decoder, convolutions by LeCun.
    """
    flat = flatten(abstract_params(config))
    return unflatten({path: jnp.asarray(_draw(path, flat, seed), jnp.float32) for path in flat})


def _draw(path: str, flat: dict[str, Any], seed: int) -> np.ndarray:
    layer, _, leaf = path.rpartition("/")
    shape = flat[path].shape
    encoder = path.startswith("image_encoder/")
    if leaf == "scale":
        return np.ones(shape)
    if f"{layer}/kernel" not in flat or (leaf == "bias" and not encoder):
        return np.zeros(shape)  # a LayerNorm's bias, or one of the decoder's
    *window, fan_in, fan_out = flat[f"{layer}/kernel"].shape
    area = math.prod(window)
    bound = (area * fan_in) ** -0.5 if encoder else (6 / (area * (fan_in + fan_out))) ** 0.5
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(path.encode())]))
    return rng.uniform(-bound, bound, shape)
