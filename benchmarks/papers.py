"""The four papers' experiments on real pictures, small enough for two cores.

    python -m benchmarks.papers --chasedb1 DIR --idrid DIR --msd DIR

runs ``experiments.sam2lora`` on vessels (CHASEDB1) and discs (IDRiD), and ``medsaga``, ``samora``
and ``samseg`` on the Decathlon's hippocampus, each from the project's own small checkpoint, every
method of a task with the same steps, batches and learning rate.  Then ``experiments.report`` makes
its page of all, and the means go to ``benchmarks/results/papers.json``.  A run that was stopped
goes on.  One million parameters that have seen phantoms only: the figures compare the methods at
this size, and do not say how good they are on Meta's checkpoints.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from experiments import report
from experiments.record import Stored, read_stored
from samjax.atomic import write_json
from samjax.metrics import summarise_cases

ASSETS = Path(__file__).resolve().parents[1] / "experiments" / "assets"
KEPT = ("dice", "hd95", "auc")  # of the metrics
ON_FUNDUS = "--ablations --batch-size 4 --accumulate 1 --lr 1e-3 --steps 500"
ON_MSD = "--sets msd --image-size 128"
# By task: the paper's command, the option here that names its data, and its own options.
TASKS = {
    "vessels": (
        "sam2lora",
        "chasedb1",
        f"--pools vessel --sets chasedb1 {ON_FUNDUS} --image-size 512 --ranks 8 64",
    ),
    # The base has learned discs by the token of the single mask, and vessels by none.
    "discs": (
        "sam2lora",
        "idrid",
        f"--pools disc --sets idrid {ON_FUNDUS} --image-size 256 --ranks 8 64 --mask-token 0",
    ),
    # Without DAE-Former, whose 48 M parameters would take all of the time, and the ablations.
    "few_shot": (
        "medsaga",
        "msd",
        f"{ON_MSD} --few-shot msd --counts 10 50 400 --steps 400 --schedule-epochs None "
        "--lr 1e-3 --warmup 50 --only msd_n* msd_medsaga_r4 msd_samed msd_full msd_released_*",
    ),
    "two_stages": (
        "samora",
        "msd",
        f"{ON_MSD} --few msd --ablations --unlabelled msd --teachers small --ranks "
        "--cpt.steps 120 --cpt.batch-size 32 --stage1.steps 400 --steps 400 --batch-size 16 "
        "--only stage1_* msd_few_*",
    ),
    "slices": (
        "samseg",
        "msd",
        "--set msd --image-size 128 --ranks 4 16 --batch-size 4 --steps 400 --lr 1e-3 "
        "--validate-every 100 --only r4 r16 r4_random r4_volume zero_shot decoder full",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The four papers' experiments on real pictures."""

    chasedb1: Path | None = None
    """CHASEDB1's folder."""
    idrid: Path | None = None
    """IDRiD's folder of the segmentation task."""
    msd: Path | None = None
    """The Decathlon's Task04_Hippocampus."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Which of them."""
    ckpt: Path = ASSETS / "sam_vit_xs_phantom.pth"
    """What all start from."""
    runs: Path = Path("runs/papers")
    """Where the runs go, and the report."""
    out: Path = Path("benchmarks/results/papers.json")
    """Where the means go."""


def commands(arguments: Arguments) -> Iterable[list[str]]:
    """The commands, each with its own folder below ``runs``.

    Raises ``ValueError`` for an unknown task, and for one whose data are not named.
    """
    for task in arguments.tasks:
        if task not in TASKS:
            raise ValueError(f"--tasks {task}: expected some of {', '.join(TASKS)}")
        paper, data, options = TASKS[task]
        folder = getattr(arguments, data)
        if folder is None:
            raise ValueError(f"--tasks {task} needs --{data} DIR")
        yield [
            *(sys.executable, "-m", f"experiments.{paper}", *options.split()),
            *("--data", str(folder), "--ckpt", str(arguments.ckpt)),
            *("--resume", "--out", str(arguments.runs / task)),
        ]


def about(found: Stored) -> dict[str, Any]:
    """What the JSON keeps of a run: its size, its time, and the mean of each score."""
    record = found.record
    scores = {
        f"{scores.data_set}, {scores.prompt}": {
            metric: {"mean": round(s.mean, 4), "low": round(s.low, 4), "high": round(s.high, 4)}
            for metric, s in summarise_cases(scores.cases).items()
            if metric in KEPT
        }
        for scores in record.scores
    }
    return {
        "experiment": record.experiment,
        "table": record.table,
        "method": record.method,
        "seed": record.seed,
        "parameters": record.parameters,
        "memory": record.memory,
        "seconds": round(record.seconds, 1),
        "images_per_second": record.images_per_second and round(record.images_per_second, 2),
        "last_loss": record.history[-1].get("loss") if record.history else None,
        "scores": scores,
    }


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m benchmarks.papers")
    try:
        wanted = list(commands(arguments))
    except ValueError as error:
        print(f"benchmarks.papers: error: {error}", file=sys.stderr)
        return 1
    for command in wanted:
        if status := subprocess.run(command, check=False).returncode:
            return status
    runs = {
        f"{task}/{found.record.run}": about(found)
        for task in arguments.tasks
        for found in read_stored(arguments.runs / task)
    }
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": {}}
    machine = {"processor": platform.processor() or platform.machine()}
    environments = [found.environment for found in read_stored(arguments.runs)]
    write_json(
        arguments.out,
        {**machine, "environment": environments[-1], "runs": {**known["runs"], **runs}},
    )
    return report.main(["--results", str(arguments.runs), "--out", str(arguments.runs / "report")])


if __name__ == "__main__":
    sys.exit(main())
