"""IDRiD, the part for segmentation: optic disc, 81 photographs 4288×2848.

Porwal et al. 2018, doi.org/10.3390/data3030025, on IEEE DataPort, CC BY 4.0. The split is the
authors'. SAM2LoRA has a reader of it, but trains and tests on other sets.
"""

from __future__ import annotations

from pathlib import Path

from samjax.data.datasets.base import Case, Pictures, find_files, one_of
from samjax.data.datasets.outlines import joined_masks

TREE = """
    A. Segmentation/1. Original Images/a. Training Set/IDRiD_01.jpg …         54 photographs
    A. Segmentation/1. Original Images/b. Testing Set/IDRiD_55.jpg …          27 photographs
    A. Segmentation/2. All Segmentation Groundtruths/a. Training Set/5. Optic Disc/IDRiD_01_OD.tif …
    A. Segmentation/2. All Segmentation Groundtruths/b. Testing Set/5. Optic Disc/IDRiD_55_OD.tif …
  or
    train/images/IDRiD_01.jpg …      train/od_masks/IDRiD_01_OD.png …
    test/images/IDRiD_55.jpg …       test/od_masks/IDRiD_55_OD.png …
"""
_FOLDERS = {"train": "a. Training Set", "test": "b. Testing Set"}


def idrid(root: str | Path, split: str = "train") -> Pictures:
    """Reads the optic discs of IDRiD.

    Args:
        root: see ``TREE``.
        split: "train" (54) or "test" (27).

    Raises:
        DataError: another tree.
        ValueError: another split.
    """
    root = Path(root)
    one_of("split", split, tuple(_FOLDERS))
    if (root / split / "od_masks").is_dir():
        images, masks, suffix = f"{split}/images", f"{split}/od_masks", ".png"
    else:
        images = f"A. Segmentation/1. Original Images/{_FOLDERS[split]}"
        masks = f"A. Segmentation/2. All Segmentation Groundtruths/{_FOLDERS[split]}/5. Optic Disc"
        suffix = ".tif"
    return Pictures(
        dataset="idrid",
        root=root,
        split=split,
        cases=tuple(
            Case(image.stem, (image,), (root / masks / f"{image.stem}_OD{suffix}",))
            for image in find_files(root, f"{images}/IDRiD_*.jpg", TREE)
        ),
        class_names=("disc",),
        read_label=joined_masks,
    )
