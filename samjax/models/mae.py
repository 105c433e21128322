"""Masked autoencoder: the teacher of SAMora's patch expert, and what trains it further.

Paper: He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), §3;
SAMora (arXiv 2511.08626) takes its ViT-L.  Upstream: facebookresearch/mae, ``models_mae.py`` and
``util/pos_embed.py``.

Differs from upstream: the grid may be any rectangle (upstream: square); positions are computed and
no parameters, so that one set of weights serves every image size; only visible patches are
embedded, and visible tokens are put back by their positions instead of an inverse permutation,
which gives equal numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Num

from samjax.models.attention import attend
from samjax.models.layers import EMBEDDING_INIT, MLP, Dense, Remat, gelu, layer_norm, with_remat
from samjax.models.ops import normalise_pixels
from samjax.models.vit import PatchEmbed


@dataclass(frozen=True, kw_only=True)
class MaeConfig:
    """Everything that fixes a masked autoencoder; the defaults are ViT-L's.

    ``ValueError`` for sizes that do not divide, and for a ``mask_ratio`` outside [0, 1).
    """

    family: ClassVar[str] = "mae"  # as a weights file calls it

    image_size: tuple[int, int] = (224, 224)  # (height, width) in pixels; no parameter knows it
    patch_size: int = 16  # pixels per token side
    width: int = 1024  # channels of a token
    depth: int = 24  # blocks
    heads: int = 16
    mlp_ratio: float = 4.0  # of encoder and decoder
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    mask_ratio: float = 0.75  # share of the patches that ``Mae.reconstruct`` removes
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)  # RGB, of values 0..255
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self):
        if any(side % self.patch_size for side in self.image_size):
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        for part in ("", "decoder_"):
            width, heads = getattr(self, f"{part}width"), getattr(self, f"{part}heads")
            if width % heads:
                raise ValueError(f"{part}width {width} is not a multiple of {part}heads {heads}")
            if width % 4:
                raise ValueError(f"{part}width {width}: sine and cosine of x and y need fours")
        _check_ratio(self.mask_ratio)

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens along height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patch_values(self) -> int:
        """Numbers in a patch: pixels times colours."""
        return self.patch_size**2 * 3

    def build(self, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs) -> Mae:
        """The module; called abstractly by ``samjax.models.functional``."""
        return Mae(self, dtype=dtype, remat=remat, rngs=rngs)

    def to_dict(self) -> dict:
        """JSON-able; read back by ``from_dict``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MaeConfig:
        """Lists become tuples again; an unknown field is a ``TypeError``."""
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return cls(**fields)


def vit_base(image_size: tuple[int, int] = (224, 224)) -> MaeConfig:
    """MAE ViT-B/16; encoder 85.6 M parameters."""
    return MaeConfig(image_size=image_size, width=768, depth=12, heads=12)


def vit_large(image_size: tuple[int, int] = (224, 224)) -> MaeConfig:
    """MAE ViT-L/16; encoder 303.1 M parameters, 329.2 M with the decoder.

    Upstream's counts, 303.3 M and 329.5 M, include the fixed positions at 224².
    """
    return MaeConfig(image_size=image_size)


def vit_huge(image_size: tuple[int, int] = (224, 224)) -> MaeConfig:
    """MAE ViT-H/14; encoder 630.4 M parameters."""
    return MaeConfig(image_size=image_size, patch_size=14, width=1280, depth=32)


def vit_tiny(image_size: tuple[int, int] = (64, 64)) -> MaeConfig:
    """A small one of our own (0.22 M parameters), for smoke runs."""
    return MaeConfig(
        image_size=image_size, width=64, depth=2, heads=2,
        decoder_width=48, decoder_depth=1, decoder_heads=3,
    )  # fmt: skip


VARIANTS = {
    "vit_base": vit_base,
    "vit_large": vit_large,
    "vit_huge": vit_huge,
    "vit_tiny": vit_tiny,
}


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed positions of the class token (zeros) and of a grid's tokens: float32 (1 + t, width).

    The first half of the channels tells the column, the second the row, in units of patches; each
    is sines, then cosines, of frequencies from 1 down towards 1/10000.
    """
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.indices(grid).reshape(2, -1, 1)
    angles = columns * frequencies, rows * frequencies
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return np.concatenate([np.zeros((1, width)), table]).astype(np.float32)


def patchify(images: Float[Array, "b h w 3"], patch: int) -> Float[Array, "b t v"]:
    """The patches of images, row by row; a patch's numbers are in order (row, column, colour)."""
    b, h, w, _ = images.shape
    x = images.reshape(b, h // patch, patch, w // patch, patch, 3)
    return x.swapaxes(2, 3).reshape(b, -1, patch * patch * 3)


def random_keep(
    key: jax.Array, b: int, t: int, ratio: float
) -> tuple[Int[Array, "b n"], Float[Array, "b t"]]:
    """Which of ``t`` patches stay visible, drawn anew for each of ``b`` images.

    Returns their positions in random order, ``n = int(t (1 - ratio))``, and the mask, 1 where a
    patch is removed.  ``ValueError`` for a ratio outside [0, 1) or one that leaves no patch.
    """
    _check_ratio(ratio)
    n = int(t * (1 - ratio))
    if n == 0:
        raise ValueError(f"a mask ratio of {ratio} leaves none of {t} patches visible")
    keep = jnp.argsort(jax.random.uniform(key, (b, t)), axis=1)[:, :n]
    return keep, jnp.ones((b, t)).at[jnp.arange(b)[:, None], keep].set(0)


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"a mask ratio of {ratio}; expected 0 up to less than 1")


class Attention(nnx.Module):
    """Multi-head self-attention of a sequence of tokens."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.qkv = Dense(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = Dense(width, width, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v).swapaxes(1, 2).reshape(b, t, c))


class Block(nnx.Module):
    """A pre-norm transformer block."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.norm1 = layer_norm(width, eps=1e-6, dtype=dtype, rngs=rngs)
        self.attn = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, eps=1e-6, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, int(width * mlp_ratio), gelu, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Mae(nnx.Module):
    """Encoder of the visible patches, and a small decoder that predicts the removed ones.

    ``dtype`` is the type of the computation (parameters stay float32); ``remat`` says what of each
    block the backward pass computes anew.  Images are RGB of 0..255 in the config's ``image_size``.
    """

    def __init__(self, config: MaeConfig, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs):
        width, narrow = config.width, config.decoder_width

        def blocks(width: int, heads: int, depth: int) -> list[Block]:
            ratio = config.mlp_ratio
            return [Block(width, heads, ratio, dtype=dtype, rngs=rngs) for _ in range(depth)]

        self.patch_embed = PatchEmbed(config.patch_size, width, dtype=dtype, rngs=rngs)
        self.cls_embed = nnx.Param(EMBEDDING_INIT(rngs.params(), (1, 1, width)))
        self.blocks = nnx.List(blocks(width, config.heads, config.depth))
        self.norm = layer_norm(width, eps=1e-6, dtype=dtype, rngs=rngs)
        self.decoder_embed = Dense(width, narrow, dtype=dtype, rngs=rngs)
        self.mask_embed = nnx.Param(EMBEDDING_INIT(rngs.params(), (1, 1, narrow)))
        self.decoder_blocks = nnx.List(blocks(narrow, config.decoder_heads, config.decoder_depth))
        self.decoder_norm = layer_norm(narrow, eps=1e-6, dtype=dtype, rngs=rngs)
        self.decoder_pred = Dense(narrow, config.patch_values, dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.remat: Remat = remat

    def patches(self, images: Num[Array, "b h w 3"]) -> Float[Array, "b t v"]:
        """Normalised patches in float32: what the encoder sees and ``mae_loss`` compares with.

        ``ValueError`` for images of another size than the config's.
        """
        if images.shape[1:3] != self.config.image_size:
            raise ValueError(
                f"this masked autoencoder takes images of {self.config.image_size} "
                f"(height, width), got {images.shape[1:3]}"
            )
        return patchify(normalise_pixels(self.config, images, None), self.config.patch_size)

    def encode(
        self, images: Num[Array, "b h w 3"], keep: Int[Array, "b n"] | None = None
    ) -> Float[Array, "b s c"]:
        """Tokens after the final norm: the class token, then one per visible patch, s = 1 + n.

        ``keep`` are the positions 0..t-1 of the visible patches, in the order of the tokens; by
        default all t, row by row.
        """
        return self._encode(self.patches(images), keep)

    def decode(
        self, tokens: Float[Array, "b s c"], keep: Int[Array, "b n"] | None = None
    ) -> Float[Array, "b t v"]:
        """The numbers of every patch, from ``encode``'s tokens and the same ``keep``."""
        gh, gw = self.config.grid
        x = self.decoder_embed(tokens)
        if keep is not None:
            mask = self.mask_embed[...].astype(x.dtype)
            hidden = jnp.broadcast_to(mask, (x.shape[0], gh * gw, x.shape[2]))
            restored = hidden.at[jnp.arange(x.shape[0])[:, None], keep].set(x[:, 1:])
            x = jnp.concatenate([x[:, :1], restored], axis=1)
        x = x + jnp.asarray(sincos_positions((gh, gw), x.shape[2]), x.dtype)[None]
        for block in self.decoder_blocks:
            x = with_remat(block, self.remat)(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def reconstruct(
        self, images: Num[Array, "b h w 3"], key: jax.Array
    ) -> tuple[Float[Array, "b t v"], Float[Array, "b t"]]:
        """Predicted patches, and the mask of ``config.mask_ratio`` that ``key`` draws, 1 = removed.

        A prediction is of normalised pixels, or, after training with ``norm_pix``, of pixels
        standardised in each patch: see ``samjax.training.reconstruction_losses.mae_loss``.
        """
        patches = self.patches(images)
        b, t, _ = patches.shape
        keep, mask = random_keep(key, b, t, self.config.mask_ratio)
        return self.decode(self._encode(patches, keep), keep), mask

    def _encode(self, patches: Array, keep: Array | None) -> Array:
        table = jnp.asarray(sincos_positions(self.config.grid, self.config.width), self.dtype)
        positions = jnp.broadcast_to(table[None, 1:], (len(patches), *table[1:].shape))
        if keep is not None:
            rows = jnp.arange(len(patches))[:, None]
            patches, positions = patches[rows, keep], positions[rows, keep]
        b, n, _ = patches.shape
        side = self.config.patch_size
        # A column of patches is an image too, so that the kernel may lie as in every other ViT.
        x = self.patch_embed(patches.reshape(b, n * side, side, 3)).reshape(b, n, -1) + positions
        first = self.cls_embed[...].astype(x.dtype) + table[None, :1]
        x = jnp.concatenate([jnp.broadcast_to(first, (b, 1, x.shape[2])), x], axis=1)
        for block in self.blocks:
            x = with_remat(block, self.remat)(x)
        return self.norm(x)
