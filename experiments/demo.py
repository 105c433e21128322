"""The whole way in one command: PyTorch checkpoint → Flax → LoRA → scores → PyTorch checkpoint.

    python -m experiments.demo --out runs/demo

Converts a checkpoint in Meta's layout, lets it segment the optic disc in phantoms of a look that
it has never seen (no prompt), fine-tunes it with LoRA on 40 of them, scores it on 12 others before
and after, and writes an overlay sheet, the adapter and the merged PyTorch file.  No download: the
checkpoint is the small one that ``experiments.base_checkpoint`` trains; ``--ckpt`` takes an
official one instead.  Phantoms are drawn by rule: the figures say nothing about patients.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments import finetune
from experiments.base_checkpoint import HELD_OUT
from experiments.results import Result, print_scores
from samjax.data.phantom import write_phantom_folder
from samjax.training.loop import TrainingError

TRAIN, TEST = 40, 12  # phantoms
BASE = Path(__file__).parent / "assets" / "sam_vit_xs_phantom.pth"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Convert, fine-tune with LoRA, measure, convert back."""

    ckpt: Path = BASE
    """Checkpoint in Meta's layout; by default the small one of this project."""
    image_size: int | None = None
    """Side of the model frame in pixels; by default the checkpoint's."""
    steps: int = 160
    """Optimizer steps."""
    batch_size: int = 8
    """Images per step."""
    rank: int = 8
    """Rank of the LoRA factors."""
    lr: float = 6e-3
    """Peak learning rate."""
    out: Path = Path("runs/demo")
    """Folder of the results; what an earlier demo left there is replaced."""
    progress: bool = True
    """Show the progress bar."""


def run(arguments: Arguments) -> Result:
    """The demo; prints what it does."""
    from convert import command, families

    out = arguments.out
    print("1. Convert the PyTorch checkpoint to Flax")
    source = command.Arguments(ckpt=str(arguments.ckpt), out=out / "base.safetensors")
    command.run(families.FAMILIES, source)

    print(f"\n2. Draw phantoms of a look that the base has not seen ({HELD_OUT})")
    for name, count, seed in (("train", TRAIN, 1), ("test", TEST, 2)):
        shutil.rmtree(out / "data" / name, ignore_errors=True)
        write_phantom_folder(out / "data" / name, HELD_OUT, count, seed=seed, target="disc")
    print(f"  {TRAIN} to train on, {TEST} to test on, in {out / 'data'}")

    print("\n3. Fine-tune with LoRA, without prompts")
    result = finetune.run(
        finetune.Arguments(
            images=out / "data/train/images",
            masks=out / "data/train/masks",
            test_images=out / "data/test/images",
            test_masks=out / "data/test/masks",
            val_fraction=0.2,
            ckpt=str(out / "base.safetensors"),
            image_size=arguments.image_size,
            method="lora",
            rank=arguments.rank,
            projections=("q", "k", "v", "o", "mlp"),
            prompt=("none",),
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            lr=arguments.lr,
            validate_every=max(arguments.steps // 4, 1),
            checkpoint_every=0,
            progress=arguments.progress,
            out=out,
        )
    )
    print(f"\n4. Dice on the {TEST} test phantoms")
    print_scores(result)
    return result


def main(argv: list[str] | None = None) -> int:
    """The command; exit code 1 and one clear message on an error."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.demo")
    try:
        result = run(arguments)
    except (ValueError, OSError, ImportError, TrainingError) as error:
        print(f"experiments.demo: error: {error}", file=sys.stderr)
        return 1
    out = arguments.out
    print(
        f"\n{result.seconds:.0f} s of work. Look at {out / 'overlays.png'} and {out / 'curve.png'}."
    )
    print(f"Adapter: {out / 'adapter.safetensors'}; for Meta's code: {result.exported}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
