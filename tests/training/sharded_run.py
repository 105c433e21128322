"""Runs in a process of its own: a small SAM trained on a mesh. Prints one line of JSON.

curves DATA FSDP TENSOR METHOD,…           loss curves and bytes per device, by method
run FOLDER STEPS DATA FSDP TENSOR [auto | HOST:PORT COUNT INDEX]
                                           through loader, loop and checkpoints; resumes, and stops
                                           after SIGTERM, which it sends itself after step
                                           $PREEMPTED_AT
"""

import json
import os
import signal
import sys
import time
from functools import partial

import jax
import numpy as np

from experiments import segmentation as seg
from experiments.objectives import ARRAYS
from experiments.options import Devices
from samjax.data import make_loader
from samjax.models.functional import init_params
from samjax.peft.lora import LoraConfig
from samjax.training.checkpoint import Checkpoints, Preemption
from samjax.training.loop import fit, make_step
from samjax.training.sharding import (
    bytes_per_device,
    make_mesh,
    place_batch,
    place_state,
    process_rows,
    replicate,
    shardings_of,
)
from tiny_models import SAM_EVEN as CONFIG

STEPS, GAP = 5, 2


class Discs:
    """Eight images of a bright disc on noise."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        rows, columns = np.mgrid[:64, :64]
        mask = (rows - 20 - 3 * index) ** 2 + (columns - 24) ** 2 < 100 + 20 * index
        image = rng.integers(0, 100, (64, 64, 3)) + 120 * mask[..., None]
        return {"image": image.astype(np.uint8), "mask": mask.astype(np.uint8), "name": str(index)}


def tuning_of(method, mesh):
    lora = LoraConfig(rank=4, projections=("q", "v", "mlp"))
    remat = mesh.size > 1  # nothing changes by it, on a mesh neither
    tuning = seg.prepare(CONFIG, init_params(CONFIG, 0), method, lora=lora, remat=remat)
    return seg.on_mesh(tuning, mesh)


def optimizer_of(tuning):
    return seg.make_optimizer(tuning, 1e-3, weight_decay=0.01, rank=4, update_gap=GAP)


def loader(mesh, start=0):
    index, count = process_rows(mesh)
    return make_loader(
        Discs(),
        frame_size=CONFIG.image_size,
        batch_size=8,
        shuffle=True,
        num_epochs=None,
        prompt_modes="points",
        start_step=start,
        process_index=index,
        process_count=count,
    )


def curve(method, mesh):
    tuning = tuning_of(method, mesh)
    optimizer = optimizer_of(tuning)
    state = place_state(tuning.trainable, optimizer, mesh)
    gap = GAP if method == "galore" else None
    step = make_step(
        partial(seg.batch_loss, tuning), optimizer, refresh_gap=gap, placement=shardings_of(state)
    )
    parts = {"trainable": state.trainable, "optimizer": state.optimizer, "frozen": tuning.frozen}
    held = {name: sorted(bytes_per_device(part).values()) for name, part in parts.items()}
    losses, key = [], replicate(jax.random.key(0), mesh)
    for batch, _ in zip(loader(mesh), range(STEPS), strict=False):
        rows = place_batch({name: batch[name] for name in ARRAYS}, mesh)
        state, metrics = step(state, tuning.frozen, rows, key)
        losses.append(float(metrics["loss"]))
    return {"losses": losses, "bytes": held}


def run(folder, steps, mesh):
    tuning = tuning_of("lora", mesh)
    optimizer = optimizer_of(tuning)
    state = place_state(tuning.trainable, optimizer, mesh)
    losses, seen = [], []
    preempted_at = int(os.environ.get("PREEMPTED_AT", 0))
    with Checkpoints(folder, {"seed": 0}) as checkpoints, Preemption() as preemption:
        found = checkpoints.restore(state)
        if found is not None:
            state, extra = found
            losses, seen = extra["losses"], extra["seen"]

        def place(batch):
            return place_batch(batch, mesh)

        def watched(batches):
            for batch in batches:
                seen.append(batch["index"].tolist())
                yield batch

        def record(step, metrics):
            losses.append(metrics["loss"])
            if step == preempted_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if preempted_at and step >= preempted_at:
                time.sleep(0.5)  # the processes agree beside their work

        fit(
            state,
            tuning.frozen,
            make_step(partial(seg.batch_loss, tuning), optimizer, 2, placement=shardings_of(state)),
            watched(loader(mesh, int(state.step))),
            steps=steps,
            key=replicate(jax.random.key(0), mesh),
            arrays=ARRAYS,
            place=place,
            on_step=record,
            save=lambda state: checkpoints.save(state, {"losses": losses, "seen": seen}),
            stop=preemption.requested,
            progress=False,
        )
    return {"losses": losses, "seen": seen}


def main(mode, *arguments):
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
    if mode == "curves":
        data, fsdp, tensor = map(int, arguments[:3])
        mesh = make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])
        return {method: curve(method, mesh) for method in arguments[3].split(",")}
    folder, *numbers = arguments[:5]
    steps, data, fsdp, tensor = map(int, numbers)
    places = (("coordinator", str), ("processes", int), ("process", int))
    cluster = {name: kind(v) for (name, kind), v in zip(places, arguments[5:], strict=False)}
    mesh = Devices(data=data, fsdp=fsdp, tensor=tensor, **cluster).start()
    return run(folder, steps, mesh)


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
