"""DRIVE: retinal vessels, 40 photographs 565×584, 20 to train and 20 to test.

Staal et al. 2004, https://drive.grand-challenge.org (for its licence see the site). The split is
the authors'; SAM2LoRA takes it, and joins the second observer of the test images where there is
one. Today's download has no labels of the test images; older archives have both observers'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from samjax.data.datasets.base import Case, Pictures, find_files, one_of, wrong_tree
from samjax.data.datasets.outlines import joined_masks
from samjax.data.images import DataError

TREE = """
    training/images/21_training.tif …        20 photographs
    training/1st_manual/21_manual1.gif …     their vessels
    test/images/01_test.tif …                20 photographs
    test/1st_manual/01_manual1.gif …         their vessels, in older archives only
    test/2nd_manual/01_manual2.gif …         the second observer's, in older archives only
    (training/mask and test/mask, the fields of view, are not read)
"""
_FOLDERS = {"train": "training", "test": "test"}


def drive(
    root: str | Path,
    split: str = "train",
    *,
    observer: Literal["first", "second", "either"] = "first",
    labelled: bool = True,
) -> Pictures:
    """Reads DRIVE.

    Args:
        root: see ``TREE``.
        split: "train" (20) or "test" (20).
        observer: whose vessels; the training images have the first observer's only, which "either"
            then is. On the test images "either" joins both, as SAM2LoRA does.
        labelled: False reads the photographs alone; their label maps are all background.

    Raises:
        DataError: another tree; no labels of the test images.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, tuple(_FOLDERS))
    one_of("observer", observer, ("first", "second", "either"))
    if split == "train" and observer == "second":
        raise ValueError("observer 'second': the training images of DRIVE have one observer")
    endings = {
        "first": ("1st_manual/{}_manual1.gif",),
        "second": ("2nd_manual/{}_manual2.gif",),
        "either": ("1st_manual/{}_manual1.gif", "2nd_manual/{}_manual2.gif"),
    }["first" if split == "train" else observer]
    folder = root / _FOLDERS[split]
    images = find_files(root, f"{_FOLDERS[split]}/images/*.tif", TREE)
    for ending in endings:
        manual = (folder / ending).parent
        if labelled and not manual.is_dir():
            wrong = wrong_tree(folder, f"folder {manual.name}", TREE)
            if split == "train":
                raise wrong
            raise DataError(
                f"{wrong}\nToday's download of DRIVE has no labels of the test images, older "
                "archives have them; labelled=False reads the photographs alone"
            )
    return Pictures(
        dataset="drive",
        root=root,
        split=split,
        cases=tuple(
            Case(
                image.stem,
                (image,),
                tuple(folder / ending.format(image.name[:2]) for ending in endings if labelled),
            )
            for image in images
        ),
        class_names=("vessel",),
        read_label=joined_masks,
    )
