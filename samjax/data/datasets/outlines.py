"""What the readers of fundus photographs share: targets of disc and cup, masks of outlines."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from samjax.data.datasets.base import Case, Pictures, drawn_split
from samjax.data.images import DataError, check_sizes, read_image, read_mask

Target = Literal["disc", "cup", "rim", "disc+cup"]

# What is read for a target, in the order of a case's labels.
PARTS: dict[str, tuple[str, ...]] = {
    "disc": ("disc",),
    "cup": ("cup",),
    "rim": ("disc", "cup"),
    "disc+cup": ("disc", "cup"),
}
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "disc": ("disc",),
    "cup": ("cup",),
    "rim": ("disc rim",),
    "disc+cup": ("disc rim", "cup"),
}


def joined_masks(
    case: Case, size: tuple[int, int], read: Callable[[Path], np.ndarray] = read_mask
) -> np.ndarray:
    """The binary masks uint8 (h, w) of all label files of a case, joined; a `read_label`."""
    masks = [of_size(read(file), size, file, case.images[0]) for file in case.labels]
    return np.maximum.reduce(masks)


def of_size(mask: np.ndarray, size: tuple[int, int], file: Path, image: Path) -> np.ndarray:
    """The mask (h, w) of a file if it has the size of its image, else ``DataError``."""
    check_sizes(image, size, file, mask.shape)
    return mask


def target_labels(masks: Mapping[str, np.ndarray], target: str) -> np.ndarray:
    """Label map uint8 (h, w) of a target.

    Args:
        masks: "disc" (the cup belongs to it) and "cup", bool (h, w), as far as `PARTS` asks.
        target: "disc" or "cup"; "rim", the disc without the cup; "disc+cup", 1 rim and 2 cup.
            A cup that reaches beyond the disc is not cut.
    """
    if target == "rim":
        return (masks["disc"] & ~masks["cup"]).astype(np.uint8)
    if target == "disc+cup":
        return np.where(masks["cup"], 2, masks["disc"]).astype(np.uint8)
    return masks[target].astype(np.uint8)


def pictures_of_target(
    dataset: str,
    root: Path,
    split: str,
    cases: Sequence[Case],
    target: str,
    read: Callable[..., np.ndarray],
) -> Pictures:
    """The pictures of a data set whose label maps are of a target.

    Args:
        dataset, root, split, cases: see `Source`.
        target: see `target_labels`.
        read: (case, (h, w) of its picture, target=target) -> label map uint8 (h, w); a function of
            a module, because worker processes must be able to import it.
    """
    return Pictures(
        dataset=dataset,
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=CLASS_NAMES[target],
        read_label=partial(read, target=target),
    )


def drawn_cases(
    cases: Sequence[Case], split: str, *, drawn_by: str, total: int, root: Path
) -> list[Case]:
    """The part of a split whose test set is a quarter of the images, or of the patients.

    Args:
        split: "train", "test" or "all".
        drawn_by: "patient" keeps the images of a patient together; "image" does not.
        total: number of images that the data set has.

    Raises:
        DataError: another number of images. ValueError: another split.
    """
    drawn = drawn_split(cases, split, 0.25, total=total, root=root)
    if drawn_by == "image":
        return drawn
    patients = list(dict.fromkeys(case.patient for case in cases))
    chosen = drawn_split(patients, split, 0.25, total=len(patients), root=root)
    return [case for case in cases if case.patient in chosen]


def fill_outlines(outlines: Iterable[np.ndarray], size: tuple[int, int], file: Path) -> np.ndarray:
    """Mask bool (h, w) of closed outlines, joined.

    To it belong the pixels that hold a corner, those that the straight line between two such
    pixels passes, and those inside; labelme and SAM2LoRA fill so (Pillow's polygon).

    Args:
        outlines: corners (n, 2) as x, y in pixels; (0, 0) is the outer corner of the first pixel.
        size: (h, w).
        file: named in errors.

    Raises:
        DataError: fewer than three corners, one that is not finite or outside the picture.
    """
    h, w = size
    picture = Image.new("1", (w, h))
    for points in outlines:
        if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
            raise DataError(
                f"{file}: an outline of shape {points.shape}; expected at least 3 corners x, y"
            )
        outside = ~((points >= -1) & (points <= (w + 1, h + 1))).all(1)  # NaN is outside
        if outside.any():
            x, y = points[outside][0]
            raise DataError(
                f"{file}: the outline has a corner ({x:g}, {y:g}) outside its picture of {w}x{h} "
                "pixels (width x height)"
            )
        corners = np.floor(points).astype(int).flatten().tolist()
        ImageDraw.Draw(picture).polygon(corners, fill=1, outline=1)
    return np.array(picture)


def labelme_masks(
    file: Path,
    size: tuple[int, int],
    labels: Mapping[str, str],
    optional: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """Masks bool (h, w) of a labelme file: the outlines of one label are joined.

    Args:
        file: json with `shapes`, each of a `label` and `points` [[x, y], …] in pixels.
        size: (h, w) of the picture.
        labels: name of a mask → label in the file, whatever the case of its letters.
        optional: names whose mask is empty where the file has no such label.

    Raises:
        DataError: no such json, another size of the picture, a label that is missing or is no
            polygon.
    """
    try:
        content = json.loads(file.read_text("utf-8"))
        stated = content.get("imageHeight"), content.get("imageWidth")
        found: dict[str, list[np.ndarray]] = {}
        for shape in content["shapes"]:
            found.setdefault(shape["label"].lower(), []).append(_corners(shape))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file}: not a labelme file ({type(error).__name__}: {error}); expected a json with "
            "shapes, each with label and points"
        ) from error
    if None not in stated and stated != size:
        raise DataError(
            f"{file}: drawn on a picture of {stated[1]}x{stated[0]} pixels (width x height), but "
            f"its picture is {size[1]}x{size[0]}; expected the same size"
        )
    masks = {}
    for name, label in labels.items():
        outlines = found.get(label.lower(), [])
        if not outlines and name not in optional:
            there = ", ".join(sorted(found)) or "none"
            raise DataError(f"{file}: no outline with the label {label!r} (labels: {there})")
        masks[name] = fill_outlines(outlines, size, file)
    return masks


def _corners(shape: dict[str, Any]) -> np.ndarray:
    """Corners (n, 2) of a shape; none of one that is no polygon, which then cannot be filled."""
    if shape.get("shape_type", "polygon") not in ("polygon", "linestrip"):
        return np.zeros((0, 2))
    return np.asarray(shape["points"], np.float64)


def read_contour(file: Path) -> np.ndarray:
    """Corners float64 (n, 2) of a text file with x and y on each line.

    Raises:
        DataError: no such file, or other than two numbers on a line.
    """
    try:
        rows = [line.split() for line in file.read_text("utf-8").splitlines() if line.strip()]
        return np.array(rows, np.float64)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file}: {error}; expected a text file with x and y on each line"
        ) from error


def read_grey(file: Path) -> np.ndarray:
    """Grey levels uint8 (h, w) of an image whose channels are equal, else ``DataError``."""
    image = read_image(file)
    if (image != image[..., :1]).any():
        raise DataError(f"{file}: a coloured image; expected grey levels")
    return image[..., 0]
