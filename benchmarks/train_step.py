"""Speed of a training step over upstream's in PyTorch, alternating in one run.

    python -m benchmarks.train_step --variant vit_b --size 512 --method lora+decoder

The same model, batch, loss and trained parameters; upstream's LoRA is PEFT's, its GaLore
galore-torch's.  On a CPU both compute in float32; on a GPU in bfloat16, and ``--compile`` gives
upstream ``torch.compile``.  GaLore's refresh falls into the warm-up.  The figures go to
``benchmarks/results/`` as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from benchmarks.timing import alternate, machine
from benchmarks.training import OurStep, noise_batch
from benchmarks.upstream_training import make_step
from experiments.memory import config_of
from samjax.atomic import write_json
from samjax.peft.presets import Method


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Speed of a training step over upstream's."""

    variant: str = "vit_b"
    """Such as vit_b or sam2.1_hiera_tiny."""
    size: int = 512
    """Side of the frame in pixels."""
    batch: int = 1
    """Images per step."""
    method: Method = "lora+decoder"
    """What is trained; lora+decoder is SAMed's."""
    rank: int = 4
    """Of LoRA or GaLore."""
    rounds: int = 3
    """Alternating rounds after a warm-up."""
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile upstream's image encoder."""
    out: Path = Path("benchmarks/results/train_step.json")
    """Where the figures go, beside those of other settings."""


def run(arguments: Arguments) -> dict[str, Any]:
    """The benchmark; returns what it adds to the file."""
    import torch

    config = config_of(arguments.variant, arguments.size)
    batch = noise_batch(config, arguments.batch)
    on_gpu = jax.default_backend() == "gpu"
    device = "cuda" if on_gpu else "cpu"
    model, upstream = make_step(
        config, arguments.method, arguments.rank, batch, device=device, half=on_gpu
    )
    if arguments.compile:
        model.image_encoder.forward = torch.compile(model.image_encoder.forward)
    dtype = "bfloat16" if on_gpu else "float32"
    ours = OurStep(config, arguments.method, arguments.rank, batch, dtype=dtype, remat=False)
    report = {
        "image_size": config.image_size,
        "batch": arguments.batch,
        "dtype": dtype,
        "upstream_compiled": arguments.compile,
        **machine(),
        **alternate(upstream, ours, arguments.rounds),
    }
    best = min(report["ours_seconds"])
    report["images_per_second"] = round(arguments.batch / best, 4)
    return report


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m benchmarks.train_step")
    report = run(arguments)
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    flags = f", {report['xla_flags']}" if report["xla_flags"] else ""
    name = f"{arguments.variant}@{arguments.size}, {arguments.method}, {report['device']}{flags}"
    write_json(arguments.out, {**known, name: report})
    print(name)
    for key, value in report.items():
        print(f"  {key:<28}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
