"""Masks from a shell.

    python -m samjax.predictor --ckpt sam_vit_b_01ec64.safetensors --image photo.jpg \\
        --box 425,600,700,875 --out masks

Each `--box` is a prompt of its own. All `--point`s together are one prompt, alone or refining a
single box. `--out` gets a PNG per mask (0 and 255), `overlay.png` with the best mask of each
prompt, and `masks.json`; that one is written last, so where it is, all is complete.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image, ImageOps

from samjax.atomic import atomic_write
from samjax.models.sam import SamConfig
from samjax.predictor.cli import Prompt, converted, read_prompts
from samjax.predictor.model import SamModel
from samjax.predictor.overlay import Drawing, draw_overlay
from samjax.predictor.prompts import check_prompts
from samjax.predictor.sam import SamPredictor
from samjax.predictor.sam2 import SAM2ImagePredictor


@dataclass(frozen=True)
class Arguments:
    """Predict masks for boxes or points on an image."""

    ckpt: Path
    """A converted checkpoint (.safetensors), or a PyTorch one, which is converted each time."""
    image: Path
    """The image file."""
    box: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """x0,y0,x1,y1 in pixels; repeat for more prompts."""
    point: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """x,y in pixels; repeat to add points to the prompt."""
    label: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """1 (foreground) or 0 (background), one per --point; all 1 by default."""
    multimask: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Several masks per prompt instead of one."""
    out: Path = Path("masks")
    """The folder to write."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""


def run(arguments: Arguments) -> None:
    """What the command does.

    Raises:
        ValueError, OSError: with a message for people.
    """
    prompts = read_prompts(arguments.box, arguments.point, arguments.label)
    image = read_image(arguments.image)
    with converted(arguments.ckpt) as ckpt:
        model = SamModel.load(ckpt)
    for prompt in prompts:  # before the encoder takes its time
        check_prompts(
            *prompt.arrays(),
            None,
            image_size=image.shape[:2],
            low_res_size=model.config.low_res_size,
        )
    kind = SamPredictor if isinstance(model.config, SamConfig) else SAM2ImagePredictor
    predictor = kind(model, dtype=arguments.dtype)
    predictor.set_image(image)
    results = [_predict(predictor, prompt, arguments.multimask) for prompt in prompts]
    records, drawings = [], []
    for number, (prompt, (masks, iou)) in enumerate(zip(prompts, results, strict=True)):
        best = int(iou.argmax())
        points = [(x, y, label) for (x, y), label in zip(prompt.points, prompt.labels, strict=True)]
        drawings.append(Drawing(masks[best], points, prompt.box))
        for index, mask in enumerate(masks):
            suffix = f"_{index}" if len(masks) > 1 else ""
            record = {
                "file": f"mask_{number:03}{suffix}.png",
                "prompt": prompt.to_dict(),
                "iou_prediction": float(iou[index]),
                "area": int(mask.sum()),
                "box": _bounds(mask),
                "on_overlay": index == best,
            }
            _save_png(arguments.out / record["file"], mask.astype(np.uint8) * 255)
            records.append(record)
            print(
                f"{arguments.out / record['file']}  predicted IoU {record['iou_prediction']:.3f}  "
                f"area {record['area']} pixels"
            )
    _save_png(arguments.out / "overlay.png", draw_overlay(image, drawings))
    summary = {
        "image": str(arguments.image),
        "checkpoint": str(arguments.ckpt),
        "size": list(image.shape[:2]),
        "masks": records,
    }
    with atomic_write(arguments.out / "masks.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    print(f"{arguments.out / 'overlay.png'}\n{arguments.out / 'masks.json'}")


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 (h, w, 3) RGB, turned as its EXIF orientation says.

    Raises:
        ValueError: not an image, transparent pixels, or pixels that have no plain meaning as
            8-bit RGB: 16-bit greyscale, floats, CMYK and the like.
    """
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"{path}: not a readable image ({reason})") from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
        lowest, _ = image.getchannel("A").getextrema()
        if lowest != 255:
            raise ValueError(f"{path}: has transparent pixels; expected an opaque image")
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        raise ValueError(f"{path}: has {image.mode} pixels; expected 8-bit RGB or greyscale")
    return np.array(image.convert("RGB"))


def _predict(
    predictor: SamPredictor | SAM2ImagePredictor, prompt: Prompt, multimask: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Masks bool (c, h, w) and their predicted IoU (c,)."""
    masks, iou, _ = predictor.predict(*prompt.arrays(), multimask_output=multimask)
    return masks, iou


def _bounds(mask: np.ndarray) -> list[int] | None:
    """[x0, y0, x1, y1], x1 and y1 one past the last pixel; None for an empty mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _save_png(path: Path, pixels: np.ndarray) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 1 after an error."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m samjax.predictor")
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        message = error.strerror if isinstance(error, OSError) and error.strerror else error
        print(f"samjax.predictor: error: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
