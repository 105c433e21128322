"""The image encoder of SAM 2: a Hiera trunk and a feature pyramid neck.

Papers: Ryali et al., "Hiera" (arXiv 2306.00989); windowed position embeddings, Bolya et al. (arXiv
2311.05613); Ravi et al., "SAM 2" (arXiv 2408.00714), §4 and appendix D.  Upstream:
facebookresearch/sam2@2b90b9f, ``sam2/modeling/backbones/hieradet.py`` and ``image_encoder.py``.

Differs from upstream: the frame may be any rectangle whose sides are multiples of 32, and there is
no stochastic depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from samjax.models.attention import attend
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
from samjax.models.ops import cubic_matrix, in_windows

PATCH_STRIDE = 4  # pixels per token side in the first stage; each later stage doubles it


class BlockPlan(NamedTuple):
    """What one block does: its channels, heads and window, and whether it halves the grid."""

    width_in: int
    width: int
    heads: int
    window: int  # side in tokens of the grid before pooling; 0: the whole grid
    pool: bool


@dataclass(frozen=True, kw_only=True)
class HieraConfig:
    """Sizes of the image encoder; the defaults are ``hiera_base_plus``'s."""

    image_size: tuple[int, int] = (1024, 1024)  # (height, width) of the model frame, in pixels
    width: int = 112  # channels of a token in the first stage; doubles from stage to stage
    heads: int = 2  # in the first stage; doubles as well
    stages: tuple[int, ...] = (2, 3, 16, 3)  # blocks of each
    windows: tuple[int, ...] = (8, 4, 14, 7)  # side of each stage's attention windows, in tokens
    global_blocks: tuple[int, ...] = (12, 16, 20)  # blocks that attend over the whole grid
    position_grid: tuple[int, int] = (14, 14)  # size of the learned table that is interpolated
    mlp_ratio: float = 4.0
    out_channels: int = 256  # channels of every level of the pyramid
    top_down_levels: tuple[int, ...] = (2, 3)  # levels that the next coarser one is added to

    def __post_init__(self):
        if any(side % 32 for side in self.image_size):
            raise ValueError(f"image_size {self.image_size} is not a multiple of 32")
        if len(self.stages) != len(self.windows):
            raise ValueError(f"{len(self.stages)} stages and {len(self.windows)} windows")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if any(side % self.windows[0] for side in self.patch_grid):
            raise ValueError(f"windows of {self.windows[0]} do not tile {self.patch_grid} patches")

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Tokens along height and width in the first stage."""
        return self.image_size[0] // PATCH_STRIDE, self.image_size[1] // PATCH_STRIDE

    @property
    def grid(self) -> tuple[int, int]:
        """Size of the image embedding: the pyramid's level of stride 16."""
        return self.image_size[0] // 16, self.image_size[1] // 16

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.stages)

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """Index of the last block of each stage."""
        return tuple(sum(self.stages[: i + 1]) - 1 for i in range(len(self.stages)))

    @property
    def stage_widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.width * 2**i for i in range(len(self.stages)))

    def blocks(self) -> list[BlockPlan]:
        """The plan of every block.

        The first block of a stage pools the queries, and still has the window of the stage before.
        """
        plans, width, stage = [], self.width, 0
        for index in range(self.depth):
            pool = index > 0 and index - 1 in self.stage_ends
            window = 0 if index in self.global_blocks else self.windows[stage]
            stage += pool
            wider = self.stage_widths[stage]
            plans.append(BlockPlan(width, wider, self.heads * 2**stage, window, pool))
            width = wider
        return plans

    def build_block(self, plan: BlockPlan, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Block:
        """The block of that plan. A hook for subclasses."""
        return Block(plan, self.mlp_ratio, dtype=dtype, rngs=rngs)


class Attention(nnx.Module):
    """Multi-head attention over a grid; with ``pool``, each 2 × 2 queries become their maximum."""

    def __init__(self, plan: BlockPlan, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.qkv = Dense(plan.width_in, 3 * plan.width, dtype=dtype, rngs=rngs)
        self.proj = Dense(plan.width, plan.width, dtype=dtype, rngs=rngs)
        self.heads = plan.heads
        self.pool = plan.pool

    def __call__(
        self, x: Float[Array, "b gh gw i"], window: int = 0
    ) -> Float[Array, "b gh2 gw2 c"]:
        """Within windows of that side in tokens, or over the grid; see ``vit.Attention``."""
        products = self.qkv.product(x)
        return self.proj(in_windows(lambda y: self.mix(self.qkv.add_bias(y)), products, window))

    def mix(self, qkv: Float[Array, "b gh gw c3"]) -> Float[Array, "b gh2 gw2 c"]:
        """The attention of given queries, keys and values, before the projection."""
        b = len(qkv)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        if self.pool:
            q = max_pool(q)
        grid = q.shape[1:3]
        q, k, v = (
            y.reshape(b, -1, self.heads, y.shape[-1] // self.heads).transpose(0, 2, 1, 3)
            for y in (q, k, v)
        )
        out = attend(q, k, v).transpose(0, 2, 1, 3)
        return out.reshape(b, *grid, -1)


def max_pool(x: Float[Array, "b gh gw c"]) -> Float[Array, "b gh2 gw2 c"]:
    """The maximum of each 2 × 2 tokens; an odd last row or column is left out."""
    b, gh, gw, c = x.shape
    even = x[:, : gh // 2 * 2, : gw // 2 * 2]
    return even.reshape(b, gh // 2, 2, gw // 2, 2, c).max(axis=(2, 4))


class Block(nnx.Module):
    """A pre-norm transformer block; windowed unless the plan's window is 0."""

    def __init__(self, plan: BlockPlan, mlp_ratio: float, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = layer_norm(plan.width_in, eps=1e-6, dtype=dtype, rngs=rngs)
        self.attn = Attention(plan, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(plan.width, eps=1e-6, dtype=dtype, rngs=rngs)
        hidden = int(plan.width * mlp_ratio)
        self.mlp = MLP(plan.width, hidden, gelu, dtype=dtype, rngs=rngs)
        if plan.width != plan.width_in:
            self.proj = Dense(plan.width_in, plan.width, dtype=dtype, rngs=rngs)
        self.plan = plan
        self.window = plan.window

    def __call__(self, x: Float[Array, "b gh gw i"]) -> Float[Array, "b gh2 gw2 c"]:
        normed = self.norm1(x)
        if self.plan.width != self.plan.width_in:
            x = self.proj(normed)  # of the normed tokens, as upstream
            x = max_pool(x) if self.plan.pool else x
        x = x + self.attend(normed)
        return x + self.mlp(self.norm2(x))

    def attend(self, x: Float[Array, "b gh gw i"]) -> Float[Array, "b gh2 gw2 c"]:
        """What is added to the tokens, from the normed tokens."""
        return self.attn(x, self.window)


class Trunk(nnx.Module):
    """Normalised images to one map of tokens per stage, finest first."""

    def __init__(self, config: HieraConfig, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs):
        window, width = config.windows[0], config.width
        self.patch_embed = conv(3, width, 7, stride=PATCH_STRIDE, padding=3, dtype=dtype, rngs=rngs)
        self.pos_embed = nnx.Param(EMBEDDING_INIT(rngs.params(), (1, *config.position_grid, width)))
        self.pos_embed_window = nnx.Param(EMBEDDING_INIT(rngs.params(), (1, window, window, width)))
        self.blocks = nnx.List(
            [config.build_block(plan, dtype=dtype, rngs=rngs) for plan in config.blocks()]
        )
        self.config = config
        self.remat: Remat = remat

    def __call__(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ _"]]:
        x = self.embed_patches(images)
        stages = []
        for index, block in enumerate(self.blocks):
            x = with_remat(block, self.remat)(x)
            if index in self.config.stage_ends:
                stages.append(x)
        return stages

    def embed_patches(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b gh gw c"]:
        """Patch embedding plus absolute positions: the input of the first block."""
        x = self.patch_embed(images)
        return x + self.positions().astype(x.dtype)

    def positions(self) -> Float[Array, "1 gh gw c"]:
        """The coarse table, bicubically interpolated, plus the window's, repeated."""
        (gh, gw), table = self.config.patch_grid, self.pos_embed[...]
        rows, columns = cubic_matrix(table.shape[1], gh), cubic_matrix(table.shape[2], gw)
        coarse = jnp.einsum("Hh,Ww,bhwc->bHWc", rows, columns, table, precision="highest")
        window = self.pos_embed_window[...]
        return coarse + jnp.tile(window, (1, gh // window.shape[1], gw // window.shape[2], 1))


class Neck(nnx.Module):
    """A feature pyramid: a 1 × 1 convolution per stage, coarse levels added to some finer ones."""

    def __init__(self, config: HieraConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.convs = nnx.List(  # coarsest first, as upstream's
            [
                conv(width, config.out_channels, 1, dtype=dtype, rngs=rngs)
                for width in reversed(config.stage_widths)
            ]
        )
        self.config = config

    def __call__(self, stages: list[Float[Array, "b _ _ _"]]) -> list[Float[Array, "b _ _ c"]]:
        """Levels of the pyramid, finest first."""
        levels, above = [], None
        for index in reversed(range(len(stages))):
            level = self.convs[len(stages) - 1 - index](stages[index])
            if above is not None and index in self.config.top_down_levels:
                level = level + jnp.repeat(jnp.repeat(above, 2, axis=1), 2, axis=2)
            levels.append(level)
            above = level
        return levels[::-1]


class ImageEncoder(nnx.Module):
    """Normalised images to the pyramid's levels of stride 4, 8 and 16.

    ``dtype`` is the type of the computation (parameters stay float32); ``remat`` says
    what of each block the backward pass computes anew (``layers.with_remat``).
    """

    def __init__(self, config: HieraConfig, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs):
        self.trunk = Trunk(config, dtype=dtype, remat=remat, rngs=rngs)
        self.neck = Neck(config, dtype=dtype, rngs=rngs)
        self.config = config

    def __call__(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b _ _ c"]]:
        if images.shape[1:3] != self.config.image_size:
            raise ValueError(
                f"the image encoder takes images of {self.config.image_size} (height, width), "
                f"got {images.shape[1:3]}"
            )
        return self.neck(self.trunk(images))[:-1]  # the coarsest only feeds the one below
