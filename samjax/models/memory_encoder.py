"""The memory encoder: a frame's embedding and the mask predicted on it, fused into a memory.

Paper: Ravi et al., "SAM 2" (arXiv 2408.00714), §4 "Memory encoder" and appendix D.1; the fuser's
blocks are ConvNeXt's (arXiv 2201.03545).  Upstream: facebookresearch/sam2@2b90b9f,
``sam2/modeling/memory_encoder.py``.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from samjax.models.layers import Dense, conv, gelu, layer_norm


class MaskDownSampler(nnx.Module):
    """A mask at the frame's size to ``width`` channels at a sixteenth of it."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        channels = [4**i for i in range(5)]  # 1, 4, 16, 64, 256
        pairs = list(itertools.pairwise(channels))
        self.convs = nnx.List(
            [conv(i, o, 3, stride=2, padding=1, dtype=dtype, rngs=rngs) for i, o in pairs]
        )
        self.norms = nnx.List([layer_norm(o, eps=1e-6, dtype=dtype, rngs=rngs) for _, o in pairs])
        self.out = conv(channels[-1], width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w 1"]) -> Float[Array, "b gh gw c"]:
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = gelu(norm(layer(x)))
        return self.out(x)


class DepthwiseConv(nnx.Module):
    """A 7 × 7 convolution of each channel by itself."""

    def __init__(self, width: int, size: int = 7, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        self.kernel = nnx.Param(init(rngs.params(), (size, size, 1, width)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw c"]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        size, width = kernel.shape[0], kernel.shape[3]
        bias = self.bias[...].astype(self.dtype).reshape(1, 1, 1, width)
        if jax.default_backend() != "cpu":
            return bias + jax.lax.conv_general_dilated(
                x,
                kernel,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=width,
            )
        # XLA's grouped convolution takes 10 to 20 times as long on a CPU as these products.
        edge, (gh, gw) = size // 2, x.shape[1:3]
        padded = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
        total = bias
        for row in range(size):
            for column in range(size):
                shifted = padded[:, row : row + gh, column : column + gw]
                total = total + shifted * kernel[row, column][None, None]
        return total


class FuserBlock(nnx.Module):
    """A ConvNeXt block: depthwise convolution, norm, MLP, scaled per channel and added."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dwconv = DepthwiseConv(width, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, eps=1e-6, dtype=dtype, rngs=rngs)
        self.pwconv1 = Dense(width, 4 * width, dtype=dtype, rngs=rngs)
        self.pwconv2 = Dense(4 * width, width, dtype=dtype, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((width,), 1e-6))

    def __call__(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw c"]:
        y = self.pwconv2(gelu(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + y * self.gamma[...].astype(y.dtype).reshape(1, 1, 1, -1)


class MemoryEncoder(nnx.Module):
    """The raw image embedding and a mask to a spatial memory."""

    def __init__(self, width: int, memory_width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.mask_downsampler = MaskDownSampler(width, dtype=dtype, rngs=rngs)
        self.pix_feat_proj = conv(width, width, 1, dtype=dtype, rngs=rngs)
        self.fuser = nnx.List([FuserBlock(width, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.out_proj = conv(width, memory_width, 1, dtype=dtype, rngs=rngs)

    def __call__(
        self, embedding: Float[Array, "b gh gw c"], masks: Float[Array, "b2 h w 1"]
    ) -> Float[Array, "b2 gh gw m"]:
        """``masks`` in the scale that the memory is trained on (-10 to 10); ``b`` may be 1."""
        x = self.pix_feat_proj(embedding) + self.mask_downsampler(masks)
        for block in self.fuser:
            x = block(x)
        return self.out_proj(x)
