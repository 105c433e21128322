"""STARE: retinal vessels, 20 photographs 700×605, two observers.

Hoover et al. 2000, https://cecas.clemson.edu/~ahoover/stare (for its licence see the site).

SAM2LoRA draws 5 of the 20 as test set (scikit-learn's `train_test_split`, test_size .25,
random_state 0) and joins the two observers.
"""

from __future__ import annotations

import gzip
import io
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from samjax.data.datasets.base import (
    Case,
    Pictures,
    drawn_split,
    find_files,
    one_of,
    to_labels,
)
from samjax.data.datasets.outlines import joined_masks
from samjax.data.images import DECODE_ERRORS, DataError

TREE = """
    stare-images/im0001.ppm.gz …      20 photographs
    labels-ah/im0001.ah.ppm.gz …      vessels of the first observer, Adam Hoover
    labels-vk/im0001.vk.ppm.gz …      of the second, Valentina Kouznetsova
    (each as it is or unpacked to .ppm)
"""


def stare(
    root: str | Path,
    split: str = "train",
    *,
    observer: Literal["first", "second", "either"] = "first",
) -> Pictures:
    """Reads STARE.

    Args:
        root: see ``TREE``.
        split: "train" (15), "test" (5) or "all" (20).
        observer: whose vessels; "either" joins both, as SAM2LoRA does.

    Raises:
        DataError: another tree, or other than 20 images.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, ("train", "test", "all"))
    one_of("observer", observer, ("first", "second", "either"))
    initials = {"first": ("ah",), "second": ("vk",), "either": ("ah", "vk")}[observer]
    images: dict[str, Path] = {}
    for image in find_files(root, "stare-images/im*.ppm*", TREE):
        images.setdefault(image.name.split(".")[0], image)  # .ppm comes before .ppm.gz
    cases = []
    for name, image in images.items():
        labels = (_packed_or_not(root / f"labels-{who}" / f"{name}.{who}.ppm") for who in initials)
        cases.append(Case(name, (image,), tuple(labels)))
    return Pictures(
        dataset="stare",
        root=root,
        split=split,
        cases=tuple(drawn_split(cases, split, 0.25, total=20, root=root)),
        class_names=("vessel",),
        read_label=partial(joined_masks, read=_read_vessels),
        read_picture=_read_ppm,
    )


def _packed_or_not(file: Path) -> Path:
    return file if file.exists() else file.with_name(f"{file.name}.gz")


def _read_vessels(file: Path) -> np.ndarray:
    pixels = _read_ppm(file)
    if (pixels != pixels[..., :1]).any():
        raise DataError(f"{file}: a coloured mask; expected the values 0 and 255")
    return to_labels(pixels[..., 0], file, ("vessel",), {255: 1})


def _read_ppm(file: Path) -> np.ndarray:
    """Pixels uint8 (h, w, 3) of a .ppm or .ppm.gz."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PPM",)) as image:
            if image.mode not in ("1", "L", "RGB"):
                raise DataError(f"{file}: pixel format {image.mode}; expected 8 bits per channel")
            return np.array(image.convert("RGB"))
    except DataError:
        raise
    except DECODE_ERRORS as error:
        raise DataError(f"{file}: not a readable PPM ({error or type(error).__name__})") from error
