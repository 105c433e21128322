"""CHASEDB1: retinal vessels, 28 photographs 999×960 of both eyes of 14 children, two observers.

Fraz et al. 2012, https://researchdata.kingston.ac.uk/96/, CC BY 4.0.

SAM2LoRA draws 8 of the 28 as test set (dataloader of sayanmndl21/SAM2LoRA: scikit-learn's
`train_test_split`, test_size .27, random_state 0), so the two eyes of a child may be parted;
``drawn_by="patient"`` takes the last four children instead, as vessel papers do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from samjax.data.datasets.base import Case, Pictures, drawn_split, find_files, one_of, wrong_tree
from samjax.data.datasets.outlines import joined_masks

TREE = """
    Image_01L.jpg, Image_01R.jpg … Image_14R.jpg      28 photographs
    Image_01L_1stHO.png, Image_01L_2ndHO.png …        two observers' vessels
    (or the photographs and masks in sub-folders, such as training/images and training/mask)
"""


def chasedb1(
    root: str | Path,
    split: str = "train",
    *,
    observer: Literal["first", "second", "either"] = "first",
    drawn_by: Literal["image", "patient"] = "image",
) -> Pictures:
    """Reads CHASEDB1.

    Args:
        root: see ``TREE``.
        split: "train" (20), "test" (8) or "all" (28).
        observer: whose vessels; "either" joins both, as SAM2LoRA does.
        drawn_by: see the module.

    Raises:
        DataError: another tree, or other than 28 images.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, ("train", "test", "all"))
    one_of("observer", observer, ("first", "second", "either"))
    one_of("drawn_by", drawn_by, ("image", "patient"))
    masks = {file.name: file for file in root.rglob("Image_*HO.png")}
    endings = {"first": ("1stHO",), "second": ("2ndHO",), "either": ("1stHO", "2ndHO")}[observer]
    cases = []
    for image in find_files(root, "**/Image_*.jpg", TREE):
        names = [f"{image.stem}_{ending}.png" for ending in endings]
        if missing := [name for name in names if name not in masks]:
            raise wrong_tree(image.parent, missing[0], TREE)
        labels = tuple(masks[name] for name in names)
        cases.append(Case(image.stem, (image,), labels, patient=image.stem[6:8]))
    if drawn_by == "image":
        cases = drawn_split(cases, split, 0.27, total=28, root=root)
    elif split != "all":
        cases = [case for case in cases if (case.patient > "10") == (split == "test")]
    return Pictures(
        dataset="chasedb1",
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=("vessel",),
        read_label=joined_masks,
    )
