"""Memory and time of training by method, planned and measured, beside PyTorch's.

    python -m benchmarks.memory

For each model, method and switch: what our compiled step plans (bytes of weights, gradients,
optimizer state, temporaries, peak; nothing runs), what a process holds at most while it makes
three steps after two, ours and PyTorch's with Meta's modules, and the median time of a step.  On a
CPU (of Linux) what a process holds is its peak resident memory above that of its imports; the peak
of the first two steps, compiling included, stands beside it; time is that of all its cores, which
other work on the machine hardly changes.  On a GPU memory is each framework's own peak, time the
clock's.  Every measurement has a process of its own and is written at once: a run that was stopped
goes on.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from experiments import memory
from samjax.atomic import atomic_write, write_json

METHODS = (("full", 0), ("decoder", 0), ("lora+decoder", 4), ("lora+decoder", 64))
METHODS += (("galore+decoder", 4), ("galore+decoder", 128))
SWITCHES = ("", "remat", "bfloat16", "remat bfloat16")
WARM_UP, STEPS = 2, 3  # GaLore's refresh and plain step are compiled in the first two


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Memory and time of training by method, planned and measured."""

    models: tuple[str, ...] = ("vit_b@512", "vit_b@1024", "sam2.1_hiera_base_plus@1024")
    """Model and side of the frame."""
    methods: tuple[str, ...] = tuple(f"{method} {rank}" for method, rank in METHODS)
    """Method and rank."""
    switches: tuple[str, ...] = SWITCHES
    """Of ours; PyTorch's side knows bfloat16 (autocast) and no remat, as Meta's modules."""
    batch: int = 1
    """Images per step."""
    kinds: tuple[str, ...] = ("plan", "ours", "torch")
    """plan: compiled only; ours and torch: steps."""
    one: str | None = None
    """Measures this (JSON) in this process, and prints it."""
    out: Path = Path("benchmarks/results/memory.json")
    """Where the figures go."""


def plan(model: str, method: str, rank: int, switches: str, batch: int) -> dict[str, Any]:
    """Our step, compiled."""
    variant, size = model.split("@")
    arguments = memory.Arguments(
        variant=variant,
        size=int(size),
        batch=batch,
        method=method,  # type: ignore[arg-type]
        rank=max(rank, 1),
        galore_any_rank=True,  # rank 128 of matrices with 112 rows: as galore-torch
        remat="all" if "remat" in switches else "no",
        dtype="bfloat16" if "bfloat16" in switches else "float32",
        clip="none",
    )
    return dataclasses.asdict(memory.measure(arguments, memory.make_mesh()))


def steps(
    kind: str, model: str, method: str, rank: int, switches: str, batch: int
) -> dict[str, Any]:
    """Real steps: the peak of this process and the time of a step."""
    from benchmarks.training import OurStep, noise_batch

    variant, size = model.split("@")
    config = memory.config_of(variant, int(size))
    images = noise_batch(config, batch)
    half = "bfloat16" in switches
    on_gpu = jax.default_backend() == "gpu"
    if kind == "torch":
        import torch

        from benchmarks.upstream_training import make_step
        from convert.reference import galore_module

        galore_module("adamw")  # imports, before the base line
        base = peak_rss()
        device = "cuda" if on_gpu else "cpu"
        _, step = make_step(config, method, max(rank, 1), images, device=device, half=half)
    else:
        base = peak_rss()
        step = OurStep(
            config,
            method,
            max(rank, 1),
            images,
            dtype="bfloat16" if half else "float32",
            remat="remat" in switches,
        )
    losses = [step() for _ in range(WARM_UP)]
    start = None if on_gpu else forget_peak() - base
    clock = time.perf_counter if on_gpu else time.process_time
    seconds = []
    for _ in range(STEPS):
        started = clock()
        losses.append(step())
        seconds.append(round(clock() - started, 3))
    if on_gpu and kind == "torch":
        held = torch.cuda.max_memory_allocated()
    elif on_gpu:
        held = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    else:
        held = peak_rss() - base
    result = {"peak": held, "step_seconds": statistics.median(seconds), "losses": losses}
    return result if start is None else {**result, "peak_at_start": start}


def peak_rss() -> int:
    """Bytes that this process has held at most, since it began or last forgot."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def forget_peak() -> int:
    """Gives freed memory back to the system and counts from now on; returns the peak so far."""
    before = peak_rss()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return before


def wanted(arguments: Arguments) -> list[dict[str, Any]]:
    """All measurements, in order."""
    return [
        {
            "kind": kind,
            "model": model,
            "method": method.split()[0],
            "rank": int(method.split()[1]),
            "switches": switches,
            "batch": arguments.batch,
        }
        for model in arguments.models
        for method in arguments.methods
        for switches in arguments.switches
        for kind in arguments.kinds
        if kind != "torch" or "remat" not in switches
    ]


def run(arguments: Arguments) -> list[dict[str, Any]]:
    """Makes what is missing in the file; returns its entries of this batch and device."""
    report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"entries": []}
    device = jax.devices()[0].device_kind
    done = [{k: v for k, v in entry.items() if k != "result"} for entry in report["entries"]]
    for settings in wanted(arguments):
        entry = {**settings, "device": device}
        if entry in done:
            continue
        command = [sys.executable, "-m", "benchmarks.memory", "--one", json.dumps(settings)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            raise RuntimeError(f"{settings}: {answer.stderr[-2000:]}")
        entry["result"] = json.loads(answer.stdout.splitlines()[-1])
        report["entries"].append(entry)
        write_json(arguments.out, {**report, "jax": jax.__version__})
        name = " ".join(str(settings[key]) for key in ("kind", "model", "method", "rank"))
        print(f"{name} {settings['switches']}: {entry['result']['peak'] / 1e9:.3f} GB", flush=True)
    settings = {"batch": arguments.batch, "device": device}
    return [entry for entry in report["entries"] if settings.items() <= entry.items()]


COLUMNS = (
    *("model", "method", "switches", "weights", "gradients", "state", "temporary", "planned"),
    *("ours", "PyTorch", "time", "PyTorch's time"),
)
LEGEND = """# Memory of a training step, batch {batch}, {device}

By `python -m benchmarks.memory`; GB (10⁹ bytes).  Planned by XLA for our step: weights, gradients
(were all there at once), optimizer state, temporary (activations, and the gradients that are alive
together), and the peak.  Held at most by a process while it steps, beyond its imports: ours, and
PyTorch's with Meta's modules, PEFT and galore-torch.  Time: of a step, over that of our full tuning
without switches; PyTorch's: over that of its own (CPU seconds of all cores on a CPU).
"""


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: a row for each model, method and switches; see ``LEGEND``."""
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for entry in entries:
        found.setdefault(_row(entry), {})[entry["kind"]] = entry["result"]
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for row in dict.fromkeys(map(_row, [*wanted(Arguments()), *entries])):
        if row not in found:
            continue
        by_kind = found[row]
        plan = by_kind.get("plan", {})
        planned = [
            plan.get(part) for part in ("weights", "gradients", "state", "temporary", "peak")
        ]
        held = [by_kind.get(kind, {}).get("peak") for kind in ("ours", "torch")]
        full = found.get((row[0], "full", "none"), {})
        times = [
            f"{by_kind[kind]['step_seconds'] / full[kind]['step_seconds']:.2f}"
            if kind in by_kind and kind in full
            else ""
            for kind in ("ours", "torch")
        ]
        numbers = ["" if value is None else f"{value / 1e9:.3f}" for value in (*planned, *held)]
        lines.append(f"| {' | '.join((*row, *numbers, *times))} |")
    return "\n".join(lines)


def _row(entry: dict[str, Any]) -> tuple[str, str, str]:
    method = f"{entry['method']} {entry['rank'] or ''}".strip()
    return entry["model"], method, entry["switches"] or "none"


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m benchmarks.memory")
    if arguments.one is not None:
        settings = json.loads(arguments.one)
        kind = settings.pop("kind")
        found = plan(**settings) if kind == "plan" else steps(kind, **settings)
        print(json.dumps(found))
        return 0
    text = table(run(arguments))
    print(text)
    with atomic_write(arguments.out.with_suffix(".md")) as temporary:
        device = jax.devices()[0].device_kind
        legend = LEGEND.format(batch=arguments.batch, device=device)
        temporary.write_text(f"{legend}\n{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
