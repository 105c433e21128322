"""HRF: retinal vessels, 45 photographs 3504×2336 of 15 healthy, 15 diabetic, 15 glaucoma patients.

Budai et al. 2013, https://www5.cs.fau.de/research/data/fundus-images/, CC BY 4.0.

SAM2LoRA draws 13 of the 45 as test set (scikit-learn's `train_test_split`, test_size .27,
random_state 0).
"""

from __future__ import annotations

from pathlib import Path

from samjax.data.datasets.base import Case, Pictures, drawn_split, find_files, one_of
from samjax.data.datasets.outlines import joined_masks

TREE = """
    images/01_dr.JPG, 01_g.jpg, 01_h.jpg … 15_h.jpg     45 photographs
    manual1/01_dr.tif, 01_g.tif, 01_h.tif …             their vessels
    (mask, the fields of view, is not read)
"""


def hrf(root: str | Path, split: str = "train") -> Pictures:
    """Reads HRF.

    Args:
        root: see ``TREE``.
        split: "train" (32), "test" (13) or "all" (45).

    Raises:
        DataError: another tree, or other than 45 images.
        ValueError: another split.
    """
    root = Path(root)
    one_of("split", split, ("train", "test", "all"))
    cases = [
        Case(image.stem, (image,), (root / "manual1" / f"{image.stem}.tif",))
        for image in find_files(root, "images/*.[jJ][pP][gG]", TREE)
    ]
    return Pictures(
        dataset="hrf",
        root=root,
        split=split,
        cases=tuple(drawn_split(cases, split, 0.27, total=45, root=root)),
        class_names=("vessel",),
        read_label=joined_masks,
    )
