"""A run that learns from unlabelled slices: resumable, on any mesh, with a record without scores.

What is trained is a ``Task``; ``run`` is to a task what ``experiments.trial.run`` is to a model
that segments.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from experiments.data_hashes import describe_data
from experiments.figures import curve
from experiments.options import is_first_process
from experiments.record import Record, write_record
from experiments.sets import labelled_msd
from experiments.training import Preempted, begin, last_of
from experiments.trial import Trial
from samjax.data import Slices
from samjax.data import unlabelled as views
from samjax.data.datasets import amos22, kits19, lits
from samjax.data.layouts import volumes
from samjax.training.checkpoint import Checkpoints, Preemption, fingerprint
from samjax.training.log import RunLog
from samjax.training.loop import Step, TrainingError, TrainState, fit
from samjax.training.sharding import (
    WHOLE,
    check_batch,
    param_shardings,
    place,
    place_batch,
    place_state,
    process_rows,
    replicate,
    shardings_of,
    to_host,
)
from samjax.trees import Params, count_bytes, count_values


class Task(NamedTuple):
    """What one run trains, by what, and what it leaves."""

    trainable: Params
    frozen: Params
    draw: views.Draw
    arrays: tuple[str, ...]  # of a batch
    rate: optax.Schedule
    optimizer: optax.GradientTransformation
    step: Callable[[optax.GradientTransformation, TrainState], Step]  # and the state's placement
    write: Callable[[Path, Params], None]  # the result, of what was trained, on the host
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where unlabelled slices come from: a folder of its own below ``--data``, or that itself."""

    folder: str
    open: Callable[[Path], dict[str, Slices]]  # by name
    write: Callable[..., object]  # phantoms in its layout

    def slices(self, data: Path) -> dict[str, Slices]:
        """All slices; ``DataError`` for another tree, with the expected one, or missing files."""
        root = data / self.folder
        found = self.open(root if root.is_dir() else data)
        for part in found.values():
            part.check()
        return found


def _amos22(root: Path) -> dict[str, Slices]:
    """500 CT scans in SAMed's window, 100 MR scans by percentiles; the labels stay unread."""
    parts = {name: amos22(root, "all", modality=name, labelled=False) for name in ("ct", "mri")}
    return {f"amos22_{name}": Slices(scans) for name, scans in parts.items()}


# Windows are -125 to 275 Hounsfield units; labels stay unread, but for the Decathlon's files.
SOURCES = {
    "amos22": Source(folder="AMOS22", open=_amos22, write=volumes.write_amos22),
    "lits": Source(
        folder="LiTS",
        open=lambda root: {"lits": Slices(lits(root, labelled=False))},
        write=volumes.write_lits,
    ),
    "kits19": Source(
        folder="KiTS19",
        open=lambda root: {"kits19": Slices(kits19(root, labelled=False), rows="first")},
        write=volumes.write_kits19,
    ),
    "msd": Source(
        folder="Task04_Hippocampus",
        open=lambda root: {"msd": Slices(labelled_msd(root))},
        write=volumes.write_msd,
    ),
}


def chosen(names: Iterable[str], option: str = "--unlabelled") -> dict[str, Source]:
    """The sources of these names; ``ValueError`` for another name, or none at all."""
    names = tuple(names)
    unknown = [name for name in names if name not in SOURCES]
    if unknown or not names:
        given = " ".join(unknown) or "without a name"
        raise ValueError(f"{option} {given}: expected some of {', '.join(SOURCES)}")
    return {name: SOURCES[name] for name in names}


def run(
    trial: Trial,
    mesh: Mesh,
    *,
    sources: Mapping[str, Source],
    data: Path,
    side: int,
    store: Path,
    result: str,
    task_of: Callable[[int], Task],
) -> Record:
    """Trains the task of so many steps; writes ``result`` and the record into the trial's folder.

    Slices are kept below ``store``, squares of ``side`` pixels.  Checkpoints, ``--resume`` and
    SIGTERM are as in ``training.optimise``; so are the errors.
    """
    options, folder = trial.options, trial.folder
    started, first = time.perf_counter(), is_first_process()
    parts = {k: v for source in sources.values() for k, v in source.slices(data).items()}
    described = {f"unlabelled {name}": describe_data(name, part) for name, part in parts.items()}
    bar = options.progress and first
    pool = views.Pool(
        [
            views.kept_slices(
                part,
                side,
                store,
                f"{name}_{described[f'unlabelled {name}']['sha256'][:8]}",
                progress=bar,
            )
            for name, part in parts.items()
        ]
    )
    batch_size = min(options.batch_size, len(pool))
    check_batch(mesh, batch_size)
    per_epoch = max(len(pool) // batch_size, 1)
    steps = options.steps or options.epochs * per_epoch
    task = task_of(steps)
    settings = {
        **options.fixed(),
        "base": fingerprint({"frozen": task.frozen, "trainable": task.trainable}),
        "num_images": len(pool),
        "data": sorted(part["sha256"] for part in described.values()),
    }
    rules = [(".*", WHOLE)]
    trainable = place(task.trainable, param_shardings(task.trainable, mesh, rules))
    frozen = task.frozen
    if jax.tree.leaves(frozen):
        frozen = place(frozen, param_shardings(frozen, mesh, rules))
    state = place_state(trainable, task.optimizer, mesh)
    memory = {
        "weights": count_bytes(trainable) + count_bytes(frozen),
        "gradients": count_bytes(trainable),
    }
    memory["state"] = count_bytes(state.optimizer)
    parameters = {
        "trainable": count_values(trainable),
        "total": count_values(trainable) + count_values(frozen),
    }
    index, count = process_rows(mesh)
    times: list[float] = []
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        log = stack.enter_context(RunLog(folder, write=first))
        checkpoints = None
        if options.checkpoint_every != 0:
            kept = Checkpoints(folder / "checkpoints", settings, keep=options.keep)
            checkpoints = stack.enter_context(kept)
        preemption = stack.enter_context(Preemption())
        stopped: list[int] = []

        def stop(step: int) -> bool:
            if preemption.requested(step):
                stopped.append(step)
            return bool(stopped)

        def record(step: int, metrics: dict[str, float]) -> None:
            times.append(time.perf_counter())
            log.add(step, {**metrics, "learning_rate": float(task.rate(step - 1))})

        def save(state: TrainState) -> None:
            assert checkpoints is not None
            checkpoints.save(state, {"history": log.history})

        state, _ = begin(state, options, checkpoints, log)
        batches = views.make_views(
            pool,
            task.draw,
            batch_size=batch_size,
            seed=options.seed,
            start_step=int(state.step),
            workers=options.workers,
            process_index=index,
            process_count=count,
        )
        every = options.checkpoint_every or per_epoch
        try:
            state = fit(
                state,
                frozen,
                task.step(task.optimizer, shardings_of(state)),
                batches,
                steps=steps,
                key=replicate(jax.random.key(options.seed), mesh),
                arrays=task.arrays,
                place=partial(place_batch, mesh=mesh),
                on_step=record,
                save=None if checkpoints is None else save,
                save_due=lambda step: step % every == 0,
                stop=stop,
                describe=lambda batch: f"the slices {batch['index'].tolist()}",
                progress=bar,
            )
        except TrainingError as error:
            raise TrainingError(f"{error}; {last_of(checkpoints)}") from error
        if stopped and int(state.step) < steps:
            raise Preempted(f"SIGTERM at step {int(state.step)}; {last_of(checkpoints)}")
    trained = to_host(state.trainable)
    found = Record(
        experiment=trial.experiment,
        table=trial.table,
        method=trial.method,
        run=trial.run,
        smoke=trial.smoke,
        settings={**dataclasses.replace(options, out=folder).fixed(), **trial.settings},
        seed=options.seed,
        data=described,
        parameters=parameters,
        memory=memory,
        seconds=time.perf_counter() - started,
        images_per_second=batch_size / float(np.median(np.diff(times))) if times[1:] else None,
        history=log.history,
        scores=[],
        notes=(*trial.notes, *task.notes),
    )
    if first:
        task.write(folder / result, trained)
        curve(folder / "curve.png", log.history, title=trial.method)
        write_record(folder, found)
    return found
