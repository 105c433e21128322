"""The trainable heads that bring SAM's features to the dimension of a teacher's.

Paper: SAMora (arXiv 2511.08626), stage 1, "a trainable dimension-alignment module".  Upstream:
ShChen233/SAMora@d492a95, ``ssl/projector.py``: ``MLPProjector`` (with ``pool``) for the image
expert, ``TokenProjector`` for the patch expert.  There both sides are projected to 256 channels,
the teacher's by a frozen random head; here ``features_out`` is the teacher's own width.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from samjax.models.layers import Dense, Remat, gelu, layer_norm


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """Sizes of a projector, and whether it takes the mean over positions first."""

    features_in: int = 256  # SAM's image embedding; 768 for ViT-B's tokens before the neck
    hidden: int = 2048
    features_out: int = 1024  # the teacher's channels
    pool: bool = False

    def build(self, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs) -> Projector:
        """The module; called abstractly by ``samjax.models.functional``.  Too small to remat."""
        del remat
        return Projector(self, dtype=dtype, rngs=rngs)


class Projector(nnx.Module):
    """Dense, LayerNorm, GELU, dense, of each position; its output is not L2-normalised."""

    def __init__(self, config: ProjectorConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.lin1 = Dense(config.features_in, config.hidden, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(config.hidden, eps=1e-5, dtype=dtype, rngs=rngs)
        self.lin2 = Dense(config.hidden, config.features_out, dtype=dtype, rngs=rngs)
        self.pool = config.pool

    def __call__(self, x: Float[Array, "b *positions i"]) -> Float[Array, "b *kept o"]:
        """Features (b, …, i) to (b, …, o), or to (b, o) with ``pool``."""
        if self.pool:
            x = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
        return self.lin2(gelu(self.norm(self.lin1(x))))
