"""LoRA as data: low-rank factors in a plain tree beside the frozen parameters.

Paper: Hu et al., arXiv 2106.09685; for SAM: SAMed (arXiv 2304.13785), which adapts the ``q`` and
``v`` columns of the fused ``qkv`` of every encoder block with rank 4 and no scaling.

An adapter's factors are ``{path of a dense layer: {block: {"a": (in, r), "b": (r, out)}}}``, where
``block`` names output columns (``samjax.trees.block_columns``).  ``samjax.models.functional.bind``
lays them onto the model; ``merge`` folds them into plain parameters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from samjax.trees import Params, block_columns, flatten, unflatten

_BLOCK = r"image_encoder/(?:trunk/)?blocks/\d+/"  # of SAM's encoder, and of SAM 2's

# part → projection → (dense layers, block of their output)
TARGETS: dict[str, dict[str, tuple[str, str]]] = {
    "image_encoder": {
        "q": (_BLOCK + "attn/qkv", "q"),
        "k": (_BLOCK + "attn/qkv", "k"),
        "v": (_BLOCK + "attn/qkv", "v"),
        "o": (_BLOCK + "attn/proj", "all"),
        "mlp": (_BLOCK + "mlp/lin[12]", "all"),
    },
    "mask_decoder": {
        "q": (r"mask_decoder/transformer/.*attn\w*/q_proj", "all"),
        "k": (r"mask_decoder/transformer/.*attn\w*/k_proj", "all"),
        "v": (r"mask_decoder/transformer/.*attn\w*/v_proj", "all"),
        "o": (r"mask_decoder/transformer/.*attn\w*/out_proj", "all"),
        "mlp": (r"mask_decoder/transformer/layers/\d+/mlp/lin[12]", "all"),
    },
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which layers get low-rank factors, and how they are scaled."""

    rank: int = 4
    alpha: float | None = None  # scale = alpha / rank; None: scale 1, as in SAMed
    dropout: float = 0.0  # probability of dropping an entry of the side path's input
    drop_output: bool = False  # of its output instead, as SAM2LoRA
    init: Literal["kaiming", "normal"] = "kaiming"  # of a; normal is N(0, 1) / √r, SAM2LoRA's
    any_rank: bool = False  # also above a side of a matrix, as SAM2LoRA's 1024
    projections: tuple[str, ...] = ("q", "v")  # of q, k, v, o, mlp
    parts: tuple[str, ...] = ("image_encoder",)  # of image_encoder, mask_decoder
    # Of another model: (regular expression of a layer's path, block) in the place of the two above.
    targets: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        for name, values, known in (
            ("projections", self.projections, TARGETS["image_encoder"]),
            ("parts", self.parts, TARGETS),
        ):
            unknown = [value for value in values if value not in known]
            if unknown or not values:
                raise ValueError(f"{name} must be some of {list(known)}, got {list(values)}")

    @property
    def scale(self) -> float:
        """The factor of the side path."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a fine-tuning run adds to a base model.

    factors: low-rank factors as described above; scale: of their product; params: parameters that
    were tuned outright (a fresh mask head, say) and replace the base's.
    """

    factors: Params
    scale: float = 1.0
    params: Params = field(default_factory=dict)


def find_targets(params: Params, config: LoraConfig) -> list[tuple[str, str]]:
    """(path of a dense layer, block) for each pair of factors, in the order of the layers.

    Raises ``ValueError`` if a requested projection matches no layer of ``params``.
    """
    layers = [p.removesuffix("/kernel") for p in flatten(params) if p.endswith("/kernel")]
    wanted = [(f"targets[{i}]", *target) for i, target in enumerate(config.targets)] or [
        (f"{projection!r} of {part!r}", *TARGETS[part][projection])
        for part in config.parts
        for projection in config.projections
    ]
    found = []
    for name, pattern, block in wanted:
        matches = [(layer, block) for layer in layers if re.fullmatch(pattern, layer)]
        if not matches:
            raise ValueError(f"LoRA on {name}: no layer matches {pattern!r}")
        found += matches
    return sorted(found, key=lambda target: (layers.index(target[0]), target[1]))


def init_factors(params: Params, config: LoraConfig, key: jax.Array) -> Params:
    """Fresh float32 factors: ``a`` uniform in ±1/√in (Kaiming with a = √5) or normal, ``b`` zero.

    The model therefore starts as the base model.  Raises ``ValueError`` naming the layer if the
    rank exceeds a side of its matrix, unless the config allows any.
    """
    flat, factors = flatten(params), {}
    for index, (layer, block) in enumerate(find_targets(params, config)):
        features_in, width = flat[f"{layer}/kernel"].shape
        start, stop = block_columns(block, width)
        if config.rank > min(features_in, stop - start) and not config.any_rank:
            raise ValueError(
                f"rank {config.rank} exceeds {layer} [{block}], which is "
                f"{features_in} x {stop - start}"
            )
        own_key = jax.random.fold_in(key, index)
        shape = (features_in, config.rank)
        if config.init == "normal":
            a = jax.random.normal(own_key, shape) * config.rank**-0.5
        else:
            bound = features_in**-0.5
            a = jax.random.uniform(own_key, shape, minval=-bound, maxval=bound)
        factors[f"{layer}/{block}/a"] = a
        factors[f"{layer}/{block}/b"] = jnp.zeros((config.rank, stop - start))
    return unflatten(factors)


def factor_pairs(factors: Params) -> list[tuple[str, str, jax.Array, jax.Array]]:
    """(path of the dense layer, block, a, b) of every pair of an adapter's factors.

    Raises ``ValueError`` naming every leaf that is not part of a well-formed pair.
    """
    flat, pairs, problems = flatten(factors), [], []
    for path in flat:
        pair, _, side = path.rpartition("/")
        layer, _, block = pair.rpartition("/")
        a, b = flat.get(f"{pair}/a"), flat.get(f"{pair}/b")
        if not layer or block not in ("q", "k", "v", "all") or side not in ("a", "b"):
            problems.append(f"{path}: expected '<layer>/<q, k, v or all>/<a or b>'")
        elif a is None or b is None:
            problems.append(f"{path}: its other half is missing")
        elif side == "a":
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0]:
                problems.append(f"{pair}: a {a.shape} and b {b.shape} make no product")
            else:
                pairs.append((layer, block, a, b))
    if problems:
        raise ValueError("these are no low-rank factors:\n  " + "\n  ".join(problems))
    return pairs


def merge(params: Params, adapter: Adapter) -> Params:
    """Plain parameters of the tuned model: ``kernel[:, block] + scale · a b``, float32.

    Parameters that were tuned outright replace the base's before the factors are added.
    Raises ``ValueError`` naming every layer that the model lacks or whose shape does not fit.
    """
    flat, problems = dict(flatten(params)), []
    # First, because the factors lie on top of a kernel that was tuned outright.
    for path, leaf in flatten(adapter.params).items():
        if path not in flat or flat[path].shape != leaf.shape:
            found = flat[path].shape if path in flat else "no such parameter"
            problems.append(f"{path}: the adapter has shape {leaf.shape}, the model {found}")
        else:
            flat[path] = leaf
    for layer, block, a, b in factor_pairs(adapter.factors):
        kernel = flat.get(f"{layer}/kernel")
        if kernel is None or len(kernel.shape) != 2:
            problems.append(f"{layer}: the model has no such dense layer")
            continue
        try:
            start, stop = block_columns(block, kernel.shape[1])
        except ValueError as error:
            problems.append(f"{layer}: {error}")
            continue
        if (a.shape[0], b.shape[1]) != (kernel.shape[0], stop - start):
            problems.append(
                f"{layer} [{block}]: the factors make {a.shape[0]} x {b.shape[1]}, the model has "
                f"{kernel.shape[0]} x {stop - start}"
            )
            continue
        product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        delta = jnp.asarray(adapter.scale * product, jnp.float32)
        flat[f"{layer}/kernel"] = jnp.asarray(kernel).at[:, start:stop].add(delta)
    if problems:
        raise ValueError("the adapter does not fit the model:\n  " + "\n  ".join(problems))
    return unflatten(flat)


def count(factors: Params) -> int:
    """Number of values in the factors."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(factors))
