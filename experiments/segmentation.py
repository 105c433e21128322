"""Fine-tuning SAM or SAM 2 for segmentation: what is trained, the loss of a batch, the evaluation.

Shared by the experiments.  Binary masks use the single-mask token, so that the tuned model stays an
ordinary SAM, prompts and all; k classes use SAMed's k + 1 mask tokens (arXiv 2304.13785), where
channel c is class c and channel 0 the background.  SAM 2 is tuned on single images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from samjax.metrics import ImageScore, score_image
from samjax.models.functional import bind, init_params
from samjax.models.layers import Remat
from samjax.models.mask_decoder import MaskPrediction
from samjax.models.ops import resize_bilinear, resize_bilinear_numpy
from samjax.models.sam2 import ImageFeatures, single_mask
from samjax.models.sam2_config import Sam2Config
from samjax.models.weights import Config
from samjax.peft.eight_bit import eight_bit
from samjax.peft.galore import galore, scale_by_adam_of_transformers
from samjax.peft.lora import Adapter, LoraConfig, init_factors, merge
from samjax.peft.paths import FREEZE, in_order, join, label_by_path, split_by_label, table
from samjax.peft.presets import EVERY_PROMPT, MASK_HEAD, RULES, WITH_FACTORS, by_label, label_for
from samjax.training.clipping import clip_each
from samjax.training.loop import adamw
from samjax.training.losses import segmentation_loss
from samjax.training.sharding import BATCH, param_shardings, place, shardings_of
from samjax.trees import Params, flatten, unflatten

METHODS = tuple(RULES)
Clip = Literal["global", "each", "none"]
Moments = Literal["float32", "8bit"]
FACTORS = "factors"  # the label of low-rank factors
ARRAYS = ("image", "mask", "size", "coords", "labels")  # of a batch, what the loss reads


@dataclass(frozen=True)
class Tuning:
    """A model split into what a method trains and what it leaves alone.

    trainable: ``{"params": …, "factors": …}``; labels: of a tree of the same form, which optimizer
    each has; frozen: the other parameters.
    """

    config: Config
    method: str
    trainable: Params
    labels: Params
    frozen: Params
    lora: LoraConfig | None = None
    num_classes: int = 1
    dtype: DTypeLike = jnp.float32
    remat: Remat = False
    dice_weight: float = 0.5
    mesh: Mesh | None = None

    def bind(self, trainable: Params, frozen: Params, key: jax.Array | None = None) -> Any:
        """The module of the given trees; ``key`` switches LoRA's dropout on."""
        adapter = {}
        if self.lora is not None:
            adapter = {
                "adapter": trainable["factors"],
                "adapter_scale": self.lora.scale,
                "adapter_dropout": self.lora.dropout,
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
    config: Config,
    params: Params,
    method: str,
    *,
    lora: LoraConfig,
    num_classes: int = 1,
    fresh_head: bool = False,
    prompts: Sequence[str] = EVERY_PROMPT,
    seed: int = 0,
    **options: Any,
) -> Tuning:
    """Splits ``params`` for a method of ``samjax.peft.presets``; see ``label_for`` there.

    ``options`` go to ``Tuning``.
    """
    labels = label_for(params, method, fresh_head=fresh_head, prompts=prompts)
    frozen, chosen = split_by_label(params, labels, FREEZE)
    _, chosen_labels = split_by_label(labels, labels, FREEZE)
    factors, own_lora = {}, None
    if method in WITH_FACTORS:
        parts = ("image_encoder",) if "decoder" in method else lora.parts
        own_lora = dataclasses.replace(lora, parts=parts)
        factors = init_factors(params, own_lora, jax.random.key(seed))
    trainable = {"params": chosen, "factors": factors}
    labels = {"params": chosen_labels, "factors": jax.tree.map(lambda _: FACTORS, factors)}
    return Tuning(config, method, trainable, labels, frozen, own_lora, num_classes, **options)


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


def frame_logits(
    config: Config, prediction: MaskPrediction, num_classes: int, *, train: bool
) -> jax.Array:
    """Logits in the model frame: ``(b, h, w)``, or ``(b, h, w, k + 1)`` for k > 1 classes.

    Of a binary mask they are the single-mask token's, which is trained; when predicting with SAM 2,
    those of the best other one where it is not stable, as in both of Meta's predictors.
    """
    logits = prediction.low_res_logits
    if num_classes > 1:
        return jnp.moveaxis(resize_bilinear(logits, config.image_size), 1, -1)
    if train or not isinstance(config, Sam2Config):
        return resize_bilinear(logits[:, 0], config.image_size)
    return resize_bilinear(single_mask(prediction)[0], config.image_size)


def valid_pixels(config: Config, sizes: jax.Array) -> jax.Array:
    """Bool ``(b, h, w)``: inside the unpadded part of the frame."""
    height, width = config.image_size
    rows = jnp.arange(height)[None, :, None] < sizes[:, 0, None, None]
    columns = jnp.arange(width)[None, None, :] < sizes[:, 1, None, None]
    return rows & columns


def batch_loss(
    tuning: Tuning, trainable: Params, frozen: Params, batch: dict, key: jax.Array
) -> jax.Array:
    """Dice + CE of each example, ``(b,)``, on logits in the model frame.

    A batch may hold ``features``, ``encode_image``'s output, instead of images.
    """
    module = tuning.bind(trainable, frozen, key)
    features = batch["features"] if "features" in batch else encode(module, batch)
    if isinstance(tuning.config, Sam2Config) and not isinstance(features, ImageFeatures):
        features = module.project(features)
    prediction = module.answer(features, batch["coords"], batch["labels"])
    logits = frame_logits(tuning.config, prediction, tuning.num_classes, train=True)
    valid = valid_pixels(tuning.config, batch["size"])
    return segmentation_loss(logits, batch["mask"], valid, dice_weight=tuning.dice_weight)


def encode(module: Any, batch: dict) -> Any:
    """The image encoder's output, with leading axis b in every array."""
    return module.encode_image(batch["image"], batch["size"])


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
    return encode(module, batch)


class Evaluator:
    """Predicts label maps for batches and scores them; compiled once."""

    def __init__(self, tuning: Tuning):
        self._tuning = tuning
        mesh = tuning.mesh
        # Logits are whole everywhere: each process then scores every image.
        whole = {} if mesh is None else {"out_shardings": NamedSharding(mesh, PartitionSpec())}
        self._rows = None if mesh is None else NamedSharding(mesh, BATCH)
        self._logits = jax.jit(partial(_predict_logits, tuning), **whole)

    def frame_scores(self, trainable: Params, batches: Iterable[dict]) -> list[ImageScore]:
        """Dice and IoU in the model frame: quick, for validation while training."""
        scores = []
        for batch in batches:
            logits = np.asarray(self._predict(trainable, batch))
            for row in np.flatnonzero(batch["valid"]):
                height, width = batch["size"][row]
                labels = _to_labels(logits[row, :height, :width])
                truth = batch["mask"][row, :height, :width]
                scores.append(score_image(labels, truth, self._tuning.num_classes))
        return scores

    def original_predictions(
        self, trainable: Params, batches: Iterable[dict]
    ) -> Iterable[tuple[int, np.ndarray]]:
        """(index in the data set, uint8 label map at the image's original size)."""
        for batch in batches:
            logits = np.asarray(self._predict(trainable, batch))
            for row in np.flatnonzero(batch["valid"]):
                height, width = batch["size"][row]
                yield (
                    int(batch["index"][row]),
                    labels_at(
                        logits[row, :height, :width], tuple(batch["original_size"][row].tolist())
                    ),
                )

    def _predict(self, trainable: Params, batch: dict) -> jax.Array:
        arrays = {name: batch[name] for name in ARRAYS if name != "mask"}
        if self._rows is not None:
            arrays = place(arrays, dict.fromkeys(arrays, self._rows))
        return self._logits(trainable, self._tuning.frozen, arrays)


def _predict_logits(tuning: Tuning, trainable: Params, frozen: Params, batch: dict) -> jax.Array:
    module = tuning.bind(trainable, frozen)
    prediction = module(batch["image"], batch["size"], batch["coords"], batch["labels"])
    return frame_logits(tuning.config, prediction, tuning.num_classes, train=False)


def _to_labels(logits: np.ndarray) -> np.ndarray:
    if logits.ndim == 2:
        return (logits > 0).astype(np.uint8)
    return logits.argmax(-1).astype(np.uint8)


def labels_at(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Logits ``(h, w[, k + 1])`` of the unpadded frame to a label map of ``size`` (h, w)."""
    if logits.ndim == 2:
        return _to_labels(resize_bilinear_numpy(logits, size))
    best = np.full(size, -np.inf, np.float32)
    labels = np.zeros(size, np.uint8)
    for channel in range(logits.shape[-1]):  # one class at a time: k full-size maps may not fit
        upsampled = resize_bilinear_numpy(logits[..., channel], size)
        labels[upsampled > best] = channel
        np.maximum(best, upsampled, out=best)
    return labels
