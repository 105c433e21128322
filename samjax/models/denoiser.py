"""The decoder that SAMora's pixel expert learns by: image embedding to the image without its noise.

Paper: SAMora (arXiv 2511.08626), stage 1.  Upstream: ShChen233/SAMora@d492a95,
``ssl/denoise_decoder.py``, ``DenoiseUNetDecoder``.  It has no skip connections, whatever its name.

Differs from upstream: no resizing to the noisy image's size, since four doublings of a grid of
16-pixel patches are that size; no other final activations.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from samjax.models.layers import Dense, Remat, conv, gelu, with_remat

Norm = Literal["batch", "group"]
GROUPS = 8  # of channels, for the group norm
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class DenoiserConfig:
    """Sizes of the denoising decoder; the defaults are the release's.

    ``norm``: "batch", as released, takes mean and variance of the batch that it is given, always.
    There are no running averages for inference: stage 1 throws the decoder away.  An example's
    output then depends on the others, also across devices, and gradient accumulation normalises
    each micro-batch by itself.  "group" (8 groups of channels) knows one example only.

    ``ValueError`` for fewer than two widths, or for a width that 8 groups do not divide.
    """

    features: int = 256  # channels of the image embedding
    widths: tuple[int, ...] = (256, 128, 64, 32, 16)  # of the stem and after each doubling
    out_channels: int = 3
    norm: Norm = "batch"

    def __post_init__(self):
        if len(self.widths) < 2:
            raise ValueError(f"widths {self.widths}: expected the stem's and at least one more")
        if self.norm not in ("batch", "group"):
            raise ValueError(f"norm is {self.norm!r}, expected 'batch' or 'group'")
        if self.norm == "group" and any(width % GROUPS for width in self.widths):
            raise ValueError(f"widths {self.widths} are not all multiples of {GROUPS} groups")

    def build(self, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs) -> Denoiser:
        """The module; called abstractly by ``samjax.models.functional``."""
        return Denoiser(self, dtype=dtype, remat=remat, rngs=rngs)


class ChannelNorm(nnx.Module):
    """Normalises channels by the batch's own mean and variance, or groups of them by an example's.

    Statistics are float32, the variance is the biased one, as in PyTorch's training mode.
    """

    def __init__(self, width: int, norm: Norm, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.norm: Norm = norm

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = x.astype(jnp.float32)
        axes = (0, 1, 2)
        if self.norm == "group":
            y, axes = y.reshape(*x.shape[:3], GROUPS, -1), (1, 2, 4)
        y = y - y.mean(axes, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(axes, keepdims=True) + EPS)
        scale, bias = (p[...].reshape(1, 1, 1, -1) for p in (self.scale, self.bias))
        return (y.reshape(x.shape) * scale + bias).astype(x.dtype)


class ConvNorm(nnx.Module):
    """A convolution without bias, then the norm."""

    def __init__(self, i: int, o: int, kernel: int, norm: Norm, dtype: DTypeLike, rngs: nnx.Rngs):
        pad = kernel // 2
        self.conv = conv(i, o, kernel, padding=pad, bias=False, dtype=dtype, rngs=rngs)
        self.norm = ChannelNorm(o, norm, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        return self.norm(self.conv(x))


class ResidualConv(nnx.Module):
    """``GELU(F(x) + x)``, F two 3×3 convolutions with norm and GELU.

    Where the width changes, x goes through a 1×1 convolution with norm.
    """

    def __init__(self, i: int, o: int, norm: Norm, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = ConvNorm(i, o, 3, norm, dtype, rngs)
        self.conv2 = ConvNorm(o, o, 3, norm, dtype, rngs)
        self.shortcut = ConvNorm(i, o, 1, norm, dtype, rngs) if i != o else None

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        residual = x if self.shortcut is None else self.shortcut(x)
        x = gelu(self.conv2(gelu(self.conv1(x))))
        return gelu(x + residual)


class UpBlock(nnx.Module):
    """A 2×2 transposed convolution of stride 2 without bias, then a ``ResidualConv``."""

    def __init__(self, i: int, o: int, norm: Norm, dtype: DTypeLike, rngs: nnx.Rngs):
        self.deconv = nnx.ConvTranspose(
            i,
            o,
            (2, 2),
            strides=(2, 2),
            padding="VALID",
            use_bias=False,
            transpose_kernel=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.refine = ResidualConv(o, o, norm, dtype, rngs)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
        return self.refine(self.deconv(x))


class Denoiser(nnx.Module):
    """Image embedding to image: doubles the grid once per width after the first."""

    def __init__(self, config: DenoiserConfig, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs):
        norm, widths = config.norm, config.widths
        self.stem = ResidualConv(config.features, widths[0], norm, dtype, rngs)
        self.up_blocks = nnx.List(
            [UpBlock(i, o, norm, dtype, rngs) for i, o in itertools.pairwise(widths)]
        )
        self.head = ConvNorm(widths[-1], widths[-1], 3, norm, dtype, rngs)
        self.out = Dense(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)
        self.remat: Remat = remat

    def __call__(self, features: Float[Array, "b gh gw c"]) -> Float[Array, "b h w o"]:
        """Predicted clean images in [0, 1], float32; with four doublings (b, 16 gh, 16 gw, 3)."""
        x = features
        for block in (self.stem, *self.up_blocks):
            x = with_remat(block, self.remat)(x)
        return jax.nn.sigmoid(self.out(gelu(self.head(x))).astype(jnp.float32))
