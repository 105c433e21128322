"""Tracking from a shell: a medical volume, or a clip.

    python -m samjax.video --ckpt sam2.1_hiera_tiny.safetensors --volume scan.nii.gz \\
        --box 60,80,120,140 --slice 40 --out labels.nii.gz
    python -m samjax.video --ckpt … --clip walk.mp4 --point 210,350 --slice 0 --out masks

Each `--box` is an object of its own, label 1, 2, …; all `--point`s together are one object. They
lie on one slice, and are tracked to both ends. Pixel (x, y) of slice k is voxel (x, y, k) where
the slices are stacked along the third axis, as viewers show it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image

from samjax.atomic import atomic_write
from samjax.data.volumes import (
    frames_to_voxels,
    read_volume,
    through_plane_axis,
    to_frames,
    write_labels,
)
from samjax.predictor.cli import converted, read_numbers, read_prompts
from samjax.predictor.model import SamModel
from samjax.video.frames import open_frames
from samjax.video.predictor import SAM2VideoPredictor
from samjax.video.volume import label_frames

NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Arguments:
    """Track objects through a volume or a clip from prompts on one slice."""

    ckpt: Path
    """A converted SAM 2 checkpoint (.safetensors), or a PyTorch one, converted each time."""
    out: Path
    """A volume's label map (.nii or .nii.gz); a clip's folder of label maps (PNG)."""
    slice: int
    """The slice or frame that the prompts lie on, from 0."""
    volume: Path | None = None
    """.nii, .nii.gz, .mhd, .mha, .nrrd, or a folder with a DICOM series."""
    clip: Path | None = None
    """A video file, or a folder of images named by their frame numbers."""
    box: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """x0,y0,x1,y1 in pixels of the slice; repeat for more objects."""
    point: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """x,y in pixels of the slice; repeat to add points to the object."""
    label: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """1 (foreground) or 0 (background), one per --point; all 1 by default."""
    axis: Literal[0, 1, 2] | None = None
    """Voxel axis that the slices are stacked along; by default the one with the thickest slices,
    else the body's."""
    window: str | None = None
    """level,width of the grey values, in the volume's units (CT: 40,400 for soft tissue); by
    default from the 0.5th to the 99.5th percentile."""
    series: str | None = None
    """UID of the DICOM series, where a folder holds several."""
    image_size: int | None = None
    """Side of the model's frame in pixels, a multiple of 32; by default the checkpoint's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""


def run(arguments: Arguments) -> None:
    """What the command does; writes its result at the very end.

    Raises:
        ValueError, OSError, ImportError: with a message for people.
    """
    if (arguments.volume is None) == (arguments.clip is None):
        raise ValueError("give --volume or --clip, and not both")
    prompts = read_prompts(arguments.box, arguments.point, arguments.label)
    if arguments.volume is not None and not arguments.out.name.endswith(NIFTI):
        raise ValueError(f"--out {arguments.out}: expected a name that ends in .nii or .nii.gz")
    volume = axis = None
    if arguments.volume is not None:
        volume = read_volume(arguments.volume, series=arguments.series)
        axis = through_plane_axis(volume) if arguments.axis is None else arguments.axis
        frames = open_frames(to_frames(volume, axis=axis, window=_window(arguments.window)))
    else:
        frames = open_frames(arguments.clip or "")
    if not 0 <= arguments.slice < len(frames):
        raise ValueError(
            f"--slice {arguments.slice}: expected one of the {len(frames)} slices, "
            f"0 to {len(frames) - 1}"
        )
    side = arguments.image_size
    size = None if side is None else (side, side)
    with converted(arguments.ckpt) as ckpt:
        model = SamModel.load(ckpt, size)
    given = {}
    for number, prompt in enumerate(prompts, start=1):
        points, labels, box = prompt.arrays()
        given[arguments.slice, number] = {"points": points, "labels": labels, "box": box}
    predictor = SAM2VideoPredictor(model, dtype=arguments.dtype)
    labels = label_frames(predictor, frames, given, progress=True)
    if volume is not None and axis is not None:
        write_labels(arguments.out, frames_to_voxels(labels, axis), volume)
    else:
        for number, frame in enumerate(labels):
            _save_png(arguments.out / f"{number:05}.png", frame)
    for number in range(1, len(prompts) + 1):
        found = labels == number
        where = np.flatnonzero(found.any(axis=(1, 2)))
        extent = f"slices {where[0]} to {where[-1]}" if len(where) else "found nowhere"
        print(f"object {number}: {int(found.sum())} voxels, {extent}")
    print(arguments.out)


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    level, width = read_numbers("--window", text, "level,width")
    return level, width


def _save_png(path: Path, pixels: np.ndarray) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 1 after an error."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m samjax.video")
    try:
        run(arguments)
    except (ValueError, OSError, ImportError) as error:
        message = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"samjax.video: error: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
