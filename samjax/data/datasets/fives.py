"""FIVES: retinal vessels, 800 photographs 2048×2048, 200 each of four groups.

Jin et al. 2022, doi.org/10.1038/s41597-022-01564-3, on figshare (19688169; for its licence see
there). The letter at the end of a name is the group: A age-related macular degeneration, D diabetic
retinopathy, G glaucoma, N normal. The split is the authors', and SAM2LoRA's.
"""

from __future__ import annotations

from pathlib import Path

from samjax.data.datasets.base import Case, Pictures, find_files, one_of, wrong_tree
from samjax.data.datasets.outlines import joined_masks

TREE = """
    train/Original/1_A.png …         600 photographs
    train/Groud truth/1_A.png …      their vessels (the folder's name is spelt so; it may also be
                                     "Ground truth")
    test/Original/1_A.png …          200 photographs
    test/Groud truth/1_A.png …       their vessels
"""
_MASKS = ("Groud truth", "Ground truth")


def fives(root: str | Path, split: str = "train") -> Pictures:
    """Reads FIVES.

    Args:
        root: see ``TREE``.
        split: "train" (600) or "test" (200). A name such as 1_A stands in both, for two pictures.

    Raises:
        DataError: another tree.
        ValueError: another split.
    """
    root = Path(root)
    one_of("split", split, ("train", "test"))
    images = find_files(root, f"{split}/Original/*.png", TREE)
    masks = next((root / split / name for name in _MASKS if (root / split / name).is_dir()), None)
    if masks is None:
        raise wrong_tree(root / split, f"folder {' or '.join(_MASKS)}", TREE)
    return Pictures(
        dataset="fives",
        root=root,
        split=split,
        cases=tuple(Case(image.stem, (image,), (masks / image.name,)) for image in images),
        class_names=("vessel",),
        read_label=joined_masks,
    )
