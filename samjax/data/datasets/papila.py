"""PAPILA: optic disc and cup, 488 photographs 2576×1934 of both eyes of 244 patients, two experts.

Kovalyk et al. 2022, doi.org/10.1038/s41597-022-01388-1, on figshare (14798004; for its licence see
there).

SAM2LoRA draws 122 of the 488 as test set (scikit-learn's `train_test_split`, test_size .25,
random_state 0), so the two eyes of a patient may be parted; ``drawn_by="patient"`` draws patients
in the same way instead. It joins the two experts.
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
    fill_outlines,
    pictures_of_target,
    read_contour,
    target_labels,
)

TREE = """
    FundusImages/RET002OD.jpg, RET002OS.jpg …                      488 photographs
    ExpertsSegmentations/Contours/RET002OD_disc_exp1.txt …         outlines of the disc
    ExpertsSegmentations/Contours/RET002OD_cup_exp1.txt …          of the cup
    (and those of the second expert, which end in exp2)
"""


def papila(
    root: str | Path,
    split: str = "train",
    *,
    target: Target = "disc",
    expert: Literal["first", "second", "either"] = "first",
    drawn_by: Literal["image", "patient"] = "image",
) -> Pictures:
    """Reads PAPILA. For the pixels of an outline see `outlines.fill_outlines`.

    Args:
        root: see ``TREE``.
        split: "train" (366), "test" (122) or "all" (488).
        target: "disc" with the cup in it, "cup", "rim" (the disc without the cup), or "disc+cup":
            1 rim, 2 cup.
        expert: whose outlines; "either" joins both, as SAM2LoRA does.
        drawn_by: see the module.

    Raises:
        DataError: another tree, or other than 488 images.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, ("train", "test", "all"))
    one_of("target", target, tuple(PARTS))
    one_of("expert", expert, ("first", "second", "either"))
    one_of("drawn_by", drawn_by, ("image", "patient"))
    experts = {"first": (1,), "second": (2,), "either": (1, 2)}[expert]
    contours = root / "ExpertsSegmentations" / "Contours"
    cases = []
    for image in find_files(root, "FundusImages/*.jpg", TREE):
        labels = tuple(
            contours / f"{image.stem}_{part}_exp{number}.txt"
            for part in PARTS[target]
            for number in experts
        )
        cases.append(Case(image.stem, (image,), labels, patient=image.stem[:6]))
    drawn = drawn_cases(cases, split, drawn_by=drawn_by, total=488, root=root)
    return pictures_of_target("papila", root, split, drawn, target, _labels)


def _labels(case: Case, size: tuple[int, int], *, target: str) -> np.ndarray:
    each = len(case.labels) // len(PARTS[target])
    masks = {}
    for number, part in enumerate(PARTS[target]):
        # The authors' own notebook has the whole coordinates at the pixels' centres.
        filled = [
            fill_outlines([read_contour(file) + 0.5], size, file)
            for file in case.labels[number * each : (number + 1) * each]
        ]
        masks[part] = np.logical_or.reduce(filled)
    return target_labels(masks, target)
