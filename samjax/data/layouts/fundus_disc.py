"""Phantom fundus photographs in the layouts of the data sets of optic disc and cup.

For what all `write_…` have in common see `samjax.data.layouts.fundus`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from samjax.data.layouts.fundus import SIZE, Phantom, Size, Tree, encoded, photograph
from samjax.data.phantom import CUP, DISC

_TRAINING = (
    *(2, 4, 8, 10, 12, 15, 16, 17, 18, 22, 24, 26, 31, 32, 33, 35, 36, 37, 38, 40, 41, 42, 44, 45),
    *(46, 47, 49, 51, 57, 58, 60, 61, 62, 63, 64, 66, 68, 69, 75, 76, 80, 81, 84, 88, 89, 90, 92),
    *(94, 98, 101),
)
_LEVELS = np.array([0, 64, 128, 191, 255], np.uint8)  # by the number of experts, of four
_EYES = (("OD", 144), ("OS", 119))  # and the patients who have them in GRAPE
_THREE_VISITS = 105  # eyes; the others have two


def outline(mask: np.ndarray) -> np.ndarray:
    """Corners float64 (n, 2), x and y, of a mask of one run a row; pixel centres are at .5."""
    rows = np.flatnonzero(mask.any(1))
    left = mask.argmax(1)[rows]
    right = mask.shape[1] - 1 - mask[:, ::-1].argmax(1)[rows]
    down = np.stack([left, rows], 1)
    up = np.stack([right, rows], 1)[::-1]
    top = down[:1] + (up[-1:] - down[:1]) / 2  # a third corner where there is one row only
    return np.concatenate([down, up, top]) + 0.5


def _masks(phantom: Phantom) -> dict[str, np.ndarray]:
    return {"disc": phantom["mask"] >= DISC, "cup": phantom["mask"] == CUP}


def write_drishti_gs(
    root: str | Path,
    *,
    size: Size = SIZE,
    full: bool = True,
    seed: int = 0,
    test_truth: str = "Test_GT",
) -> dict[str, np.ndarray]:
    """Writes Drishti-GS1: 50 and 51 png, soft maps of four experts.

    Two experts have the phantom's outline, the others lie one pixel further left and right, so
    that at least two agree in just the phantom's.

    Args:
        test_truth: name of the folder of the test images' soft maps.
    """
    tree = Tree(root, size, full, seed)
    image = photograph("PNG")

    def soft_map(part: str):
        def encode(phantom: Phantom) -> bytes:
            mask = _masks(phantom)[part].astype(np.uint8)
            experts = 2 * mask + np.roll(mask, 1, axis=1) + np.roll(mask, -1, axis=1)
            return encoded(Image.fromarray(_LEVELS[experts]), "PNG")

        return encode

    disc, cup = soft_map("disc"), soft_map("cup")
    test = [n for n in range(1, 102) if n not in _TRAINING]
    for folder, numbers, truth in (("Training", _TRAINING, "GT"), ("Test", test, test_truth)):
        for number, name in tree.some(f"drishtiGS_{n:03d}" for n in numbers):
            maps = f"{folder}/{truth}/{name}/SoftMap/{name}"
            tree.photograph(f"{folder}/Images/{name}.png", number, image)
            tree.write(f"{maps}_ODsegSoftmap.png", number, disc)
            tree.write(f"{maps}_cupsegSoftmap.png", number, cup)
    return tree.drawn


def _labelme(phantom: Phantom, labels: Mapping[str, str], image_path: str) -> bytes:
    """A labelme file with the outlines of the parts (part → label) and a box around the disc."""
    masks = _masks(phantom)
    h, w = phantom["mask"].shape
    shapes = [_shape(label, "polygon", outline(masks[part])) for part, label in labels.items()]
    corners = outline(masks["disc"])
    shapes.append(_shape("discLoc", "rectangle", np.stack([corners.min(0), corners.max(0)])))
    content = {
        "version": "4.2.9",
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": h,
        "imageWidth": w,
    }
    return json.dumps(content).encode()


def _shape(label: str, kind: str, points: np.ndarray) -> dict[str, object]:
    return {
        "label": label,
        "points": points.tolist(),
        "group_id": None,
        "shape_type": kind,
        "flags": {},
    }


def write_g1020(
    root: str | Path, *, size: Size = SIZE, full: bool = True, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes G1020: 1020 jpg with labelme files beside them, of which every fifth has no cup.

    The owners' numbers have gaps; these run from 0 to 1019.
    """
    tree = Tree(root, size, full, seed)
    image = photograph("JPEG")
    for number, name in tree.some(f"image_{n}" for n in range(1020)):
        labels = {"disc": "disc", "cup": "cup"} if number % 5 < 4 else {"disc": "disc"}
        text = _labelme(tree.phantom(number), labels, f"{name}.jpg")
        tree.photograph(f"Images/{name}.jpg", number, image)
        tree.put(f"Images/{name}.json", text)
    return tree.drawn


def write_grape(
    root: str | Path, *, size: Size = SIZE, full: bool = True, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes GRAPE: 631 jpg of 263 eyes of 144 patients, and their labelme files."""
    tree = Tree(root, size, full, seed)
    image = photograph("JPEG")
    eyes = [f"{n}_{eye}" for eye, patients in _EYES for n in range(1, patients + 1)]
    visits = [3] * _THREE_VISITS + [2] * (len(eyes) - _THREE_VISITS)
    names = (f"{eye}_{n + 1}" for eye, v in zip(eyes, visits, strict=True) for n in range(v))
    for number, name in tree.some(names):
        labels = {"disc": "OD", "cup": "OC"}
        text = _labelme(tree.phantom(number), labels, f"..\\ROI images\\{name}.jpg")
        tree.photograph(f"ROI images/{name}.jpg", number, image)
        tree.put(f"json/{name}.json", text)
    return tree.drawn


def write_origa(
    root: str | Path, *, size: Size = SIZE, full: bool = True, seed: int = 0, wider: int = 5
) -> dict[str, np.ndarray]:
    """Writes ORIGA: 650 jpg and MATLAB files with the key mask.

    Args:
        wider: pixels by which a mask is wider than its photograph, half of them at its left.
    """
    tree = Tree(root, size, full, seed)
    image = photograph("JPEG")

    def labels(phantom: Phantom) -> bytes:
        rim_and_cup = np.maximum(phantom["mask"], 1) - 1
        sides = (wider // 2, wider - wider // 2)
        file = io.BytesIO()
        savemat(file, {"mask": np.pad(rim_and_cup, ((0, 0), sides))})
        return file.getvalue()

    for number, name in tree.some(f"{n:03d}" for n in range(1, 651)):
        tree.photograph(f"Images/{name}.jpg", number, image)
        tree.write(f"Semi-automatic-annotations/{name}.mat", number, labels)
    return tree.drawn


def write_papila(
    root: str | Path, *, size: Size = SIZE, full: bool = True, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes PAPILA: 488 jpg of both eyes of 244 patients, text files of two experts' outlines.

    The second expert's lie one pixel further right. The owners' numbers have gaps; these run from
    2 to 245.
    """
    tree = Tree(root, size, full, seed)
    image = photograph("JPEG")

    def contour(part: str, expert: int):
        def encode(phantom: Phantom) -> bytes:
            centres = outline(_masks(phantom)[part]) - 0.5 + (expert - 1, 0)
            return "".join(f"{x:.6e} {y:.6e}\n" for x, y in centres).encode()

        return encode

    contours = {
        f"{part}_exp{expert}": contour(part, expert)
        for part in ("disc", "cup")
        for expert in (1, 2)
    }
    names = (f"RET{n:03d}{eye}" for n in range(2, 246) for eye in ("OD", "OS"))
    for number, name in tree.some(names):
        tree.photograph(f"FundusImages/{name}.jpg", number, image)
        for ending, encode in contours.items():
            path = f"ExpertsSegmentations/Contours/{name}_{ending}.txt"
            tree.write(path, number, encode)
    return tree.drawn


def write_refuge2(
    root: str | Path, *, size: Size = SIZE, full: bool = True, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes REFUGE2: three times 400 jpg; masks bmp in the training set, png in the others."""
    tree = Tree(root, size, full, seed)
    image = photograph("JPEG")

    def labels(format: str):
        def encode(phantom: Phantom) -> bytes:
            masks = _masks(phantom)
            grey = np.where(masks["cup"], 0, np.where(masks["disc"], 128, 255))
            return encoded(Image.fromarray(grey.astype(np.uint8)), format)

        return encode

    train = [f"g{n:04d}" for n in range(1, 41)] + [f"n{n:04d}" for n in range(1, 361)]
    val, test = ([f"{letter}{n:04d}" for n in range(1, 401)] for letter in "VT")
    for split, names, suffix in (
        ("train", train, "bmp"),
        ("val", val, "png"),
        ("test", test, "png"),
    ):
        encode = labels(suffix.upper())
        for number, name in tree.some(names):
            tree.photograph(f"{split}/images/{name}.jpg", number, image)
            tree.write(f"{split}/mask/{name}.{suffix}", number, encode)
    return tree.drawn


def write_idrid(
    root: str | Path,
    *,
    size: Size = SIZE,
    full: bool = True,
    seed: int = 0,
    reduced: bool = False,
) -> dict[str, np.ndarray]:
    """Writes IDRiD: 54 and 27 jpg, discs in tif with a coloured palette.

    Args:
        reduced: train/images, train/od_masks and so on, with discs in png of one bit.
    """
    tree = Tree(root, size, full, seed)
    image = photograph("JPEG")

    def disc(phantom: Phantom) -> bytes:
        mask = _masks(phantom)["disc"]
        if reduced:
            return encoded(Image.fromarray(mask), "PNG")
        indices = Image.fromarray(mask.astype(np.uint8))
        indices.putpalette((0, 0, 0, 255, 0, 0))
        return encoded(indices, "TIFF")

    for split, folder, start, end in (
        ("train", "a. Training Set", 1, 55),
        ("test", "b. Testing Set", 55, 82),
    ):
        images = f"A. Segmentation/1. Original Images/{folder}"
        masks = f"A. Segmentation/2. All Segmentation Groundtruths/{folder}/5. Optic Disc"
        if reduced:
            images, masks = f"{split}/images", f"{split}/od_masks"
        for number, name in tree.some(f"IDRiD_{n:02d}" for n in range(start, end)):
            tree.photograph(f"{images}/{name}.jpg", number, image)
            tree.write(f"{masks}/{name}_OD.{'png' if reduced else 'tif'}", number, disc)
    return tree.drawn
