"""The methods that several papers compare with, each said once.

SAMed and its small form (arXiv 2304.13785; hitachinsk/SAMed), H-SAM (arXiv 2403.18271), DAE-Former
(arXiv 2212.13504), full tuning, the mask decoder alone, and models that are not tuned.  All but the
last two are prompt-free and answer with k + 1 masks, channel 0 the background.

A ``Method`` says what is built and trained; ``trial`` makes a run of it.  What differs from the
released code: AdamW's weight decay acts on matrices only; Dice is of each image, not of the whole
batch; frozen are also the parameters that no loss reaches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from experiments import segmentation as seg
from experiments.objectives import ARRAYS, LabelMap
from experiments.options import REMAT
from experiments.paper import PaperOptions, base_model
from experiments.training import MakeOptimizer
from experiments.trial import Trial
from samjax.models.dae_former import DaeFormerConfig, init_as_upstream
from samjax.models.functional import init_params
from samjax.models.hsam import HSamConfig, averaged_logits, two_level_weight
from samjax.models.sam import SamConfig
from samjax.models.weights import Config
from samjax.peft.lora import LoraConfig
from samjax.peft.paths import in_order, label_by_path
from samjax.peft.presets import MASK_HEAD
from samjax.trees import Params, flatten, unflatten

Build = Callable[[PaperOptions, int], seg.Tuning]  # of the options and the number of classes

# Grey values of 0..1 and no mean: what SAMed, and all that follow it, give to the encoder.
UNIT_PIXELS = {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (255.0, 255.0, 255.0)}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the tables."""

    name: str  # the row
    run: str  # the folder
    build: Build
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the options, what differs
    augment: str = "samed"
    optimizer_of: Callable[[PaperOptions], MakeOptimizer] | None = None
    rank: int = 4
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TwoLevels(LabelMap):
    """H-SAM's loss: decoder 1's at its own size, decoder 2's at the frame's, the latter more and
    more as the epochs go by; what is predicted is the mean of both decoders' logits."""

    arrays: ClassVar[tuple[str, ...]] = (*ARRAYS, "epoch")

    def answer(self, module: Any, features: Any, batch: dict, key: jax.Array | None) -> Any:
        """With the noise of training where there is a key."""
        mask = batch.get("mask") if key is not None else None
        return module.answer(features, batch["coords"], batch["labels"], key=key, mask=mask)

    def logits(self, config: Config, prediction: Any, *, train: bool) -> jax.Array:
        """``(b, h, w, k + 1)``."""
        return averaged_logits(prediction, config.image_size)

    def loss(self, config: Config, prediction: Any, batch: dict) -> jax.Array:
        """``(1 - w) L1 + w L2``, w = 0.6^(0.99^epoch)."""
        first = self.loss_of(jnp.moveaxis(prediction.low_res_logits, 1, -1), config, batch)
        second = self.loss_of(jnp.moveaxis(prediction.logits, 1, -1), config, batch)
        weight = two_level_weight(batch["epoch"])
        return (1 - weight) * first + weight * second


def grown(config: Config, base: Params, seed: int) -> Params:
    """Parameters of ``config``: the base's wherever it has them, but for the mask head; the rest
    is fresh, as SAMed's and H-SAM's loading of SAM's checkpoint leaves it.

    Raises ``ValueError`` if a parameter of the base has another shape there.
    """
    fresh = flatten(init_params(config, seed))
    rules = in_order([(MASK_HEAD, "fresh"), (".*", "keep")])
    labels, old = flatten(label_by_path(unflatten(fresh), rules)), flatten(base)
    kept = {path: old[path] for path in fresh if labels[path] == "keep" and path in old}
    wrong = [path for path, leaf in kept.items() if leaf.shape != fresh[path].shape]
    if wrong:
        raise ValueError(f"the base model does not fit: {', '.join(wrong[:5])}")
    return unflatten({**fresh, **kept})


def sam_for_classes(options: PaperOptions, classes: int, size: int) -> tuple[SamConfig, Params]:
    """SAM with k + 1 mask tokens, a fresh mask head and SAMed's pixels.

    Raises ``ValueError`` if the checkpoint is not one of SAM.
    """
    config, params = base_model(options, "sam", size)
    if not isinstance(config, SamConfig):
        raise ValueError(f"{options.ckpt}: a model of SAM 2; this method is built on SAM (v1)")
    config = dataclasses.replace(config, num_multimask=classes, **UNIT_PIXELS)
    return config, grown(config, params, options.seed)


def of_sam(method: str, *, rank: int = 4, **lora: Any) -> Build:
    """SAM for classes, tuned by a method of ``samjax.peft.presets``."""

    def build(options: PaperOptions, classes: int) -> seg.Tuning:
        config, params = sam_for_classes(options, classes, options.image_size or 512)
        return seg.prepare(
            config,
            params,
            method,
            lora=LoraConfig(rank=rank, **lora),
            objective=label_map(options, classes),
            fresh_head=True,
            prompts=(),
            seed=options.seed,
            **compute(options),
        )

    return build


def label_map(options: PaperOptions, classes: int, kind: type[LabelMap] = LabelMap) -> LabelMap:
    """SAMed's objective with the options' share of Dice."""
    return kind(num_classes=classes, dice_weight=options.dice_weight, low_res=True)


def compute(options: PaperOptions) -> dict[str, Any]:
    """Type and recomputation, for ``segmentation.prepare``."""
    return {"dtype": jnp.dtype(options.dtype), "remat": REMAT[options.remat]}


def _hsam(options: PaperOptions, classes: int) -> seg.Tuning:
    config, params = sam_for_classes(options, classes, options.image_size or 512)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(SamConfig)}
    own = HSamConfig(**fields)
    return seg.prepare(
        own,
        grown(own, params, options.seed),
        "lora+decoder",
        lora=LoraConfig(rank=5),
        objective=label_map(options, classes, TwoLevels),
        fresh_head=True,
        prompts=(),
        seed=options.seed,
        **compute(options),
    )


def _dae_former(options: PaperOptions, classes: int) -> seg.Tuning:
    config = DaeFormerConfig(num_multimask=classes)
    if options.smoke:
        config = DaeFormerConfig(
            num_multimask=classes, image_size=(64, 64), dims=(8, 16, 24), depths=(1, 1, 1),
            decoder_depth=1, channel_heads=2,
        )  # fmt: skip
    objective = LabelMap(num_classes=classes, dice_weight=options.dice_weight)
    params = init_as_upstream(config, options.seed)
    labels = jax.tree.map(lambda _: "adamw", params)
    return seg.prepare(
        config, params, "full", labels=labels, objective=objective, **compute(options)
    )


def momentum_of(options: PaperOptions) -> MakeOptimizer:
    """SGD with momentum 0.9, whose weight decay acts on all parameters: DAE-Former's."""

    def make(tuning: seg.Tuning, rate: optax.Schedule) -> optax.GradientTransformation:
        del tuning
        decay = optax.add_decayed_weights(options.weight_decay)
        return optax.chain(decay, optax.sgd(rate, momentum=0.9))

    return make


# AdamW, 250 steps of warmup, then a polynomial of power 0.9; no clipping.
SAMED = {
    "lr": 5e-3,
    "weight_decay": 0.1,
    "schedule": "poly",
    "warmup": 250,
    "clip": "none",
    "dice_weight": 0.8,
}
METHODS = {
    method.run: method
    for method in (
        Method(name="SAMed", run="samed", build=of_sam("lora+decoder"), settings=SAMED),
        Method(name="SAMed_s", run="samed_s", build=of_sam("lora+heads"), settings=SAMED),
        Method(name="full tuning", run="full", build=of_sam("full"), settings=SAMED),
        Method(name="decoder only", run="decoder", build=of_sam("prompting"), settings=SAMED),
        Method(
            name="H-SAM",
            run="hsam",
            build=_hsam,
            settings={**SAMED, "lr": 2.5e-3, "dice_weight": 0.9},
            augment="hsam",
        ),
        Method(
            name="DAE-Former",
            run="dae_former",
            build=_dae_former,
            settings={
                **SAMED,
                "lr": 0.05,
                "weight_decay": 1e-4,
                "warmup": 0,
                "dice_weight": 0.6,
            },
            optimizer_of=momentum_of,
            augment="strong",
            notes=(
                "DAE-Former's imgaug list is approximated by the preset 'strong'",
                "its frame is 224 pixels, gradients are not clipped, momentum is float32, "
                "whatever the options",
            ),
        ),
    )
}


def trial(
    method: Method,
    options: PaperOptions,
    classes: int,
    *,
    experiment: str,
    table: str,
    run: str | None = None,
    **fields: Any,
) -> Trial:
    """A run of a method; ``fields`` are the other ones of ``Trial``.

    The method's settings hold, but for what the user set on the command line (``options.given``).
    """
    settings = {k: v for k, v in method.settings.items() if k not in options.given()}
    own = dataclasses.replace(options, **settings)
    return Trial(
        experiment=experiment,
        table=table,
        method=method.name,
        run=run or method.run,
        options=own,
        build=lambda: method.build(own, classes),
        augment=method.augment,
        optimizer_of=None if method.optimizer_of is None else method.optimizer_of(own),
        rank=method.rank,
        smoke=options.smoke,
        **{"notes": method.notes, **fields},
    )


def named(names: Sequence[str]) -> list[Method]:
    """Methods by the names of their runs."""
    return [METHODS[name] for name in names]
