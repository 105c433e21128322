"""GRAPE: optic disc and cup, 631 photographs of 263 eyes of 144 patients at several visits.

Huang et al. 2023, doi.org/10.1038/s41597-023-02424-4, on figshare (for its licence see there). The
outlines are of the regions around the disc ("ROI images"), in labelme files.

SAM2LoRA draws 158 of the 631 as test set (scikit-learn's `train_test_split`, test_size .25,
random_state 0), so that other visits of a test eye are trained on; ``drawn_by="patient"`` draws
patients in the same way instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from samjax.data.datasets.base import Case, Pictures, find_files, one_of
from samjax.data.datasets.outlines import (
    PARTS,
    Target,
    drawn_cases,
    labelme_masks,
    pictures_of_target,
    target_labels,
)

TREE = """
    ROI images/1_OD_1.jpg …      631 photographs: patient, eye (OD right, OS left), visit
    json/1_OD_1.json …           their outlines, labels "OD" (disc) and "OC" (cup)
"""
_LABELS = {"disc": "OD", "cup": "OC"}


def grape(
    root: str | Path,
    split: str = "train",
    *,
    target: Target = "disc",
    drawn_by: Literal["image", "patient"] = "image",
) -> Pictures:
    """Reads GRAPE. For the pixels of an outline see `outlines.fill_outlines`.

    Args:
        root: see ``TREE``.
        split: "train" (473), "test" (158) or "all" (631); by patient, other numbers.
        target: "disc" with the cup in it, "cup", "rim" (the disc without the cup), or "disc+cup":
            1 rim, 2 cup.
        drawn_by: see the module.

    Raises:
        DataError: another tree, or other than 631 images.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, ("train", "test", "all"))
    one_of("target", target, tuple(PARTS))
    one_of("drawn_by", drawn_by, ("image", "patient"))
    cases = [
        Case(
            image.stem,
            (image,),
            (root / "json" / f"{image.stem}.json",),
            patient=image.stem.split("_")[0],
        )
        for image in find_files(root, "ROI images/*.jpg", TREE)
    ]
    drawn = drawn_cases(cases, split, drawn_by=drawn_by, total=631, root=root)
    return pictures_of_target("grape", root, split, drawn, target, _labels)


def _labels(case: Case, size: tuple[int, int], *, target: str) -> np.ndarray:
    labels = {part: _LABELS[part] for part in PARTS[target]}
    return target_labels(labelme_masks(case.labels[0], size, labels), target)
