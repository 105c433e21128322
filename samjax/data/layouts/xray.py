"""Phantom chest radiographs in the layout of ChestX-ray8 with CheXmask's table."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

_HEADER = (
    *("Image Index", "Dice RCA (Mean)", "Dice RCA (Max)", "Landmarks"),
    *("Left Lung", "Right Lung", "Heart", "Height", "Width"),
)


def write_chestxray8(
    root: str | Path, *, count: int = 8, size: int = 64, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes phantom radiographs, two a patient, as `samjax.data.datasets.chestxray8` reads them.

    A grey gradient with two dark ellipses for the lungs and a bright one for the heart. The last
    quarter of the patients, one at least, is the test set. Every fourth image has a quality below
    0.7; its mask is as good as the others.

    Args:
        root: the folder, made where it is missing.
        count: images, at least 4.
        size: pixels a side.
        seed: of the draw.

    Returns:
        Image name (without .png) to its label map, uint8 (size, size): 1 left lung, 2 right lung,
        3 heart.

    Raises ``ValueError`` for fewer images or a side below 16.
    """
    if count < 4 or size < 16:
        raise ValueError(f"count {count}, size {size}: expected at least 4 images of 16 pixels")
    root = Path(root)
    rng = np.random.default_rng(seed)
    drawn: dict[str, np.ndarray] = {}
    rows, patients = [], (count + 1) // 2
    lists: dict[bool, list[str]] = {False: [], True: []}
    for number in range(count):
        patient, visit = divmod(number, 2)
        name = f"{patient + 1:08d}_{visit:03d}"
        organs = _organs(size, rng)
        folder = root / f"images_{1 + number % 2:03d}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_picture(organs, rng)).save(folder / f"{name}.png")
        lists[patient >= patients - max(patients // 4, 1)].append(f"{name}.png\n")
        quality = 0.65 if number % 4 == 3 else 0.85
        landmarks = " ".join(f"[{x} {x + 1}]\n" for x in range(3))  # as numpy prints an array
        texts = [_rle(organ) for organ in organs]
        rows.append([f"{name}.png", quality, 0.9, landmarks, *texts, size, size])
        drawn[name] = np.zeros((size, size), np.uint8)
        for label, organ in enumerate(organs, start=1):
            drawn[name][organ] = label
    (root / "train_val_list.txt").write_text("".join(lists[False]), "utf-8")
    (root / "test_list.txt").write_text("".join(lists[True]), "utf-8")
    with (root / "ChestX-Ray8.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([_HEADER, *rows])
    return drawn


def _organs(size: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Left lung, right lung (the patient's, so left is right in the picture), heart."""
    y, x = np.mgrid[:size, :size] / size
    ellipses = ((0.70, 0.50, 0.15, 0.33), (0.30, 0.50, 0.16, 0.35), (0.55, 0.64, 0.17, 0.13))
    organs = []
    for cx, cy, rx, ry in ellipses:
        cx, cy = cx + rng.uniform(-0.03, 0.03), cy + rng.uniform(-0.03, 0.03)
        organs.append(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1)
    return tuple(organs)


def _picture(organs: tuple[np.ndarray, ...], rng: np.random.Generator) -> np.ndarray:
    size = len(organs[0])
    grey = 150 + 40 * np.mgrid[:size, :size][0] / size
    grey[organs[0] | organs[1]] -= 90
    grey[organs[2]] = 200
    return np.clip(grey + rng.normal(0, 4, grey.shape), 0, 255).astype(np.uint8)


def _rle(organ: np.ndarray) -> str:
    """Pairs "start length" of row by row, where the first pixel is 1."""
    steps = np.flatnonzero(np.diff(np.pad(organ.ravel().astype(np.int8), 1)))
    starts, ends = steps[::2], steps[1::2]
    return " ".join(f"{start + 1} {end - start}" for start, end in zip(starts, ends, strict=True))
