"""Fine-tune SAM or SAM 2 on one's own folder of images and masks, or on a known data set.

    python -m experiments.finetune --images DIR --masks DIR --ckpt sam_vit_b_01ec64.pth \
        --method lora --rank 4 --prompt box --out runs/mine
    python -m experiments.finetune --dataset chasedb1 --source DIR --reader observer=second \
        --test-split test --ckpt sam_vit_b_01ec64.pth --out runs/vessels

The checkpoint says which it is.  Of SAM 2 the image path is tuned, as its image predictor runs it;
what only a clip needs (memory, object pointers, object score) stays as it is.

Writes to ``--out``: ``adapter.safetensors`` (what the run changed; the best step by validation
Dice), ``merged.safetensors`` (the tuned model for samjax), ``merged.pth`` or, of SAM 2,
``merged.pt`` (the same for Meta's code), ``metrics.json``, ``curve.png``, ``overlays.png`` and
TensorBoard events.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from experiments import segmentation as seg
from experiments.objectives import objective_for
from experiments.options import REMAT, TrainingOptions, is_first_process
from experiments.results import Result, print_scores, write_figures, write_metrics, write_models
from experiments.training import (
    Preempted,
    base_fingerprint,
    evaluate,
    make_optimizer,
    optimise,
)
from samjax.data import FolderDataset, SegmentationDataset, split
from samjax.data.opening import SliceOptions, SourceOptions, open_source
from samjax.models.functional import init_params
from samjax.models.sam import VARIANTS
from samjax.models.weights import Config, resize_params
from samjax.peft.lora import LoraConfig
from samjax.peft.presets import Method
from samjax.training.log import RunLog
from samjax.training.loop import TrainingError
from samjax.training.sharding import to_host
from samjax.trees import Params

SIGTERM_EXIT = 128 + 15  # as of a process that SIGTERM ended: clusters then start it again


@dataclass(frozen=True, kw_only=True)
class Arguments(TrainingOptions, SliceOptions):
    """Fine-tune SAM or SAM 2 on a folder of images and a folder of masks, or on a data set."""

    images: Path | None = None
    """Folder of training images."""
    masks: Path | None = None
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

    dataset: str | None = None
    """Instead of folders: a data set by the name of its reader, such as chasedb1."""
    source: Path | None = None
    """Its folder, as its owners publish it."""
    train_split: str = "train"
    """The part of it to train on."""
    test_split: str | None = None
    """The part to score at the end; by default the validation images are."""
    reader: tuple[str, ...] = ()
    """Its reader's own options, such as observer=second."""

    ckpt: str | None = None
    """Checkpoint to start from: Meta's .pth or .pt, a converted .safetensors, or a name on the
    Hugging Face hub such as facebook/sam2.1-hiera-tiny."""
    variant: str | None = None
    """Without --ckpt: train this model from scratch (vit_xs, vit_b, vit_l, vit_h). With it: what
    the checkpoint has to be (one of these, or sam2.1_hiera_tiny, …)."""
    image_size: int | None = None
    """Side of the square model frame in pixels; by default the checkpoint's."""

    method: Method = "lora"
    """What is trained: low-rank adapters, the mask decoder, everything; with galore, matrices by
    an optimizer that keeps its moments in few dimensions."""
    rank: int = 4
    """LoRA: rank of the factors. GaLore: dimensions of the projected gradients."""
    alpha: float | None = None
    """LoRA: scale is alpha / rank; by default 1."""
    dropout: float = 0.0
    """LoRA: dropout on the side path."""
    projections: tuple[Literal["q", "k", "v", "o", "mlp"], ...] = ("q", "v")
    """LoRA: which projections are adapted."""
    parts: tuple[Literal["image_encoder", "mask_decoder"], ...] = ("image_encoder", "mask_decoder")
    """LoRA: which parts of the model are adapted."""

    prompt: tuple[Literal["none", "points", "box", "points+box"], ...] = ("none",)
    """Prompt modes; of several, one is drawn anew for each example in each epoch."""
    num_points: int = 1
    """Points per prompt of mode points."""
    augment: Literal["none", "light", "strong", "sam2lora", "samed", "hsam", "samora"] = "light"
    """Augmentation of image and mask together; the last four as those papers' code has it."""

    torch_export: bool = True
    """Write the merged model for Meta's code too (needs PyTorch: samjax[convert])."""

    def check(self) -> None:
        """Raises ``ValueError`` for settings that contradict each other."""
        super().check()
        if (self.dataset is None) == (self.images is None) or (
            (self.dataset is None) != (self.source is None)
        ):
            raise ValueError("give --images and --masks, or --dataset and --source")
        for images, masks, name in (
            (self.images, self.masks, ""),
            (self.val_images, self.val_masks, "val-"),
            (self.test_images, self.test_masks, "test-"),
        ):
            if (images is None) != (masks is None):
                raise ValueError(f"--{name}images and --{name}masks go together")
        if self.dataset is not None and (self.val_images or self.test_images or self.classes):
            raise ValueError("--dataset has --test-split and classes of its own")
        if self.ckpt is None and self.variant is None:
            raise ValueError("give --ckpt FILE to start from, or --variant to train from scratch")
        if self.ckpt is None and self.variant not in VARIANTS:
            known = ", ".join(VARIANTS)
            raise ValueError(f"--variant {self.variant} from scratch: expected one of {known}")
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
    """Training, validation and test set; every file's presence, and of one's own folders every
    pair's header, is checked before the work begins."""

    def folder(images: Path, masks: Path) -> FolderDataset:
        dataset = FolderDataset(images, masks, arguments.classes, arguments.mask_suffix)
        dataset.check()
        return dataset

    def part(split: str) -> SegmentationDataset:
        of_volumes = {
            field.name: getattr(arguments, field.name) for field in dataclasses.fields(SliceOptions)
        }
        options = SourceOptions(
            dataset=str(arguments.dataset),
            source=Path(str(arguments.source)),
            split=split,
            **of_volumes,
        )
        pairs = (item.partition("=")[::2] for item in arguments.reader)
        given = [[f"--{name.replace('_', '-')}", *value.split(",")] for name, value in pairs]
        return open_source(options, [word for words in given for word in words])

    train: SegmentationDataset
    if arguments.dataset is not None:
        train = part(arguments.train_split)
    else:
        assert arguments.images is not None
        assert arguments.masks is not None
        train = folder(arguments.images, arguments.masks)
    if arguments.val_images is not None and arguments.val_masks is not None:
        val: SegmentationDataset = folder(arguments.val_images, arguments.val_masks)
    else:
        train, val = split(train, arguments.val_fraction, arguments.seed)
    test = val
    if arguments.test_images is not None and arguments.test_masks is not None:
        test = folder(arguments.test_images, arguments.test_masks)
    elif arguments.dataset is not None and arguments.test_split is not None:
        test = part(arguments.test_split)
    return train, val, test


def prepare(arguments: Arguments, num_classes: int) -> seg.Tuning:
    """Loads the model and splits it for the method."""
    config, params = load_model(arguments)
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
        objective=objective_for(num_classes, arguments.dice_weight),
        fresh_head=fresh_head,
        prompts=arguments.prompt,
        seed=arguments.seed,
        dtype=jnp.dtype(arguments.dtype),
        remat=REMAT[arguments.remat],
    )


def run(arguments: Arguments) -> Result:
    """The whole run; see the module's docstring for the files it writes."""
    arguments.check()
    if arguments.torch_export and importlib.util.find_spec("torch") is None:
        raise ValueError(
            "Meta's format needs PyTorch: install samjax[convert] or --no-torch-export"
        )
    started = time.perf_counter()
    mesh = arguments.mesh.start()
    train, val, test = load_data(arguments)
    tuning = prepare(arguments, getattr(train, "num_classes", 1))
    base = base_fingerprint(tuning)
    tuning = seg.on_mesh(tuning, mesh)
    first = is_first_process()
    if first:
        arguments.out.mkdir(parents=True, exist_ok=True)
        print(f"{len(train)} training, {len(val)} validation, {len(test)} test images")
        optimizer = make_optimizer(arguments, tuning, arguments.rank, arguments.lr)
        print(seg.summary(tuning, optimizer))

    evaluator = seg.Evaluator(tuning)
    score = partial(evaluate, arguments, tuning, evaluator)
    modes, points = arguments.prompt, arguments.num_points
    before, cases_before = score(tuning.trainable, test, modes, points)
    with RunLog(arguments.out, write=first) as log:
        trained = optimise(
            arguments,
            tuning,
            evaluator,
            train,
            val,
            log,
            rank=arguments.rank,
            base=base,
            augment=arguments.augment,
            prompts={"prompt_modes": modes, "num_points": points},
        )
    best = trained.best
    after, cases_after = score(seg.placed_like(best, tuning), test, modes, points)
    seconds = time.perf_counter() - started
    host = dataclasses.replace(tuning, frozen=to_host(tuning.frozen))
    exported = None
    if first:
        exported = write_models(arguments.out, host, best, arguments.torch_export)
    result = Result(before, after, trained.best_step, seconds, exported, log.history)
    if first:
        write_metrics(arguments.out, arguments, result)
        write_figures(arguments.out, modes[0], result, cases_before, cases_after)
    return result


def main(argv: list[str] | None = None) -> int:
    """The command; exit code 1 and one clear message on bad input, 143 after SIGTERM."""
    try:
        arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.finetune")
        result = run(arguments)
    except (ValueError, OSError, ImportError, TrainingError) as error:
        print(f"experiments.finetune: error: {error}", file=sys.stderr)
        return 1
    except Preempted as error:
        print(f"experiments.finetune: {error}; continue with --resume", file=sys.stderr)
        return SIGTERM_EXIT
    if not is_first_process():
        return 0
    print_scores(result)
    print(f"{result.seconds:.0f} s; best step {result.best_step}; results in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
