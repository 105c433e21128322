"""Will it fit?  The memory of a training step, from the compiled program, without running it.

    python -m experiments.memory --variant sam2.1_hiera_large --method galore --batch 8 --size 1024

Compiles the real step of ``experiments.finetune`` for the asked setting, and prints per device what
the weights, gradients, optimizer state and activations take and what the program needs at its peak;
then the largest batch for cards of 8 to 141 GB and, with ``--budget``, the switches that would make
the asked batch fit.

XLA compiles for the machine that this runs on: on a CPU its figures differ from a GPU's, whose
kernels fuse more and attend in other chunks.  Nothing is allocated, so any model can be asked for;
``--devices 8`` pretends to have as many CPU devices.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import segmentation as seg
from experiments.options import REMAT, RematName
from samjax.atomic import write_json
from samjax.models import sam, sam2_config
from samjax.models.functional import abstract_params
from samjax.models.weights import Config
from samjax.peft.lora import LoraConfig
from samjax.peft.presets import Method
from samjax.training.loop import init_state, make_programs
from samjax.training.sharding import (
    BATCH,
    batch_parts,
    check_batch,
    make_mesh,
    param_shardings,
    state_placement,
)

BUDGETS = (8, 16, 24, 40, 80, 141)  # GB (10⁹ bytes) of common cards
GB = 1e9
SLOTS = 2  # prompt points in a batch
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The memory of a training step, from the compiled program."""

    variant: str = "vit_b"
    """vit_b, vit_l, vit_h, sam2.1_hiera_tiny, sam2_hiera_large, …"""
    size: int = 1024
    """Side of the model frame in pixels."""
    batch: int = 1
    """Images per optimizer step, on all devices together."""
    accumulate: int = 1
    """Micro-batches per step."""
    method: Method = "lora"
    """What is trained."""
    rank: int = 4
    """Of LoRA, or of GaLore."""
    galore_any_rank: bool = False
    """GaLore: a matrix with a side below the rank keeps that side, instead of an error."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters stay float32."""
    remat: RematName = "no"
    """What of a block the backward pass computes anew."""
    clip: seg.Clip = "global"
    """A global norm is known only when all gradients are there; each or none let them go."""
    moments: seg.Moments = "float32"
    """Of the optimizer's moments."""
    devices: int = 1
    """Devices of the mesh; on a CPU as many are pretended."""
    fsdp: int = 1
    """Of them, how many share out the parameters."""
    tensor: int = 1
    """Of them, how many share out the columns or rows of every layer."""
    budget: float | None = None
    """GB (10⁹ bytes) of a device: names switches that make the batch fit."""
    out: Path | None = None
    """Also writes the figures as JSON."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on each device.

    weights: of all parameters; gradients: of what is trained, were all there at once; state: the
    optimizer's; batch: its images and masks; temporary: what the program allocates (activations,
    and the gradients that are alive together); peak: all that it holds at once.
    """

    weights: int
    gradients: int
    state: int
    batch: int
    temporary: int
    peak: int
    compile_seconds: float

    @property
    def activations(self) -> int:
        """What is left of the temporaries besides the gradients, if those are all there."""
        return max(self.temporary - self.gradients, 0)


def config_of(variant: str, size: int) -> Config:
    """The config of a model by its name, at a frame of ``size`` pixels squared."""
    if variant in sam.VARIANTS:
        return sam.VARIANTS[variant]((size, size))
    if variant not in sam2_config.VARIANTS:
        known = ", ".join([*sam.VARIANTS, *sam2_config.VARIANTS])
        raise ValueError(f"--variant {variant}: expected one of {known}")
    return sam2_config.sam2(*sam2_config.VARIANTS[variant], (size, size))


def measure(arguments: Arguments, mesh: Mesh) -> Footprint:
    """Compiles the step of the settings and reads what it needs.

    Of GaLore there are two programs; the figures are those of the larger.
    """
    check_batch(mesh, arguments.batch, arguments.accumulate)
    programs, (state, frozen, batch, key) = lowered_inputs(arguments, mesh)
    started = time.perf_counter()
    plans = [
        # What is allocated does not depend on how well LLVM optimises the code.
        program.lower(state, frozen, batch, key).compile(QUICKLY).memory_analysis()
        for program in programs.values()
    ]
    compiling = time.perf_counter() - started
    plan = max(plans, key=lambda plan: plan.temp_size_in_bytes)
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return Footprint(
        weights=held_bytes({**state.trainable, "frozen": frozen}),
        gradients=held_bytes(state.trainable),
        state=held_bytes(state.optimizer),
        batch=held_bytes(batch),
        temporary=plan.temp_size_in_bytes,
        peak=held + plan.temp_size_in_bytes,
        compile_seconds=round(compiling, 1),
    )


def lowered_inputs(arguments: Arguments, mesh: Mesh) -> tuple[dict[str, Any], tuple]:
    """The programs of a step, and the shapes and shardings of what they take."""
    config = config_of(arguments.variant, arguments.size)
    tuning = seg.prepare(
        config,
        abstract_params(config),
        arguments.method,
        lora=LoraConfig(rank=arguments.rank),
        dtype=jnp.dtype(arguments.dtype),
        remat=REMAT[arguments.remat],
    )
    joint = {**tuning.trainable, "frozen": tuning.frozen}
    joint = with_shardings(joint, param_shardings(joint, mesh))
    frozen = joint.pop("frozen")
    tuning = dataclasses.replace(tuning, trainable=joint, frozen=frozen, mesh=mesh)
    optimizer = seg.make_optimizer(
        tuning,
        1e-3,
        weight_decay=0.01,
        clip=arguments.clip,
        moments=arguments.moments,
        rank=arguments.rank,
        any_rank=arguments.galore_any_rank,
    )
    placement = state_placement(joint, optimizer, mesh)
    shapes = jax.eval_shape(partial(init_state, optimizer=optimizer), joint)
    state = with_shardings(shapes, placement)
    programs = make_programs(
        partial(seg.batch_loss, tuning),
        optimizer,
        arguments.accumulate,
        "galore" in arguments.method,
        placement,
    )
    side, b = arguments.size, arguments.batch
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, BATCH)
    batch = {
        "image": jax.ShapeDtypeStruct((b, side, side, 3), jnp.uint8, sharding=rows),
        "mask": jax.ShapeDtypeStruct((b, side, side), jnp.uint8, sharding=rows),
        "size": jax.ShapeDtypeStruct((b, 2), jnp.int32, sharding=rows),
        "coords": jax.ShapeDtypeStruct((b, SLOTS, 2), jnp.float32, sharding=rows),
        "labels": jax.ShapeDtypeStruct((b, SLOTS), jnp.int32, sharding=rows),
    }
    key = jax.eval_shape(jax.random.key, 0)
    return programs, (state, frozen, batch, with_shardings(key, whole))


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes with a sharding each."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def held_bytes(tree: Any) -> int:
    """Bytes of the arrays on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def largest_batches(
    arguments: Arguments, asked: Footprint, mesh: Mesh
) -> tuple[dict[float, int], float]:
    """The largest batch for each budget, and the bytes that another image per device takes.

    The peak grows linearly with the batch: from the asked one, and one with an image more a device.
    """
    parts = batch_parts(mesh) * arguments.accumulate
    more = measure(dataclasses.replace(arguments, batch=arguments.batch + parts), mesh)
    slope = max(more.peak - asked.peak, 1)
    budgets = [*BUDGETS, *([arguments.budget] if arguments.budget else [])]
    found = {}
    for budget in sorted(set(budgets)):
        steps = int((budget * GB - asked.peak) // slope)
        found[budget] = max(arguments.batch + steps * parts, 0) // parts * parts
    return found, slope


def proposals(arguments: Arguments, mesh: Mesh) -> list[tuple[str, Footprint]]:
    """Switches, each added to the ones before it, until the batch fits the budget."""
    assert arguments.budget is not None
    parts = batch_parts(mesh)
    switches: list[tuple[str, dict[str, Any]]] = [
        ("--remat dots", {"remat": "dots"}),
        ("--remat all", {"remat": "all"}),
        ("--dtype bfloat16", {"dtype": "bfloat16"}),
        ("--clip each", {"clip": "each"}),
        (f"--accumulate {arguments.batch // parts}", {"accumulate": arguments.batch // parts}),
        ("--method galore --rank 4", {"method": "galore", "rank": 4}),
        ("--method lora --rank 4", {"method": "lora", "rank": 4}),
        ("--size 512", {"size": 512}),
    ]
    tried, names = [], []
    for name, change in switches:
        changed = dataclasses.replace(arguments, **change)
        weaker = arguments.remat == "all" and change.get("remat") == "dots"
        if changed == arguments or weaker or (arguments.method == "lora" and "method" in change):
            continue
        arguments = changed
        flag = name.split()[0]
        names = [*(old for old in names if not old.startswith(f"{flag} ")), name]
        found = measure(arguments, mesh)
        tried.append((" ".join(names), found))
        if found.peak <= arguments.budget * GB:
            break
    return tried


def run(arguments: Arguments) -> dict[str, Any]:
    """Measures and prints; returns the figures."""
    mesh = make_mesh(None, arguments.fsdp, arguments.tensor, jax.devices()[: arguments.devices])
    kind = jax.devices()[0].device_kind
    asked = measure(arguments, mesh)
    print(
        f"{arguments.variant}, {arguments.size} x {arguments.size}, {arguments.method}, batch "
        f"{arguments.batch}, {mesh.size} x {kind}; compiled in {asked.compile_seconds:.0f} s"
    )
    for name in ("weights", "gradients", "state", "batch", "activations", "peak"):
        print(f"  {name:<12}{getattr(asked, name) / GB:>9.3f} GB a device")
    batches, slope = largest_batches(arguments, asked, mesh)
    print(f"another image takes {slope / GB:.3f} GB; the largest batch that fits")
    for budget, batch in batches.items():
        print(f"  {budget:>5g} GB: {batch if batch else 'none'}")
    report = {
        "settings": {**dataclasses.asdict(arguments), "out": None},
        "device": kind,
        "bytes": dataclasses.asdict(asked),
        "largest_batch": {f"{budget:g} GB": batch for budget, batch in batches.items()},
        "proposals": [],
    }
    if arguments.budget is not None and asked.peak > arguments.budget * GB:
        print(f"batch {arguments.batch} does not fit {arguments.budget:g} GB; with")
        for names, found in proposals(arguments, mesh):
            fits = "fits" if found.peak <= arguments.budget * GB else "does not fit"
            print(f"  {names}: {found.peak / GB:.3f} GB, {fits}")
            report["proposals"].append({"switches": names, "peak": found.peak, "verdict": fits})
    if arguments.out is not None:
        write_json(arguments.out, report)
    return report


def main(argv: list[str] | None = None) -> int:
    """The command; exit code 1 and one clear message on bad input."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.memory")
    try:
        if arguments.devices > 1:
            jax.config.update("jax_num_cpu_devices", arguments.devices)
        run(arguments)
    except ValueError as error:
        print(f"experiments.memory: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
