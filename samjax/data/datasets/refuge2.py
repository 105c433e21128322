"""REFUGE2: optic disc and cup, 400 photographs in each of the parts that have masks.

Fang et al. 2022, arXiv:2202.08994, https://refuge.grand-challenge.org (for its licence see the
site). The split is the challenge's, and SAM2LoRA's, which tests on 400.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from samjax.data.datasets.base import Case, Pictures, find_files, one_of
from samjax.data.datasets.outlines import (
    PARTS,
    Target,
    pictures_of_target,
    read_grey,
    target_labels,
)
from samjax.data.images import DataError

TREE = """
    train/images/g0001.jpg, n0001.jpg …     photographs
    train/mask/g0001.bmp …                  0 cup, 128 disc rim, 255 background; png or bmp
    val/images, val/mask
    test/images, test/mask
"""
_CUP, _RIM, _BACKGROUND = 0, 128, 255


def refuge2(root: str | Path, split: str = "train", *, target: Target = "disc") -> Pictures:
    """Reads REFUGE2.

    Args:
        root: see ``TREE``.
        split: "train", "val" or "test" (400 each).
        target: "disc" with the cup in it, "cup", "rim" (the disc without the cup), or "disc+cup":
            1 rim, 2 cup.

    Raises:
        DataError: another tree.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, ("train", "val", "test"))
    one_of("target", target, tuple(PARTS))
    masks = root / split / "mask"
    cases = []
    for image in find_files(root, f"{split}/images/*.jpg", TREE):
        label = masks / f"{image.stem}.png"
        if not label.exists():
            label = label.with_suffix(".bmp")
        cases.append(Case(image.stem, (image,), (label,)))
    return pictures_of_target("refuge2", root, split, cases, target, _labels)


def _labels(case: Case, size: tuple[int, int], *, target: str) -> np.ndarray:
    file = case.labels[0]
    grey = read_grey(file)
    present = np.flatnonzero(np.bincount(grey.ravel())).tolist()
    if unknown := sorted(set(present) - {_CUP, _RIM, _BACKGROUND}):
        values = ", ".join(str(value) for value in unknown[:8])
        raise DataError(
            f"{file}: unknown values {values}; expected {_CUP} cup, {_RIM} disc rim, {_BACKGROUND} "
            "background"
        )
    return target_labels({"disc": grey != _BACKGROUND, "cup": grey == _CUP}, target)
