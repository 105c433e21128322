"""What the commands that predict have in common: prompts in words, and checkpoints of any kind."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samjax.models.weights import TORCH_SUFFIXES

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Prompt:
    """What one prompt of the command line holds."""

    points: tuple[Numbers, ...] = ()  # (x, y) in pixels
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None  # XYXY in pixels

    def arrays(self) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """The first three arguments of `SamPredictor.predict`."""
        given = self.points, self.labels, self.box
        points, labels, box = (np.array(value) if value else None for value in given)
        return points, labels, box

    def to_dict(self) -> dict:
        """JSON-able, only what is given."""
        fields = {"points": self.points, "labels": self.labels, "box": self.box}
        return {name: value for name, value in fields.items() if value}


def read_prompts(box: Sequence[str], point: Sequence[str], label: Sequence[int]) -> list[Prompt]:
    """The prompts that `--box`, `--point` and `--label` give.

    Each box is a prompt of its own; all points are one, alone or refining a single box.

    Raises:
        ValueError: none at all, numbers that cannot be read, labels that do not fit the points,
            points beside several boxes.
    """
    if not box and not point:
        raise ValueError("no prompt: give --box x0,y0,x1,y1 or --point x,y (with --label 1 or 0)")
    boxes = []
    for text in box:
        x0, y0, x1, y1 = read_numbers("--box", text, "x0,y0,x1,y1")
        boxes.append((x0, y0, x1, y1))
    points = tuple(read_numbers("--point", text, "x,y") for text in point)
    labels = tuple(label) or (1,) * len(points)
    if len(labels) != len(points):
        raise ValueError(f"{len(points)} --point but {len(labels)} --label: give one for each")
    if unknown := sorted(set(labels) - {0, 1}):
        raise ValueError(f"--label {unknown[0]}: expected 1 (foreground) or 0 (background)")
    if points and len(boxes) > 1:
        raise ValueError(f"--point with {len(boxes)} --box: which box would the points refine?")
    if points:
        return [Prompt(points, labels, boxes[0] if boxes else None)]
    return [Prompt(box=box) for box in boxes]


def read_numbers(option: str, text: str, form: str) -> Numbers:
    """Numbers of an option, as many as its `form` names, parted by commas; or `ValueError`."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != form.count(",") + 1:
        raise ValueError(f"{option} {text}: expected {form} in pixels")
    return numbers


@contextlib.contextmanager
def converted(ckpt: Path) -> Iterator[Path]:
    """The checkpoint, or for PyTorch's its conversion in a folder that lives as long as the block.

    In a process of its own: this package knows neither the converter nor PyTorch.
    """
    if ckpt.suffix not in TORCH_SUFFIXES:
        yield ckpt
        return
    if not ckpt.is_file():
        raise ValueError(f"{ckpt}: no such file")
    with tempfile.TemporaryDirectory(prefix="samjax-") as folder:
        target = Path(folder) / "converted.safetensors"
        command = [sys.executable, "-m", "convert", "--ckpt", str(ckpt), "--out", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            message = done.stderr.strip() or f"exit code {done.returncode}"
            raise ValueError(message.removeprefix("convert: error: "))
        print(f"converted {ckpt} (once and for all: python -m convert --ckpt {ckpt})")
        yield target
