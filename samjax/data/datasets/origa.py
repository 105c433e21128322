"""ORIGA: optic disc and cup, 650 photographs of one height, 2048, and about 3072 wide.

Zhang et al. 2010, doi.org/10.1109/IEMBS.2010.5626137 (for the download and its licence ask the
authors).

SAM2LoRA draws 163 of the 650 as test set (scikit-learn's `train_test_split`, test_size .25,
random_state 0). A mask may be larger than its photograph: as SAM2LoRA does, it is cut to it, as
much at the left as at the right (of an odd number, one more at the right), and at the bottom.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.io import loadmat

from samjax.data.datasets.base import Case, Pictures, drawn_split, find_files, one_of, to_labels
from samjax.data.datasets.outlines import (
    CLASS_NAMES,
    PARTS,
    Target,
    pictures_of_target,
    target_labels,
)
from samjax.data.images import DataError

TREE = """
    Images/001.jpg … 650.jpg                         650 photographs
    Semi-automatic-annotations/001.mat … 650.mat     their key "mask": 1 disc rim, 2 cup
"""


def origa(root: str | Path, split: str = "train", *, target: Target = "disc") -> Pictures:
    """Reads ORIGA.

    Args:
        root: see ``TREE``.
        split: "train" (487), "test" (163) or "all" (650).
        target: "disc" with the cup in it, "cup", "rim" (the disc without the cup), or "disc+cup":
            1 rim, 2 cup.

    Raises:
        DataError: another tree, or other than 650 images.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, ("train", "test", "all"))
    one_of("target", target, tuple(PARTS))
    cases = [
        Case(image.stem, (image,), (root / "Semi-automatic-annotations" / f"{image.stem}.mat",))
        for image in find_files(root, "Images/*.jpg", TREE)
    ]
    drawn = drawn_split(cases, split, 0.25, total=650, root=root)
    return pictures_of_target("origa", root, split, drawn, target, _labels)


def _labels(case: Case, size: tuple[int, int], *, target: str) -> np.ndarray:
    file = case.labels[0]
    labels = to_labels(_read_mat(file), file, CLASS_NAMES["disc+cup"])
    left = max(labels.shape[1] - size[1], 0) // 2
    cut = labels[: size[0], left : left + size[1]]
    if np.count_nonzero(cut) < np.count_nonzero(labels):
        raise DataError(
            f"{file}: its disc reaches beyond the photograph {case.images[0]}: the mask is "
            f"{labels.shape[1]}x{labels.shape[0]} pixels (width x height), the photograph "
            f"{size[1]}x{size[0]}"
        )
    return target_labels({"disc": cut > 0, "cup": cut == 2}, target)


def _read_mat(file: Path) -> np.ndarray:
    """The array (h, w) under the key "mask" of a MATLAB file."""
    try:
        content = loadmat(file)
    except Exception as error:  # scipy raises whatever its reader meets in a damaged file
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{file}: not a readable MATLAB file ({reason})") from error
    mask = content.get("mask")
    if mask is None or mask.ndim != 2 or mask.dtype.kind not in "buif":
        keys = ", ".join(key for key in content if not key.startswith("__"))
        raise DataError(
            f"{file}: no matrix of numbers with the key 'mask' (keys: {keys or 'none'})"
        )
    return mask
