"""Fine-tuning SAM or SAM 2 for segmentation: what is trained, the loss of a batch, the evaluation.

Shared by the experiments; how masks are read and scored is said by ``experiments.objectives``.
SAM 2 is tuned on single images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from experiments.objectives import Objective, SingleMask
from samjax.metrics import ImageScore, score_image
from samjax.models.functional import bind, init_params
from samjax.models.layers import Remat
from samjax.models.ops import resize_bilinear_numpy
from samjax.models.sam2 import ImageFeatures
from samjax.models.sam2_config import Sam2Config
from samjax.models.weights import Config
from samjax.peft.eight_bit import eight_bit
from samjax.peft.galore import galore, scale_by_adam_of_transformers
from samjax.peft.lora import Adapter, LoraConfig, init_factors, merge
from samjax.peft.paths import FREEZE, in_order, join, label_by_path, split_by_label, table
from samjax.peft.presets import EVERY_PROMPT, FACTORS_OF, MASK_HEAD, RULES, by_label, label_for
from samjax.training.clipping import clip_each
from samjax.training.loop import adamw
from samjax.training.sharding import BATCH, param_shardings, place, shardings_of
from samjax.trees import Params, flatten, unflatten

METHODS = tuple(RULES)
Clip = Literal["global", "each", "none"]
Moments = Literal["float32", "8bit"]
FACTORS = "factors"  # the label of low-rank factors


@dataclass(frozen=True)
class Tuning:
    """A model split into what a method trains and what it leaves alone.

    trainable: ``{"params": …, "factors": …}``; labels: of a tree of the same form, which optimizer
    each has; frozen: the other parameters.
    """

    config: Any  # of SAM, SAM 2 or another model that ``samjax.models.functional`` can bind
    method: str
    trainable: Params
    labels: Params
    frozen: Params
    lora: LoraConfig | None = None
    objective: Objective = field(default_factory=SingleMask)
    dtype: DTypeLike = jnp.float32
    remat: Remat = False
    mesh: Mesh | None = None

    @property
    def num_classes(self) -> int:
        """Classes beside the background."""
        return self.objective.num_classes

    def bind(self, trainable: Params, frozen: Params, key: jax.Array | None = None) -> Any:
        """The module of the given trees; ``key`` switches LoRA's dropout on."""
        adapter = {}
        if self.lora is not None:
            adapter = {
                "adapter": trainable["factors"],
                "adapter_scale": self.lora.scale,
                "adapter_dropout": self.lora.dropout,
                "drop_output": self.lora.drop_output,
                "dropout_key": key,
            }
        params = join(frozen, trainable["params"])
        return bind(self.config, params, dtype=self.dtype, remat=self.remat, **adapter)

    def adapter(self, trainable: Params) -> Adapter:
        """What the run added to the base model."""
        scale = 1.0 if self.lora is None else self.lora.scale
        factors = {} if self.lora is None else trainable["factors"]
        return Adapter(factors=factors, scale=scale, params=trainable["params"])

    def merged(self, trainable: Params) -> Params:
        """Plain parameters of the tuned model."""
        params = join(self.frozen, trainable["params"])
        return merge(params, dataclasses.replace(self.adapter(trainable), params={}))


def with_classes(
    config: Config, params: Params, num_classes: int, seed: int
) -> tuple[Config, Params]:
    """The model with ``num_classes + 1`` mask tokens, its mask head fresh, all else kept.

    Source: SAMed leaves ``mask_tokens``, the hypernetworks and the IoU head out when it loads an
    official checkpoint.
    """
    config = dataclasses.replace(config, num_multimask=num_classes)
    fresh = flatten(init_params(config, seed))
    rules = in_order([(MASK_HEAD, "fresh"), (".*", "keep")])
    labels = flatten(label_by_path(unflatten(fresh), rules))
    old = flatten(params)
    return config, unflatten(
        {path: leaf if labels[path] == "fresh" else old[path] for path, leaf in fresh.items()}
    )


def prepare(
    config: Any,
    params: Params,
    method: str,
    *,
    lora: LoraConfig | None = None,
    objective: Objective | None = None,
    labels: Params | None = None,
    fresh_head: bool = False,
    prompts: Sequence[str] = EVERY_PROMPT,
    seed: int = 0,
    **options: Any,
) -> Tuning:
    """Splits ``params`` for a method of ``samjax.peft.presets``; see ``label_for`` there.

    ``labels``, a tree like ``params``, says instead what is trained by which optimizer; factors
    there are then wherever ``lora`` is given.  ``options`` go to ``Tuning``.
    """
    with_factors = lora is not None
    if labels is None:
        labels = label_for(params, method, fresh_head=fresh_head, prompts=prompts)
        with_factors = method in FACTORS_OF
        if lora is not None and with_factors:
            lora = dataclasses.replace(lora, parts=FACTORS_OF[method] or lora.parts)
    frozen, chosen = split_by_label(params, labels, FREEZE)
    _, chosen_labels = split_by_label(labels, labels, FREEZE)
    factors, own_lora = {}, None
    if with_factors:
        own_lora = lora or LoraConfig()
        factors = init_factors(params, own_lora, jax.random.key(seed))
    trainable = {"params": chosen, "factors": factors}
    labels = {"params": chosen_labels, "factors": jax.tree.map(lambda _: FACTORS, factors)}
    objective = objective or SingleMask()
    return Tuning(config, method, trainable, labels, frozen, own_lora, objective, **options)


def on_mesh(tuning: Tuning, mesh: Mesh) -> Tuning:
    """The same with its arrays laid out over the mesh, by ``sharding.RULES``."""
    joint = {**tuning.trainable, "frozen": tuning.frozen}
    placed = place(joint, param_shardings(joint, mesh))
    frozen = placed.pop("frozen")
    return dataclasses.replace(tuning, trainable=placed, frozen=frozen, mesh=mesh)


def placed_like(trainable: Params, tuning: Tuning) -> Params:
    """``trainable``, from the host, laid out as the tuning's own."""
    return place(trainable, shardings_of(tuning.trainable))


def make_optimizer(
    tuning: Tuning,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    clip: Clip = "global",
    moments: Moments = "float32",
    rank: int = 4,
    **galore_options: Any,
) -> optax.GradientTransformation:
    """AdamW, and GaLore where the method says so; gradients are clipped to norm 1 before.

    Only matrices decay.  ``rank`` and ``galore_options``: see ``samjax.peft.galore.galore``.
    """
    plain = adamw(learning_rate, weight_decay, clip=None)
    if moments == "8bit":
        plain = eight_bit(plain)
        galore_options["inner"] = eight_bit(scale_by_adam_of_transformers())
    projected = galore(learning_rate, rank, weight_decay=weight_decay, **galore_options)
    optimizer = by_label(tuning.labels, adamw=plain, factors=plain, galore=projected)
    clips = {"global": optax.clip_by_global_norm(1.0), "each": clip_each(1.0)}
    return optimizer if clip == "none" else optax.chain(clips[clip], optimizer)


def summary(tuning: Tuning, optimizer: optax.GradientTransformation) -> str:
    """A table for a person: parameters, and MiB of weights, gradients and optimizer state."""
    state: Any = jax.eval_shape(optimizer.init, tuning.trainable)
    chain = state if isinstance(state, tuple) else (state,)
    (partition,) = (part for part in (state, *chain) if hasattr(part, "inner_states"))
    labels = {**tuning.labels, "frozen": jax.tree.map(lambda _: FREEZE, tuning.frozen)}
    return table({**tuning.trainable, "frozen": tuning.frozen}, labels, partition.inner_states)


def batch_loss(
    tuning: Tuning, trainable: Params, frozen: Params, batch: dict, key: jax.Array
) -> jax.Array:
    """The objective's loss of each example, ``(b,)``.

    A batch may hold ``features``, ``encode_image``'s output, instead of images.
    """
    module, objective = tuning.bind(trainable, frozen, key), tuning.objective
    features = batch["features"] if "features" in batch else objective.encode(module, batch)
    if isinstance(tuning.config, Sam2Config) and not isinstance(features, ImageFeatures):
        features = module.project(features)
    prediction = objective.answer(module, features, batch, key)
    return objective.loss(tuning.config, prediction, batch)


def encode_frozen(tuning: Tuning, frozen: Params, batch: dict) -> Any:
    """What of a batch's images does not change while ``tuning`` is trained, for a cache.

    Raises ``ValueError`` if the image encoder itself is trained.
    """
    trained = [path for path in flatten(tuning.trainable) if "/image_encoder/" in f"/{path}"]
    if trained:
        raise ValueError(
            f"--cache-embeddings: --method {tuning.method} trains the image encoder "
            f"({trained[0]} and {len(trained) - 1} more); expected decoder, or lora with --parts "
            "mask_decoder"
        )
    module = tuning.bind(tuning.trainable, frozen)
    if isinstance(tuning.config, Sam2Config) and "mask_decoder" in tuning.trainable["params"]:
        return tuple(module.encode_levels(batch["image"]))  # the decoder projects, and is trained
    return tuning.objective.encode(module, batch)


class Evaluator:
    """Predicts label maps for batches and scores them; compiled once."""

    def __init__(self, tuning: Tuning):
        self._tuning = tuning
        mesh = tuning.mesh
        # Logits are whole everywhere: each process then scores every image.
        whole = {} if mesh is None else {"out_shardings": NamedSharding(mesh, PartitionSpec())}
        self._rows = None if mesh is None else NamedSharding(mesh, BATCH)
        self._logits = jax.jit(partial(_predict, tuning), **whole)

    def predictions(
        self, trainable: Params, batches: Iterable[dict], losses: list[float] | None = None
    ) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
        """(index in the data set, logits ``(h, w[, k + 1])``, truth ``(h, w)``), in the frame
        without its padding.

        To ``losses`` the loss of each is added, if the objective measures it (``val_loss``).
        """
        for batch in batches:
            logits, loss = jax.tree.map(np.asarray, self._predict(trainable, batch))
            if losses is not None and loss is not None:
                losses += loss[batch["valid"]].tolist()
            for row in np.flatnonzero(batch["valid"]):
                height, width = batch["size"][row]
                truth = batch["mask"][row, :height, :width]
                yield int(batch["index"][row]), logits[row, :height, :width], truth

    def frame_scores(
        self, trainable: Params, batches: Iterable[dict], losses: list[float] | None = None
    ) -> list[ImageScore]:
        """Dice and IoU in the model frame: quick, for validation while training."""
        objective = self._tuning.objective
        return [
            score_image(to_labels(objective.main(logits)), truth, objective.num_classes)
            for _, logits, truth in self.predictions(trainable, batches, losses)
        ]

    def _predict(self, trainable: Params, batch: dict) -> tuple[jax.Array, jax.Array | None]:
        names = ("image", "size", "coords", "labels")
        if self._tuning.objective.val_loss:
            names = (*names, "mask")
        arrays = {name: batch[name] for name in names}
        if self._rows is not None:
            arrays = place(arrays, dict.fromkeys(arrays, self._rows))
        return self._logits(trainable, self._tuning.frozen, arrays)


def _predict(
    tuning: Tuning, trainable: Params, frozen: Params, batch: dict
) -> tuple[jax.Array, jax.Array | None]:
    module, objective = tuning.bind(trainable, frozen), tuning.objective
    prediction = objective.answer(module, objective.encode(module, batch), batch, None)
    loss = objective.loss(tuning.config, prediction, batch) if objective.val_loss else None
    return objective.logits(tuning.config, prediction, train=False), loss


def to_labels(logits: np.ndarray) -> np.ndarray:
    """Logits ``(h, w[, k + 1])`` to labels uint8 ``(h, w)``."""
    if logits.ndim == 2:
        return (logits > 0).astype(np.uint8)
    return logits.argmax(-1).astype(np.uint8)


def labels_at(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Logits ``(h, w[, k + 1])`` of the unpadded frame to a label map of ``size`` (h, w)."""
    if logits.ndim == 2:
        return to_labels(resize_bilinear_numpy(logits, size))
    best = np.full(size, -np.inf, np.float32)
    labels = np.zeros(size, np.uint8)
    for channel in range(logits.shape[-1]):  # one class at a time: k full-size maps may not fit
        upsampled = resize_bilinear_numpy(logits[..., channel], size)
        labels[upsampled > best] = channel
        np.maximum(best, upsampled, out=best)
    return labels
