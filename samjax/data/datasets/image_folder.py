"""Your own pictures: a folder of images and a folder of masks, paired by name.

The pairing is `samjax.data.FolderDataset`'s. Every picture counts as a patient of its own; where
several are of one patient, give a table instead (`csv_table`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from samjax.data.datasets.base import Case, Pictures, wrong_tree
from samjax.data.folder import FolderDataset
from samjax.data.images import read_mask

TREE = """
    images/NAME.png …          masks/NAME.png …           all of them are the split "train"
  or, a folder a split:
    train/images/NAME.png …    train/masks/NAME.png …
    test/images/…              test/masks/…
"""


def image_folder(
    root: str | Path,
    split: str = "train",
    *,
    classes: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    mask_suffix: str | None = None,
) -> Pictures:
    """Reads pictures and masks of two folders.

    Args:
        root: see ``TREE``.
        split: the folder that holds images and masks; "train" where there is none.
        classes, mask_suffix: as in `FolderDataset`.
        class_names: of the labels 1, 2 …; None for "foreground", or for "class 38" and the like.

    Raises:
        DataError: another tree, or files that do not pair up.
        ValueError: `classes` are not different whole numbers above 0; other than one name a class.
    """
    root = Path(root)
    folder = root / split
    if split == "train" and not folder.is_dir():
        folder = root
    for name in ("images", "masks"):
        if not (folder / name).is_dir():
            raise wrong_tree(root, (folder / name).relative_to(root).as_posix(), TREE)
    pairs = FolderDataset(folder / "images", folder / "masks", classes, mask_suffix)
    return Pictures(
        dataset="folder",
        root=root,
        split=split,
        cases=tuple(Case(image.stem, (image,), (mask,)) for image, mask in pairs.pairs),
        class_names=names_of(pairs.classes, class_names),
        read_label=partial(read_classes, classes=pairs.classes),
    )


def names_of(
    classes: Sequence[int] | None, class_names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Names for the mask values `classes`, None for a binary mask; ``ValueError`` unless one each.

    Without ``class_names``, "foreground", or "class" and the value.
    """
    made = ("foreground",) if classes is None else tuple(f"class {value}" for value in classes)
    if class_names is not None and len(class_names) != len(made):
        raise ValueError(f"{len(class_names)} class_names for {len(made)} classes")
    return made if class_names is None else tuple(class_names)


def read_classes(case: Case, size: tuple[int, int], *, classes: Sequence[int] | None) -> np.ndarray:
    """A `read_label` of mask files; see `samjax.data.read_mask`."""
    return read_mask(case.labels[0], classes)
