"""A run's metrics: every scalar to TensorBoard, the history as JSON."""

from __future__ import annotations

from pathlib import Path


class RunLog:
    """Collects scalars by step under ``out``; use it as a context manager.

    With ``write`` False only the history is kept: of several processes one writes.
    """

    def __init__(self, out: Path, write: bool = True):
        self.history: list[dict[str, float]] = []
        self._writer = None
        if write:
            # Here, not above: it loads torch wherever torch is installed, which takes seconds.
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard"))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def restore(self, history: list[dict[str, float]]) -> None:
        """Takes over the history of a run that is continued; TensorBoard has it already."""
        self.history[:] = history

    def add(self, step: int, values: dict[str, float]) -> None:
        """Records ``{name: value}`` at an optimizer step."""
        self.history.append({"step": step, **values})
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
