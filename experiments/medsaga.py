"""MedSAGa: SAM for k classes with GaLore on its image encoder, few-shot and with little memory.

Paper: Mahla et al., arXiv 2407.15042.  Code: Annie2603/MedSAGa (branches annie and navyansh-new).

    python -m experiments.medsaga --data DIR --ckpt sam_vit_b_01ec64.pth --out runs/medsaga
    python -m experiments.medsaga --smoke --out runs/smoke

``--data`` holds ``Synapse/``, ``BraTS2020/`` and ``ChestX-ray8/`` as their owners publish them
(``experiments.sets``); ``--sets`` names which of them.

Published: "memory efficiency 66 % better" on average than its baselines; Dice on a level with
them; on ChestX-ray8 a plateau from about 500 images on; a lower loss with warmup.  Its tables could
not be read by us.

What is trained: the matrices of the encoder's blocks by GaLore, the rest of the blocks, prompt
encoder and mask decoder by AdamW; patch embedding, positions and neck stay.  Rank 4 and a refresh
every 200 steps are those of the authors' own GaLore, without a scale.  Their released code does
something else: the GaLore group has no rank, so that it is AdamW with full moments
(``released_blocks``; all logged runs also freeze the decoder), and at its last commit every
parameter of the encoder is frozen by a wrong name (``released_frozen``), which stores no
activations and may explain the 66 %.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import paper
from experiments.baselines import METHODS, SAMED, Method, named, of_sam, trial
from experiments.paper import PaperOptions
from experiments.sets import SETS, check_names
from experiments.trial import Trial
from samjax.data import few_shot
from samjax.data.opening import class_names_of

GALORE = {**SAMED, "galore_gap": 200, "galore_scale": 1.0}
FEW = (25, 50, 100, 200, 300, 500, 700)  # images; the paper says only that 500 is the plateau


@dataclass(frozen=True, kw_only=True)
class Arguments(PaperOptions):
    """MedSAGa and what it is compared with."""

    sets: tuple[str, ...] = ("synapse", "brats2020", "chestxray8")
    """Data sets: synapse, brats2020, chestxray8, msd (a task of the Decathlon)."""
    few_shot: tuple[str, ...] = ("chestxray8",)
    """Data sets for the curve over the number of images."""
    counts: tuple[int, ...] = FEW
    """Images of that curve; as many as there are of a smaller set."""
    ranks: tuple[int, ...] = (16, 64, 128)
    """GaLore's ranks beside 4, on the first data set."""

    image_size: int | None = 240
    """Side of the model frame in pixels; the authors' logs have 240."""
    epochs: int = 160
    """Passes over the training images."""
    schedule_epochs: int | None = 200
    """Epochs that the schedule is made for, if not those of the run."""
    batch_size: int = 12
    """Images per optimizer step, on all devices together."""
    out: Path = Path("runs/medsaga")
    """Folder of the results."""


def medsaga(rank: int = 4, **settings: Any) -> Method:
    """The method at a rank of GaLore."""
    return Method(
        name=f"MedSAGa r={rank}",
        run=f"medsaga_r{rank}",
        build=of_sam("galore+decoder"),
        settings={**GALORE, **settings},
        rank=rank,
    )


RELEASED = (
    Method(
        name="MedSAGa as logged (AdamW on the blocks only)",
        run="released_blocks",
        build=of_sam("blocks"),
        settings=SAMED,
    ),
    Method(
        name="MedSAGa as released (encoder frozen)",
        run="released_frozen",
        build=of_sam("prompting"),
        settings=SAMED,
    ),
)
BASELINES = named(["samed", "samed_s", "full", "dae_former"])


def trials(arguments: Arguments) -> list[Trial]:
    """All runs: methods by data set, ranks, both sides of GaLore, warmup, and few images."""
    return list(_trials(arguments))


def _trials(arguments: Arguments) -> Iterator[Trial]:
    check_names(arguments, "sets", "few_shot")
    data = paper.data_folder(arguments, lambda folder: _write(folder, arguments))
    opened = {name: SETS[name].open(data) for name in (*arguments.sets, *arguments.few_shot)}

    def runs(name: str, methods: list[Method], prefix: str = "", count: int | None = None):
        train, test = opened[name]
        train = train if count is None else few_shot(train, count, arguments.seed)
        for method in methods:
            yield trial(
                method,
                arguments,
                len(class_names_of(test.dataset) or ("foreground",)),
                experiment="medsaga",
                table=SETS[name].title if count is None else f"{SETS[name].title}, {count} images",
                run=f"{name}_{prefix}{method.run}",
                train=train,
                tests=(test,),
            )

    for name in arguments.sets:
        yield from runs(name, [medsaga(), *BASELINES, *RELEASED])
    if arguments.sets:
        ranks = [medsaga(rank) for rank in arguments.ranks]
        both = dataclasses.replace(
            medsaga(galore_projection="full"), name="MedSAGa r=4, both sides", run="medsaga_both"
        )
        cold = dataclasses.replace(
            medsaga(warmup=0), name="MedSAGa r=4, no warmup", run="medsaga_cold"
        )
        yield from runs(arguments.sets[0], [*ranks, both, cold])
    for name in arguments.few_shot:
        most = len(opened[name][0])
        for count in sorted({min(count, most) for count in arguments.counts}):
            yield from runs(name, [medsaga(), METHODS["samed"]], f"n{count:03d}_", count)


def _write(folder: Path, arguments: Arguments) -> None:
    for name in dict.fromkeys((*arguments.sets, *arguments.few_shot)):
        SETS[name].write(folder / SETS[name].folder)


def smoke(arguments: Arguments) -> dict[str, Any]:
    """What ``--smoke`` changes."""
    return {
        **paper.SMOKE,
        "sets": ("synapse", "brats2020"),
        "counts": (2, 4),
        "ranks": (8,),
        "only": ("synapse_medsaga_r4", "synapse_samed"),
    }


def main(argv: list[str] | None = None) -> int:
    """The command."""
    return paper.main("medsaga", Arguments, trials, argv, smoke)


if __name__ == "__main__":
    sys.exit(main())
