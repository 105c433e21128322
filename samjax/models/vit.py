"""The image encoder of SAM: a ViT with windowed and global attention, and a convolutional neck.

Paper: Kirillov et al., "Segment Anything" (arXiv 2304.02643), §3 and appendix A; the backbone is
ViTDet's (arXiv 2203.16527).  Upstream: facebookresearch/segment-anything@dca509f,
``segment_anything/modeling/image_encoder.py``.

Differs from upstream: the grid may be any rectangle (upstream: square), and global attention runs
over chunks of query rows, so that the T × T matrix never exists as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from samjax.models.attention import mix_values
from samjax.models.layers import (
    EMBEDDING_INIT,
    MLP,
    Dense,
    Remat,
    conv,
    gelu,
    layer_norm,
    with_remat,
)
from samjax.models.ops import in_windows, relative_index

MAX_TOKENS = 512  # a longer sequence attends in chunks of query rows
MAX_SCORES = 2**23  # attention scores of one chunk: 32 MiB stay in a CPU's cache, measured 1.9x


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of the image encoder."""

    image_size: tuple[int, int] = (1024, 1024)  # (height, width) of the model frame, in pixels
    patch_size: int = 16  # pixels per token side
    width: int = 768  # channels of a token
    depth: int = 12  # blocks
    heads: int = 12
    mlp_ratio: float = 4.0
    window: int = 14  # side of an attention window, in tokens
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)  # blocks that attend over the whole grid
    out_channels: int = 256  # channels of the image embedding

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens along height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    def __post_init__(self):
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")

    def build_block(self, window: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Block:
        """A block with windows of that side in tokens (0: the grid). A hook for subclasses."""
        return Block(self, window, dtype=dtype, rngs=rngs)


class PatchEmbed(nnx.Module):
    """A ``patch × patch`` convolution of stride ``patch``, computed as one matrix product."""

    def __init__(self, patch: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform(in_axis=(0, 1, 2), out_axis=3)
        self.kernel = nnx.Param(init(rngs.params(), (patch, patch, 3, width)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b gh gw c"]:
        patch, _, _, width = self.kernel.shape
        b, h, w, _ = images.shape
        x = images.astype(self.dtype).reshape(b, h // patch, patch, w // patch, patch, 3)
        x = x.swapaxes(2, 3).reshape(b, h // patch, w // patch, patch * patch * 3)
        kernel = self.kernel[...].astype(self.dtype).reshape(patch * patch * 3, width)
        x = x @ kernel
        return x + jnp.broadcast_to(self.bias[...].astype(self.dtype), x.shape)


class Attention(nnx.Module):
    """Multi-head attention over a grid with decomposed relative positions (MViTv2, 2112.01526)."""

    def __init__(
        self, width: int, heads: int, grid: tuple[int, int], *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.qkv = Dense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = Dense(width, width, dtype=dtype, rngs=rngs)
        self.rel_pos_h = nnx.Param(jnp.zeros((2 * grid[0] - 1, width // heads)))
        self.rel_pos_w = nnx.Param(jnp.zeros((2 * grid[1] - 1, width // heads)))
        self.heads = heads

    def __call__(self, x: Float[Array, "b gh gw c"], window: int = 0) -> Float[Array, "b gh gw c"]:
        """Within windows of that side in tokens, or over the grid.

        A token that only fills up a window is zero, so that its queries, keys and values are the
        bias, and nobody reads its answer: the products with weights leave it out.
        """
        products = self.qkv.product(x)
        return self.proj(in_windows(lambda y: self.mix(self.qkv.add_bias(y)), products, window))

    def mix(self, qkv: Float[Array, "b gh gw c3"]) -> Float[Array, "b gh gw c"]:
        """The attention of given queries, keys and values, before the projection."""
        b, gh, gw, c = *qkv.shape[:3], qkv.shape[3] // 3
        head_dim = c // self.heads
        qkv = qkv.reshape(b, gh * gw, 3, self.heads, head_dim)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # b n t d
        table_h = self.rel_pos_h[...][relative_index(gh)].astype(q.dtype)  # gh gh d
        table_w = self.rel_pos_w[...][relative_index(gw)].astype(q.dtype)
        q = q.reshape(b, self.heads, gh, gw, head_dim)
        rows = _rows_per_chunk(b * self.heads, gh, gw)
        if rows == gh:
            out = _attend(q, k, v, table_h, table_w)
        else:
            chunks = q.reshape(b, self.heads, gh // rows, rows, gw, head_dim)
            chunks = jnp.moveaxis(chunks, 2, 0)
            tables = table_h.reshape(gh // rows, rows, gh, head_dim)
            # Recomputed in the backward pass, else every chunk's attention matrix would be kept.
            attend = jax.checkpoint(lambda q, table: _attend(q, k, v, table, table_w))
            out = jax.lax.map(lambda chunk: attend(*chunk), (chunks, tables))
            out = jnp.moveaxis(out, 0, 2)
        out = out.reshape(b, self.heads, gh, gw, head_dim).transpose(0, 2, 3, 1, 4)
        return out.reshape(b, gh, gw, c)


def _rows_per_chunk(sequences: int, gh: int, gw: int) -> int:
    """Rows of queries per chunk: the largest divisor of ``gh`` that keeps to the limits above."""
    tokens = gh * gw
    if tokens <= MAX_TOKENS:
        return gh
    fitting = [r for r in range(1, gh + 1) if gh % r == 0]
    return max((r for r in fitting if sequences * r * gw * tokens <= MAX_SCORES), default=1)


def _attend(
    q: Float[Array, "b n r gw d"],
    k: Float[Array, "b n t d"],
    v: Float[Array, "b n t d"],
    table_h: Float[Array, "r gh d"],
    table_w: Float[Array, "gw gw d"],
) -> Float[Array, "b n t2 d"]:
    """Attention of ``r`` rows of queries over all keys.

    The decomposed bias is ``q·R_h[row] + q·R_w[column]``, of the unscaled queries.  Where the grid
    is small it is folded into the product: the queries get the two lists of biases as extra
    channels, the keys one-hot rows and columns, and no bias of the size of the scores is ever
    added.  Exact either way; on a large grid the extra channels would cost more than they save.
    """
    b, n, r, gw, d = q.shape
    gh = table_h.shape[1]
    bias_h = jnp.einsum("bnrwd,rkd->bnrwk", q, table_h)
    bias_w = jnp.einsum("bnrwd,wkd->bnrwk", q, table_w)
    q = q * d**-0.5
    folded = gh + gw <= max(d, 32)
    if folded:
        q = jnp.concatenate([q, bias_h, bias_w], axis=-1)
        rows, columns = np.repeat(np.eye(gh), gw, axis=0), np.tile(np.eye(gw), (gh, 1))
        one_hot = jnp.asarray(np.concatenate([rows, columns], axis=1), k.dtype)
        k = jnp.concatenate([k, jnp.broadcast_to(one_hot, (b, n, *one_hot.shape))], axis=-1)
    q = q.reshape(b, n, r * gw, -1)
    if folded:
        return mix_values(q, k, v)
    scores = jnp.einsum("bnqd,bnkd->bnqk", q, k, preferred_element_type=jnp.float32)
    bias = bias_h[..., :, None] + bias_w[..., None, :]
    scores = scores + bias.reshape(scores.shape).astype(scores.dtype)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnqk,bnkd->bnqd", weights, v)


class Block(nnx.Module):
    """A pre-norm transformer block; windowed unless ``window`` is 0."""

    def __init__(self, config: ViTConfig, window: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        grid = (window, window) if window else config.grid
        hidden = int(config.width * config.mlp_ratio)
        self.norm1 = layer_norm(config.width, eps=1e-6, dtype=dtype, rngs=rngs)
        self.attn = Attention(config.width, config.heads, grid, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(config.width, eps=1e-6, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config.width, hidden, gelu, dtype=dtype, rngs=rngs)
        self.window = window

    def __call__(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw c"]:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw c"]:
        """What is added to the tokens, from the normed tokens."""
        return self.attn(x, self.window)


class Neck(nnx.Module):
    """1×1 and 3×3 convolutions to ``out_channels``, each followed by a channel LayerNorm."""

    def __init__(self, width: int, out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = conv(width, out, 1, bias=False, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(out, eps=1e-6, dtype=dtype, rngs=rngs)
        self.conv2 = conv(out, out, 3, padding=1, bias=False, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(out, eps=1e-6, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw o"]:
        return self.norm2(self.conv2(self.norm1(self.conv1(x))))


class ImageEncoder(nnx.Module):
    """Normalised images to image embeddings.

    ``dtype`` is the type of the computation (parameters stay float32); ``remat`` says
    what of each block the backward pass computes anew (``layers.with_remat``).
    """

    def __init__(self, config: ViTConfig, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs):
        self.patch_embed = PatchEmbed(config.patch_size, config.width, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(EMBEDDING_INIT(rngs.params(), (1, *config.grid, config.width)))
        windows = [0 if i in config.global_blocks else config.window for i in range(config.depth)]
        self.blocks = nnx.List([config.build_block(w, dtype=dtype, rngs=rngs) for w in windows])
        self.neck = Neck(config.width, config.out_channels, dtype=dtype, rngs=rngs)
        self.config = config
        self.remat: Remat = remat

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b gh gw c"]:
        if images.shape[1:3] != self.config.image_size:
            raise ValueError(
                f"the image encoder takes images of {self.config.image_size} (height, width), "
                f"got {images.shape[1:3]}"
            )
        x = self.embed_patches(images)
        for block in self.blocks:
            x = with_remat(block, self.remat)(x)
        return self.neck(x)

    def embed_patches(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b gh gw c"]:
        """Patch embedding plus absolute positions: the input of the first block."""
        x = self.patch_embed(images)
        return x + self.pos_embed[...].astype(x.dtype)
