"""Checkpoints of a run, written by Orbax while training goes on, and stopping to be continued.

A checkpoint holds the ``TrainState`` (step, trainable parameters or factors, the optimizer's
moments and GaLore's bases) and a JSON text: the settings, and whatever the caller adds. The
schedule, everything random and the position in the data are functions of the step and the seed
(Grain's iterator state could not be read with another number of processes). Frozen parameters are
not in it; a fingerprint of the base model belongs into the settings. Arrays are restored onto
whatever mesh the run has now.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from samjax.training.loop import TrainState
from samjax.trees import flatten


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names its folder and what is wrong."""


class _Damaged(CheckpointError):
    """A checkpoint that cannot be read; the one before it may do."""


class Checkpoints:
    """The checkpoints of one run in ``folder``; a context manager, which waits for the last write.

    Args:
        folder: made if absent; a bucket's path too (``gs://…``).
        settings: what a resumed run must share with the one that it continues, as JSON.
        keep: how many of the last ones to keep, besides the best.
        say: gets the messages for a person.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        *,
        keep: int = 2,
        say: Callable[[str], None] = print,
    ):
        if keep < 1:
            raise ValueError(f"keep is {keep}, expected at least 1")
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file
        self.folder = epath.Path(folder)
        if "://" not in str(folder):
            self.folder = epath.Path(Path(folder).absolute())
        self._settings = json.loads(json.dumps(dict(settings), default=str))
        self._say = say
        self._kept = _LastAndBest(keep)
        self._orbax = ocp.training.Checkpointer(
            self.folder, preservation_policy=self._kept, cleanup_tmp_directories=True
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._orbax.close()

    @property
    def steps(self) -> list[int]:
        """The steps of the complete checkpoints."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def save(
        self, state: TrainState, extra: Mapping[str, Any], *, best_step: int | None = None
    ) -> None:
        """Starts to write a checkpoint of ``state.step``; waits for the one before it.

        ``extra`` is JSON for the caller; the checkpoint of ``best_step`` outlives newer ones.  All
        processes call it.
        """
        step = int(state.step)
        self._kept.best_step = best_step
        run = {"settings": self._settings, "extra": dict(extra)}
        text = np.frombuffer(json.dumps(run).encode(), np.uint8)
        self._orbax.save_checkpointables_async(
            step, {"state": state, "run": {"json": text}}, force=True, overwrite=True
        )

    def wait(self) -> None:
        """Until the last checkpoint is complete."""
        self._orbax.wait()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The last complete checkpoint, or None: its state, laid out as ``like``, and ``extra``.

        ``like`` holds arrays, or shapes with shardings.  A checkpoint that is damaged is passed
        over with a message.

        Raises ``CheckpointError`` naming every setting that differs, or if all are damaged.
        """
        damaged = []
        for step in reversed(self.steps):
            try:
                text = self._load(step, "run", None)["json"]
                run = json.loads(bytes(np.asarray(text)))
                self._compare(step, run["settings"])
                return self.restore_step(step, like), run["extra"]
            except _Damaged as error:
                damaged.append(str(error))
                self._say(f"{error}; trying the one before it")
        if damaged:
            raise CheckpointError("no checkpoint can be used:\n  " + "\n  ".join(damaged))
        return None

    def restore_step(self, step: int, like: TrainState) -> TrainState:
        """The state of one checkpoint of this run, laid out as ``like``.

        Raises ``CheckpointError`` if it is gone or damaged.
        """
        return TrainState(*self._load(step, "state", _abstract(like)))

    def _load(self, step: int, name: str, abstract: Any) -> Any:
        try:
            return self._orbax.load_checkpointables(step, {name: abstract})[name]
        except Exception as error:  # Orbax and TensorStore have no common one
            reason = " ".join(str(error).split())[:160]
            raise _Damaged(
                f"checkpoint {self.folder}/{step} is damaged ({type(error).__name__}: {reason})"
            ) from error

    def _compare(self, step: int, settings: dict[str, Any]) -> None:
        names = sorted(settings.keys() | self._settings.keys())
        changed = [
            f"{name}: {settings.get(name)!r} then, {self._settings.get(name)!r} now"
            for name in names
            if settings.get(name) != self._settings.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"checkpoint {self.folder}/{step} is of a run with other settings:\n  "
                + "\n  ".join(changed)
            )


class _LastAndBest:
    """Orbax's policy of what to keep: the last few, and the best."""

    def __init__(self, keep: int):
        self._keep = keep
        self.best_step: int | None = None

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        last = len(checkpoints) - self._keep
        return [i >= last or c.step == self.best_step for i, c in enumerate(checkpoints)]


class Preemption:
    """Notices SIGTERM, which clusters send before they take a machine away.

    ``requested(step)`` is asked after every step.  Several processes agree, through
    ``jax.distributed``, on the step at which all of them stop.
    """

    def __init__(self) -> None:
        self._noticed = False
        self._before: Any = None

    def __enter__(self) -> Preemption:
        if jax.process_count() == 1:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._before)

    def _notice(self, *_: object) -> None:
        self._noticed = True

    def requested(self, step: int) -> bool:
        """Whether to save and stop now."""
        if jax.process_count() == 1:
            return self._noticed
        return multihost_utils.reached_preemption_sync_point(step)


def fingerprint(params: Any) -> str:
    """SHA-256 of a plain tree's paths, shapes, types and values."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.data.cast("B"))
    return digest.hexdigest()


def _abstract(like: TrainState) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
    )
