"""SAMora's stage 2: three low-rank experts in every block of the encoder, fused by HL-Attn.

Paper: Chen et al., "SAMora" (arXiv 2511.08626), "Hierarchical LoRA Attention": the output is that
of the frozen block plus a signal fused from the experts.  Upstream: ShChen233/SAMora@d492a95,
``segment_anything/modeling/hl_attn.py`` and ``samora_lora_hsam.py``.  With ``n`` the normed tokens
of a window (of the grid in a global block) and ``A`` the block's attention of given qkv, output
projection included::

    base = A(qkv(n))
    d_e  = A(qkv(n) + s_e · [n a_q b_q, 0, n a_v b_v]) − base      for each expert e
    E    = LN(HL-Attn(d_pixel, d_patch, d_image))
    x   ← x + base + E,   then the MLP

HL-Attn goes from fine to coarse: the patch expert's tokens attend to the pixel expert's, the image
expert's to what comes of that.  With two experts the one level between them remains; with one
there is none, and ``E = LN(d)``.

Differs from upstream: attention and HL-Attn always run inside the windows, as in upstream's H-SAM
variant (its plain variant fits only a grid that is one window); the four attentions share one
qkv and run as one; any subset of the experts, a smaller inner width, and SAM 2's encoder are ours.
Biases of the fusion start at zero: with experts that do nothing yet, neither does the fusion.

``LN`` brings E to unit variance however small the differences are, and they are small differences
of large numbers. In bfloat16 little is left of weak experts: measured at random weights of a tiny
block, ``base + E`` is off by 1 % of its deviation at a b of about 0.3, by 33 % at one of 0.003.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from samjax.models import hiera, vit
from samjax.models.attention import attend
from samjax.models.hiera import BlockPlan, HieraConfig
from samjax.models.layers import Dense, layer_norm
from samjax.models.ops import in_windows
from samjax.models.sam import SamConfig
from samjax.models.sam2_config import Sam2Config
from samjax.models.vit import ViTConfig
from samjax.trees import Params, flatten, unflatten

EXPERTS = ("pixel", "patch", "image")  # from fine to coarse, the order in which they are fused


@dataclass(frozen=True, kw_only=True)
class ExpertFields:
    """What both encoders' configs get: which experts there are, and how they are fused."""

    expert_rank: int = 4
    experts: tuple[str, ...] = ("image", "patch", "pixel")  # some of these, in any order
    fusion: Literal["hl_attn", "sum"] = "hl_attn"  # "sum": E = Σ d_e, without parameters
    # Channels inside HL-Attn's attentions (SAM 2: in the first stage; doubles from stage to stage).
    fusion_width: int | None = None  # None: the block's own, as released

    @property
    def fusion_order(self) -> tuple[str, ...]:
        """The experts from fine to coarse."""
        return tuple(name for name in EXPERTS if name in self.experts)

    def check_experts(self, width: int, heads: int) -> None:
        """``ValueError`` if the fields fit neither each other nor blocks of that width."""
        if len(self.fusion_order) != len(self.experts) or not self.experts:
            raise ValueError(f"experts must be some of {EXPERTS}, each once; got {self.experts}")
        if self.fusion not in ("hl_attn", "sum"):
            raise ValueError(f"fusion must be 'hl_attn' or 'sum', got {self.fusion!r}")
        if not 1 <= self.expert_rank <= width:
            raise ValueError(f"expert_rank must be 1 to {width}, got {self.expert_rank}")
        if self.fusion_width is not None and (self.fusion_width < 1 or self.fusion_width % heads):
            raise ValueError(f"fusion_width {self.fusion_width} is not a multiple of heads {heads}")


@dataclass(frozen=True, kw_only=True)
class SamoraViTConfig(ViTConfig, ExpertFields):
    """SAM's image encoder with experts; of any model that has a ``ViTConfig``."""

    def __post_init__(self):
        super().__post_init__()
        self.check_experts(self.width, self.heads)

    def build_block(self, window: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> ViTBlock:
        """A block with experts."""
        return ViTBlock(self, window, dtype=dtype, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class SamoraHieraConfig(HieraConfig, ExpertFields):
    """SAM 2's image encoder with experts.

    Ours: the paper reports SAM 2, but released no code for it.
    """

    def __post_init__(self):
        super().__post_init__()
        self.check_experts(self.width, self.heads)

    def build_block(self, plan: BlockPlan, *, dtype: DTypeLike, rngs: nnx.Rngs) -> HieraBlock:
        """A block with experts."""
        return HieraBlock(self, plan, dtype=dtype, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class SamoraConfig(SamConfig):
    """SAM with experts in its image encoder; the defaults are ``vit_b``'s."""

    family: ClassVar[str] = "samora"
    encoder: ClassVar[type] = SamoraViTConfig

    image_encoder: SamoraViTConfig = field(default_factory=SamoraViTConfig)


@dataclass(frozen=True, kw_only=True)
class SamoraSam2Config(Sam2Config):
    """SAM 2 with experts in its image encoder; defaults: 2.1's ``hiera_base_plus``."""

    family: ClassVar[str] = "samora2"
    encoder: ClassVar[type] = SamoraHieraConfig

    image_encoder: SamoraHieraConfig = field(default_factory=SamoraHieraConfig)


class LowRank(nnx.Module):
    """``x a b``; ``a`` starts uniform in ±1/√in, ``b`` at zero."""

    def __init__(self, features_in: int, features_out: int, rank: int, *, rngs: nnx.Rngs):
        bound = features_in**-0.5
        shape = (features_in, rank)
        self.a = nnx.Param(rngs.params.uniform(shape, minval=-bound, maxval=bound))
        self.b = nnx.Param(jnp.zeros((rank, features_out)))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return (x @ self.a[...].astype(x.dtype)) @ self.b[...].astype(x.dtype)


class Expert(nnx.Module):
    """What one expert adds to a block's qkv: nothing to the keys.

    ``gain`` is the number s_e, of shape (1,): a file would give it that shape in any case.
    """

    def __init__(self, width_in: int, width: int, rank: int, *, rngs: nnx.Rngs):
        self.q = LowRank(width_in, width, rank, rngs=rngs)
        self.v = LowRank(width_in, width, rank, rngs=rngs)
        self.gain = nnx.Param(jnp.ones((1,)))

    def __call__(self, x: Float[Array, "b gh gw i"]) -> Float[Array, "b gh gw c3"]:
        gain = self.gain[0].astype(x.dtype)
        q, v = gain * self.q(x), gain * self.v(x)
        return jnp.concatenate([q, jnp.zeros_like(q), v], axis=-1)


class FusionLevel(nnx.Module):
    """One level of HL-Attn: tokens of a coarser expert attend to those of what lies below.

    ``query + gate · CAF``, where ``CAF`` is a pre-norm multi-head attention of inner width
    ``inner`` and, as upstream has it, two linear layers after it (``attn_proj``, ``out_proj``).
    """

    def __init__(self, width: int, heads: int, inner: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.query_norm = layer_norm(width, eps=1e-5, dtype=dtype, rngs=rngs)
        self.key_norm = layer_norm(width, eps=1e-5, dtype=dtype, rngs=rngs)
        self.value_norm = layer_norm(width, eps=1e-5, dtype=dtype, rngs=rngs)
        self.q_proj = Dense(width, inner, dtype=dtype, rngs=rngs)
        self.k_proj = Dense(width, inner, dtype=dtype, rngs=rngs)
        self.v_proj = Dense(width, inner, dtype=dtype, rngs=rngs)
        self.attn_proj = Dense(inner, inner, dtype=dtype, rngs=rngs)
        self.out_proj = Dense(inner, width, dtype=dtype, rngs=rngs)
        self.gate = nnx.Param(jnp.ones((1,)))
        self.heads = heads

    def __call__(
        self, query: Float[Array, "b t c"], below: Float[Array, "b t c"]
    ) -> Float[Array, "b t c"]:
        b, t, _ = query.shape
        q, k, v = (
            x.reshape(b, t, self.heads, -1).swapaxes(1, 2)  # b n t d
            for x in (
                self.q_proj(self.query_norm(query)),
                self.k_proj(self.key_norm(below)),
                self.v_proj(self.value_norm(below)),
            )
        )
        mixed = attend(q, k, v).swapaxes(1, 2).reshape(b, t, -1)
        return query + self.gate[0].astype(query.dtype) * self.out_proj(self.attn_proj(mixed))


class HLAttention(nnx.Module):
    """The experts' differences, from fine to coarse, to one signal of unit variance."""

    def __init__(
        self,
        experts: int,
        width: int,
        heads: int,
        inner: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.levels = nnx.List(
            [FusionLevel(width, heads, inner, dtype=dtype, rngs=rngs) for _ in range(experts - 1)]
        )
        self.norm = layer_norm(width, eps=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, differences: list[Float[Array, "b gh gw c"]]) -> Float[Array, "b gh gw c"]:
        shape = differences[0].shape
        fused, *coarser = (d.reshape(shape[0], -1, shape[3]) for d in differences)
        for level, query in zip(self.levels, coarser, strict=True):
            fused = level(query, fused)
        return self.norm(fused).reshape(shape)


class _Fused(nnx.Module):
    """The attention of a block with experts, whatever the encoder."""

    attn: vit.Attention | hiera.Attention
    window: int

    def _add_experts(
        self,
        config: ExpertFields,
        sizes: tuple[int, int, int],
        inner: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        width_in, width, heads = sizes
        self.order = config.fusion_order
        self.experts = nnx.Dict(
            {name: Expert(width_in, width, config.expert_rank, rngs=rngs) for name in self.order}
        )
        if config.fusion == "hl_attn":
            count = len(self.order)
            self.fusion = HLAttention(count, width, heads, inner, dtype=dtype, rngs=rngs)
        self.sums = config.fusion == "sum"

    def attend(self, x: Float[Array, "b gh gw i"]) -> Float[Array, "b gh2 gw2 c"]:
        """What is added to the tokens, from the normed tokens."""
        return in_windows(self.fuse, x, self.window)

    def fuse(self, x: Float[Array, "b gh gw i"]) -> Float[Array, "b gh2 gw2 c"]:
        """What is added to the tokens of each window, from its normed tokens: ``base + E``."""
        qkv = self.attn.qkv(x)
        several = [qkv, *(qkv + self.experts[name](x) for name in self.order)]
        # One attention for all. The batch stays the leading axis, which may lie on several devices.
        stacked = jnp.stack(several, axis=1).reshape(-1, *qkv.shape[1:])
        mixed = self.attn.proj(self.attn.mix(stacked))
        mixed = mixed.reshape(len(x), len(several), *mixed.shape[1:])
        base = mixed[:, 0]
        differences = [mixed[:, 1 + i] - base for i in range(len(self.order))]
        return base + (sum(differences) if self.sums else self.fusion(differences))


class ViTBlock(_Fused, vit.Block):
    """A block of SAM's encoder with experts."""

    def __init__(self, config: SamoraViTConfig, window: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        vit.Block.__init__(self, config, window, dtype=dtype, rngs=rngs)
        sizes = config.width, config.width, config.heads
        self._add_experts(
            config, sizes, config.fusion_width or config.width, dtype=dtype, rngs=rngs
        )


class HieraBlock(_Fused, hiera.Block):
    """A block of SAM 2's encoder with experts; where it pools, so do the experts' queries."""

    def __init__(
        self, config: SamoraHieraConfig, plan: BlockPlan, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        hiera.Block.__init__(self, plan, config.mlp_ratio, dtype=dtype, rngs=rngs)
        inner = (config.fusion_width or config.width) * plan.heads // config.heads
        sizes = plan.width_in, plan.width, plan.heads
        self._add_experts(config, sizes, inner, dtype=dtype, rngs=rngs)


def install_experts(
    params: Params,
    experts: Mapping[str, Params],
    scales: Mapping[str, float | Sequence[float]] | None = None,
) -> Params:
    """The stage-2 tree ``params`` with stage 1's experts in it; everything else as it was.

    experts: {name: factors}, as of ``samjax.peft.lora``, ``{…/blocks/i/attn/qkv: {q, v: {a, b}}}``,
    one for every expert of the tree; they become float32.  scales: the factor of each expert's
    side path in stage 1, one number or one for each block; 1.0 for those that are not named.

    Raises ``ValueError`` naming every factor that is missing, mis-shaped or without a place, and
    every expert or number of scales that does not fit.
    """
    flat = dict(flatten(params))
    places: dict[str, dict[str, str]] = {}  # expert → path of a factor in stage 1 → in stage 2
    gains: dict[str, list[str]] = {}  # in the order of the blocks
    for path in flat:
        match = re.fullmatch(r"(.*blocks/\d+)/experts/(\w+)/(?:([qv]/[ab])|gain)", path)
        if match and match[3]:
            places.setdefault(match[2], {})[f"{match[1]}/attn/qkv/{match[3]}"] = path
        elif match:
            gains.setdefault(match[2], []).append(path)
    problems = [f"{name}: the model has no such expert" for name in experts if name not in places]
    for name, wanted in places.items():
        given = flatten(experts.get(name, {}))
        problems += [f"{name}: no place for {path}" for path in given if path not in wanted]
        for source, path in wanted.items():
            if source not in given:
                problems.append(f"{name}: {source} is missing")
            elif given[source].shape != flat[path].shape:
                found, expected = given[source].shape, flat[path].shape
                problems.append(f"{name}: {source} has shape {found}, expected {expected}")
            else:
                flat[path] = jnp.asarray(given[source], jnp.float32)
    for name, scale in (scales or {}).items():
        if name not in gains:
            problems.append(f"scales: the model has no expert {name}")
        elif np.size(scale) not in (1, len(gains[name])):
            problems.append(f"scales: {np.size(scale)} for the {len(gains[name])} blocks of {name}")
    if problems:
        raise ValueError("the experts do not fit the model:\n  " + "\n  ".join(problems))
    for name, paths in gains.items():
        paths = sorted(paths, key=lambda path: int(path.split("blocks/")[1].split("/")[0]))
        numbers = np.broadcast_to(np.ravel((scales or {}).get(name, 1.0)), len(paths))
        for path, number in zip(paths, numbers, strict=True):
            flat[path] = jnp.full((1,), number, jnp.float32)
    return unflatten(flat)
