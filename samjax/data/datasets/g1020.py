"""G1020: optic disc and cup, 1020 photographs of various sizes, outlines in labelme files.

Bajwa et al. 2020, arXiv:2006.09158 (for the download and its licence see the site that the paper
names). In some photographs no cup could be seen; their cup is empty.

SAM2LoRA draws 255 of the 1020 as test set (scikit-learn's `train_test_split`, test_size .25,
random_state 0). The names do not tell patients.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from samjax.data.datasets.base import Case, Pictures, drawn_split, find_files, one_of
from samjax.data.datasets.outlines import (
    PARTS,
    Target,
    labelme_masks,
    pictures_of_target,
    target_labels,
)

TREE = """
    Images/image_0.jpg …       1020 photographs
    Images/image_0.json …      their outlines, labels "disc" and "cup" ("discLoc" is not read)
"""


def g1020(root: str | Path, split: str = "train", *, target: Target = "disc") -> Pictures:
    """Reads G1020. For the pixels of an outline see `outlines.fill_outlines`.

    Args:
        root: see ``TREE``.
        split: "train" (765), "test" (255) or "all" (1020).
        target: "disc" with the cup in it, "cup", "rim" (the disc without the cup), or "disc+cup":
            1 rim, 2 cup.

    Raises:
        DataError: another tree, or other than 1020 images.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, ("train", "test", "all"))
    one_of("target", target, tuple(PARTS))
    cases = [
        Case(image.stem, (image,), (image.with_suffix(".json"),))
        for image in find_files(root, "Images/*.jpg", TREE)
    ]
    drawn = drawn_split(cases, split, 0.25, total=1020, root=root)
    return pictures_of_target("g1020", root, split, drawn, target, _labels)


def _labels(case: Case, size: tuple[int, int], *, target: str) -> np.ndarray:
    labels = {"disc": "disc", "cup": "cup"}
    return target_labels(labelme_masks(case.labels[0], size, labels, ("cup",)), target)
