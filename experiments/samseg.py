"""SAMSEG: LoRA of high rank on SAM's image encoder, for tumours in four MR modalities at once.

Chikumbu, "Fine Tuning SAM Through Low Rank Adaptation (LoRA)", honours thesis, University of Cape
Town, 2024.  Code: tpchikumbu/SAMSEG_adpt, branch volume.

    python -m experiments.samseg --data DIR --ckpt sam_vit_b_01ec64.pth --out runs/samseg
    python -m experiments.samseg --set msd --data DIR --ckpt FILE --ranks 4 --out runs/msd
    python -m experiments.samseg --smoke --out runs/smoke

``--data`` is BraTS-MEN 2023 as its owners publish it, or for ``msd`` a task of the Decathlon, whose
labels become one.

Published: losses at ranks 64, 128 and 256 ("val Dice-CE .1 to .02 with r = 64"); that Dice
"completely deteriorated" against models without LoRA; full tuning that was best in epoch 125 of
150.  No Dice can be read off.

q and v of every block's fused qkv have factors (36,864 values a rank for ViT-B; scale 1, A Kaiming,
B zero); all else is frozen.  The box is the truth's, without a margin, so it is nothing that a
doctor would have: what these numbers measure is the outline inside a perfect box.  Trained on the
slice of each case with most tumour, validated on every slice with tumour; slices without any have
no box.  The thesis does not say how the modalities' answers are joined; the mean of their logits is
trained and reported, and their maximum, the union of the masks, beside it.

Decided here, as the thesis does not say: the share of Dice (half), which patients are for
validation, one random slice a case, 10 epochs for the studies of ranks and slices (their curves end
soon after epoch 8).  The loss is taken in the frame at 700×1024, to which the thesis resizes its
masks; ``--loss-at slice`` takes it at 138×202, as the code does, and ``--loss-on each`` is the mean
of the modalities' losses, as in the code before its last commit.  That commit trains one modality
against the sigmoid of its own prediction, an earlier one makes no step at all, and both give
MONAI rows as channels: mistakes that are not repeated here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from experiments import paper
from experiments import segmentation as seg
from experiments.baselines import Method, compute, trial
from experiments.modalities import SETS, OfModalities, Opened, load, of_reading
from experiments.paper import PaperOptions, base_model
from experiments.scoring import score_pictures, score_volumes
from experiments.trial import Test, Trial
from samjax.data import SegmentationDataset
from samjax.models.sam import SamConfig
from samjax.models.weights import Config
from samjax.peft.lora import LoraConfig
from samjax.peft.paths import FREEZE
from samjax.training import schedules
from samjax.trees import Params

STUDY: dict[str, Any] = {"epochs": 10}
PUBLISHED_FULL: dict[str, Any] = {"epochs": 150}
ZERO_SHOT = "zero-shot"
SCORES = {
    "": of_reading(score_pictures, 0),
    "(per case)": of_reading(score_volumes, 0),
    "(union)": of_reading(score_pictures, 1),
    "(union, per case)": of_reading(score_volumes, 1),
}
# Of each case's slices with tumour: the row's addition, and what makes them.
SLICES: dict[str, tuple[str, dict[str, Any]]] = {
    "every2": ("every second slice", {"take": "foreground", "every": 2}),
    "random": ("a random slice", {"take": "random"}),
    "volume": ("every slice", {"take": "foreground"}),
}


@dataclass(frozen=True, kw_only=True)
class Arguments(PaperOptions):
    """SAMSEG and what it is compared with."""

    set: Literal["brats_men", "msd"] = "brats_men"
    """BraTS-MEN 2023, or a task of the Decathlon, such as the hippocampus."""
    modalities: tuple[str, ...] = ()
    """Names of those to take; by default all that the data set has."""
    ranks: tuple[int, ...] = (64, 128, 256)
    """LoRA's ranks; the first is that of the long run and of the study of slices."""
    loss_on: Literal["aggregate", "each"] = "aggregate"
    """The loss of the mean of the modalities' logits, or the mean of each one's loss."""
    loss_at: Literal["frame", "slice"] = "frame"
    """Where it is taken: in the model frame, or at the size that slices have in the file."""
    split_seed: int = 0
    """Which patients are for validation."""

    image_size: int | None = 1024
    """Side of the model frame in pixels."""
    epochs: int = 50
    """Passes over the training slices; by default 10 in the studies of ranks and slices, and 150
    of full tuning as published."""
    batch_size: int = 1
    """Slices per optimizer step, on all devices together, each in all modalities."""
    lr: float = 1e-4
    """Learning rate of Adam."""
    schedule: schedules.Name = "constant"
    """After the warmup."""
    warmup: int = 0
    """Warmup steps."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, on matrices; the code's last commit has 1e-5."""
    clip: seg.Clip = "none"
    """Gradients may be clipped to norm 1."""
    validate_every: int | None = None
    """Steps between validations; by default two epochs."""
    out: Path = Path("runs/samseg")
    """Folder of the results."""

    def check(self) -> None:
        """As the base class; and the features kept would be of one modality."""
        super().check()
        if self.cache_embeddings != "no":
            raise ValueError("--cache-embeddings: not for slices in several modalities")
        if not self.ranks:
            raise ValueError("--ranks: expected at least one")


def prepared(
    config: Config,
    params: Params,
    how: str,
    *,
    rank: int = 4,
    objective: OfModalities | None = None,
    **options: Any,
) -> seg.Tuning:
    """What ``how`` trains: "lora", "full", "decoder", or nothing, "zero-shot"."""
    return seg.prepare(
        config,
        params,
        how,
        lora=LoraConfig(rank=rank, parts=("image_encoder",)) if how == "lora" else None,
        labels=jax.tree.map(lambda _: FREEZE, params) if how == ZERO_SHOT else None,
        objective=objective or OfModalities(val_loss=True),
        prompts=("box",),
        **options,
    )


def trials(arguments: Arguments) -> list[Trial]:
    """All runs: ranks, the long one, baselines, slices, the loss as released."""
    return list(_trials(arguments))


def _trials(arguments: Arguments) -> Iterator[Trial]:
    chosen = SETS[arguments.set]
    data = paper.data_folder(arguments, chosen.write)
    opened = chosen.open(data, arguments.modalities, arguments.split_seed, arguments.progress)
    largest = opened.slices("train", take="largest", seed=arguments.seed)
    parts = {
        name: opened.slices("train", seed=arguments.seed, **how)
        for name, (_, how) in SLICES.items()
    }
    val = opened.slices("validation", take="foreground", seed=arguments.seed)
    first, *others = arguments.ranks

    def run(
        name: str,
        row: str,
        how: str,
        train: SegmentationDataset | None = largest,
        rank: int = first,
        **settings: Any,
    ) -> Trial:
        method = Method(
            name=row,
            run=name,
            build=lambda options, _: _build(options, how, rank, opened),
            settings=settings,
            augment="none",
        )
        return _trial(arguments, method, opened, train, val)

    for rank in (first, *others):
        yield run(f"r{rank}", f"SAMSEG r={rank}", "lora", rank=rank, **STUDY)
    yield run(f"r{first}_long", f"SAMSEG r={first}, {arguments.epochs} epochs", "lora")
    yield run("zero_shot", "zero-shot SAM", ZERO_SHOT, None)
    yield run("decoder", "decoder only", "decoder")
    yield run("full", "full tuning", "full")
    row = "full tuning as published, every slice"
    yield run("full_published", row, "full", parts["volume"], **PUBLISHED_FULL)
    for name, (title, _) in SLICES.items():
        yield run(f"r{first}_{name}", f"SAMSEG r={first}, {title}", "lora", parts[name], **STUDY)
    released: dict[str, Any] = {
        "loss_on": "each",
        "loss_at": "slice" if opened.slice_size else "frame",
    }
    row = f"SAMSEG r={first}, loss as released"
    yield run(f"r{first}_released", row, "lora", **STUDY, **released)


def _trial(
    arguments: Arguments,
    method: Method,
    opened: Opened,
    train: SegmentationDataset | None,
    val: SegmentationDataset,
) -> Trial:
    box = {"prompt_modes": "box", "box_jitter": 0.0}
    several = len(opened.modalities) > 1
    scores = {name: score for name, score in SCORES.items() if several or "union" not in name}
    test = Test(name=opened.title, dataset=val, prompts={"box": box}, scores=scores)
    if train is not None and arguments.validate_every is None:
        per_epoch = max(len(train) // arguments.batch_size, 1)
        arguments = dataclasses.replace(arguments, validate_every=2 * per_epoch)
    return trial(
        method,
        arguments,
        1,
        experiment="samseg",
        table="rank",
        train=train,
        val=None if train is None else val,
        tests=(test,),
        prompts=box,
        loader=partial(load, modalities=opened.modalities),
        settings={"modalities": opened.modalities, "crop": opened.crop},
        notes=opened.notes,
    )


def _build(options: PaperOptions, how: str, rank: int, opened: Opened) -> seg.Tuning:
    assert isinstance(options, Arguments)
    if options.loss_at == "slice" and opened.slice_size is None:
        raise ValueError("--loss-at slice: slices of several sizes; expected --loss-at frame")
    config, params = base_model(options, "sam", options.image_size or 1024)
    if not isinstance(config, SamConfig):
        raise ValueError(f"{options.ckpt}: a model of SAM 2; SAMSEG is built on SAM (v1)")
    objective = OfModalities(
        dice_weight=options.dice_weight,
        val_loss=True,
        loss_on=options.loss_on,
        slice_size=opened.slice_size if options.loss_at == "slice" else None,
    )
    return prepared(
        config,
        params,
        how,
        rank=rank,
        objective=objective,
        seed=options.seed,
        **compute(options),
    )


def smoke(arguments: Arguments) -> dict[str, Any]:
    """What ``--smoke`` changes."""
    return {**paper.SMOKE, "ranks": (4, 8), "only": ("r4", "zero_shot")}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return paper.main("samseg", Arguments, trials, argv, smoke)


if __name__ == "__main__":
    sys.exit(main())
