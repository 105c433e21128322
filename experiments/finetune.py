"""Fine-tune SAM or SAM 2 on one's own folder of images and masks.

    python -m experiments.finetune --images DIR --masks DIR --ckpt sam_vit_b_01ec64.pth \
        --method lora --rank 4 --prompt box --out runs/mine

The checkpoint says which it is.  Of SAM 2 the image path is tuned, as its image predictor runs it;
what only a clip needs (memory, object pointers, object score) stays as it is.

Writes to ``--out``: ``adapter.safetensors`` (what the run changed; the best step by validation
Dice), ``merged.safetensors`` (the tuned model for samjax), ``merged.pth`` or, of SAM 2,
``merged.pt`` (the same for Meta's code), ``metrics.json``, ``curve.png``, ``overlays.png`` and
TensorBoard events.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments import segmentation as seg
from experiments.results import (
    MOST_SHOWN,
    Result,
    Shown,
    print_scores,
    write_figures,
    write_metrics,
    write_models,
)
from samjax.data import Augment, FolderDataset, SegmentationDataset, make_loader, split
from samjax.models.functional import init_params
from samjax.models.sam import VARIANTS
from samjax.models.weights import Config, resize_params
from samjax.peft.adapter_files import write_adapter
from samjax.peft.galore import Projection
from samjax.peft.lora import LoraConfig
from samjax.training.log import RunLog
from samjax.training.loop import TrainingError, fit, init_state, make_step, warmup_cosine
from samjax.training.metrics import ImageScore, mean_over_classes, summarise
from samjax.trees import Params


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Fine-tune SAM or SAM 2 on a folder of images and a folder of masks."""

    images: Path
    """Folder of training images."""
    masks: Path
    """Folder of their masks: same stem, or stem and a suffix (IDRiD_01.jpg, IDRiD_01_OD.png)."""
    val_images: Path | None = None
    """Folder of validation images; by default a share of the training images is held out."""
    val_masks: Path | None = None
    """Folder of validation masks."""
    val_fraction: float = 0.2
    """Share of the training images held out where no validation folder is given."""
    test_images: Path | None = None
    """Folder of test images, scored once at the end; by default the validation images are."""
    test_masks: Path | None = None
    """Folder of test masks."""
    mask_suffix: str | None = None
    """Only masks with this suffix, where several lie beside each other."""
    classes: tuple[int, ...] | None = None
    """Mask values of the classes, such as 128 255; by default masks are binary (0/1 or 0/255)."""

    ckpt: str | None = None
    """Checkpoint to start from: Meta's .pth or .pt, a converted .safetensors, or a name on the
    Hugging Face hub such as facebook/sam2.1-hiera-tiny."""
    variant: str | None = None
    """Without --ckpt: train this model from scratch (vit_xs, vit_b, vit_l, vit_h). With it: what
    the checkpoint has to be (one of these, or sam2.1_hiera_tiny, …)."""
    image_size: int | None = None
    """Side of the square model frame in pixels; by default the checkpoint's."""

    method: Literal["lora", "lora+decoder", "decoder", "full", "galore", "galore+decoder"] = "lora"
    """What is trained: low-rank adapters, the mask decoder, everything; with galore, matrices by
    an optimizer that keeps its moments in few dimensions."""
    rank: int = 4
    """LoRA: rank of the factors. GaLore: dimensions of the projected gradients."""
    galore_gap: int = 200
    """GaLore: steps between two refreshes of the bases."""
    galore_scale: float = 0.25
    """GaLore: factor of its steps."""
    galore_projection: Projection = "std"
    """GaLore: which side of a matrix is made short."""
    alpha: float | None = None
    """LoRA: scale is alpha / rank; by default 1."""
    dropout: float = 0.0
    """LoRA: dropout on the side path."""
    projections: tuple[Literal["q", "k", "v", "o", "mlp"], ...] = ("q", "v")
    """LoRA: which projections are adapted."""
    parts: tuple[Literal["image_encoder", "mask_decoder"], ...] = ("image_encoder", "mask_decoder")
    """LoRA: which parts of the model are adapted."""

    prompt: tuple[Literal["none", "points", "box"], ...] = ("none",)
    """Prompt modes; of several, one is drawn anew for each example in each epoch."""
    num_points: int = 1
    """Points per prompt of mode points."""
    augment: Literal["none", "light", "strong"] = "light"
    """Augmentation of image and mask together."""

    epochs: int = 50
    """Passes over the training images."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 4
    """Images per optimizer step."""
    accumulate: int = 1
    """Micro-batches per step: memory for batch_size / accumulate images is enough."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, reached after the warmup, then a cosine to zero."""
    warmup: int = 20
    """Warmup steps."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices."""
    dice_weight: float = 0.5
    """Share of Dice in the loss; the rest is cross-entropy."""
    validate_every: int | None = None
    """Steps between validations; by default one epoch, or 20 times a run if that is rarer."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters stay float32."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    seed: int = 0
    """Seed of everything random."""
    workers: int = 0
    """Worker processes that load data; 0: threads."""
    progress: bool = True
    """Show the progress bar."""
    torch_export: bool = True
    """Write the merged model for Meta's code too (needs PyTorch: samjax[convert])."""
    out: Path = Path("runs/finetune")
    """Folder of the results."""

    def check(self) -> None:
        """Raises ``ValueError`` for settings that contradict each other."""
        for images, masks, name in (
            (self.val_images, self.val_masks, "val"),
            (self.test_images, self.test_masks, "test"),
        ):
            if (images is None) != (masks is None):
                raise ValueError(f"--{name}-images and --{name}-masks go together")
        if self.ckpt is None and self.variant is None:
            raise ValueError("give --ckpt FILE to start from, or --variant to train from scratch")
        if self.ckpt is None and self.variant not in VARIANTS:
            known = ", ".join(VARIANTS)
            raise ValueError(f"--variant {self.variant} from scratch: expected one of {known}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--batch-size {self.batch_size} is no multiple of --accumulate {self.accumulate}"
            )
        if self.ckpt is None and self.method != "full":
            raise ValueError(f"--method {self.method} needs --ckpt: there is nothing to adapt")


def load_model(arguments: Arguments) -> tuple[Config, Params]:
    """The base model at the wanted frame size."""
    from convert import families

    if arguments.ckpt is not None:
        loaded = families.load(arguments.ckpt, arguments.variant)
        config, params = loaded.config, loaded.params
        if arguments.image_size is not None:
            size = (arguments.image_size, arguments.image_size)
            config, params = resize_params(config, params, size)
        return config, jax.tree.map(jnp.asarray, params)
    build = VARIANTS[str(arguments.variant)]
    size = arguments.image_size
    config = build() if size is None else build((size, size))
    return config, init_params(config, arguments.seed)


def load_data(arguments: Arguments) -> tuple[SegmentationDataset, ...]:
    """Training, validation and test set; every pair's header is checked before the work begins."""

    def folder(images: Path, masks: Path) -> FolderDataset:
        dataset = FolderDataset(images, masks, arguments.classes, arguments.mask_suffix)
        dataset.check()
        return dataset

    train: SegmentationDataset = folder(arguments.images, arguments.masks)
    if arguments.val_images is not None and arguments.val_masks is not None:
        val: SegmentationDataset = folder(arguments.val_images, arguments.val_masks)
    else:
        train, val = split(train, arguments.val_fraction, arguments.seed)
    test = val
    if arguments.test_images is not None and arguments.test_masks is not None:
        test = folder(arguments.test_images, arguments.test_masks)
    return train, val, test


def prepare(arguments: Arguments) -> seg.Tuning:
    """Loads the model and splits it for the method."""
    config, params = load_model(arguments)
    num_classes = 1 if arguments.classes is None else len(arguments.classes)
    fresh_head = num_classes > 1
    if fresh_head:
        config, params = seg.with_classes(config, params, num_classes, arguments.seed)
    return seg.prepare(
        config,
        params,
        arguments.method,
        lora=LoraConfig(
            rank=arguments.rank,
            alpha=arguments.alpha,
            dropout=arguments.dropout,
            projections=arguments.projections,
            parts=arguments.parts,
        ),
        num_classes=num_classes,
        fresh_head=fresh_head,
        seed=arguments.seed,
        dtype=jnp.dtype(arguments.dtype),
        remat=arguments.remat,
        dice_weight=arguments.dice_weight,
    )


def make_optimizer(
    arguments: Arguments, tuning: seg.Tuning, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """The optimizer of the settings."""
    return seg.make_optimizer(
        tuning,
        learning_rate,
        weight_decay=arguments.weight_decay,
        rank=arguments.rank,
        update_gap=arguments.galore_gap,
        scale=arguments.galore_scale,
        projection=arguments.galore_projection,
    )


def run(arguments: Arguments) -> Result:
    """The whole run; see the module's docstring for the files it writes."""
    arguments.check()
    if arguments.torch_export and importlib.util.find_spec("torch") is None:
        raise ValueError(
            "Meta's format needs PyTorch: install samjax[convert] or --no-torch-export"
        )
    started = time.perf_counter()
    train, val, test = load_data(arguments)
    tuning = prepare(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"{len(train)} training, {len(val)} validation, {len(test)} test images")
    print(seg.summary(tuning, make_optimizer(arguments, tuning, arguments.lr)))

    evaluator = seg.Evaluator(tuning)
    before, cases_before = evaluate(arguments, tuning, evaluator, tuning.trainable, test)
    with RunLog(arguments.out) as log:
        best, best_step = optimise(arguments, tuning, evaluator, train, val, log)
    after, cases_after = evaluate(arguments, tuning, evaluator, best, test)
    seconds = time.perf_counter() - started
    exported = write_models(arguments.out, tuning, best, arguments.torch_export)
    result = Result(before, after, best_step, seconds, exported, log.history)
    write_metrics(arguments.out, arguments, result)
    write_figures(arguments.out, arguments.prompt[0], result, cases_before, cases_after)
    return result


def optimise(
    arguments: Arguments,
    tuning: seg.Tuning,
    evaluator: seg.Evaluator,
    train: SegmentationDataset,
    val: SegmentationDataset,
    log: RunLog,
) -> tuple[Params, int]:
    """Trains, and keeps (on disk as well) what validates best; returns it and its step."""
    batch_size = min(arguments.batch_size, len(train))
    if batch_size % arguments.accumulate:
        raise ValueError(f"{batch_size} training images do not split into --accumulate parts")
    per_epoch = max(len(train) // batch_size, 1)
    steps = arguments.steps or arguments.epochs * per_epoch
    every = arguments.validate_every or max(per_epoch, -(-steps // 20))
    frame = {"frame_size": tuning.config.image_size, "fit": tuning.config.fit}
    prompts = {"prompt_modes": arguments.prompt, "num_points": arguments.num_points}
    batches = make_loader(
        train,
        batch_size=batch_size,
        seed=arguments.seed,
        shuffle=True,
        augment=Augment.preset(arguments.augment),
        num_epochs=None,
        workers=arguments.workers,
        **frame,
        **prompts,
    )
    val_batches = make_loader(val, batch_size=batch_size, box_jitter=0.0, **frame, **prompts)
    schedule = warmup_cosine(arguments.lr, steps, arguments.warmup)
    optimizer = make_optimizer(arguments, tuning, schedule)
    gap = arguments.galore_gap if "galore" in arguments.method else None
    step = make_step(partial(seg.batch_loss, tuning), optimizer, arguments.accumulate, gap)
    best: dict = {"dice": -1.0, "step": 0, "trainable": tuning.trainable}

    def validate(index: int, trainable: Params) -> str:
        scores = evaluator.frame_scores(trainable, val_batches)
        dice, iou = (mean_over_classes(summarise(values)) for values in zip(*scores, strict=True))
        if not np.isfinite(dice):
            raise TrainingError("no validation image holds any foreground: Dice is undefined")
        log.add(index, {"val_dice": dice, "val_iou": iou})
        if dice > best["dice"]:
            best.update(dice=dice, step=index, trainable=jax.tree.map(np.array, trainable))
            adapter = tuning.adapter(best["trainable"])
            write_adapter(arguments.out / "adapter.safetensors", adapter, {"step": str(index)})
        return f"val Dice {dice:.4f} (best {best['dice']:.4f})"

    def record(index: int, metrics: dict[str, float]) -> None:
        log.add(index, {**metrics, "learning_rate": float(schedule(index - 1))})

    def describe(batch: dict) -> str:
        return ", ".join(train[int(i)]["name"] for i in batch["index"])

    fit(
        init_state(tuning.trainable, optimizer),
        tuning.frozen,
        step,
        batches,
        steps=steps,
        key=jax.random.key(arguments.seed),
        arrays=seg.ARRAYS,
        on_step=record,
        validate_every=every,
        validate=validate,
        describe=describe,
        progress=arguments.progress,
    )
    return best["trainable"], best["step"]


def evaluate(
    arguments: Arguments,
    tuning: seg.Tuning,
    evaluator: seg.Evaluator,
    trainable: Params,
    dataset: SegmentationDataset,
) -> tuple[dict[str, list[ImageScore]], Shown]:
    """Scores at original resolution for each prompt mode, and (example, prediction) pairs of the
    first images, by mode, for the overlays."""
    scores, shown = {}, {}
    for mode in arguments.prompt:
        batches = make_loader(
            dataset,
            frame_size=tuning.config.image_size,
            fit=tuning.config.fit,
            batch_size=min(arguments.batch_size, len(dataset)),
            prompt_modes=mode,
            num_points=arguments.num_points,
            box_jitter=0.0,
        )
        scores[mode], shown[mode] = [], []
        for index, labels in evaluator.original_predictions(trainable, batches):
            example = dataset[index]
            scores[mode].append(seg.score_image(labels, example["mask"], tuning.num_classes))
            if len(shown[mode]) < MOST_SHOWN:
                shown[mode].append((example, labels))
    return scores, shown


def main(argv: list[str] | None = None) -> int:
    """The command; exit code 1 and one clear message on bad input."""
    try:
        arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.finetune")
        result = run(arguments)
    except (ValueError, OSError, ImportError, TrainingError) as error:
        print(f"experiments.finetune: error: {error}", file=sys.stderr)
        return 1
    print_scores(result)
    print(f"{result.seconds:.0f} s; best step {result.best_step}; results in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
