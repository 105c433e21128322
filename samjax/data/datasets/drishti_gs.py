"""Drishti-GS1: optic disc and cup, 101 photographs about 2047×1760, four experts.

Sivaswamy et al. 2014, https://cvit.iiit.ac.in/projects/mip/drishti-gs/mip-dataset2/Home.php (see
there for the licence). The split is the authors', and SAM2LoRA's.

The experts' outlines are published as soft maps, the share of the experts as a grey level. As in
SAM2LoRA, a pixel belongs to the disc where its level is above the middle of the map's darkest and
brightest: where at least two of four experts agree, the levels being 0, 64, 128, 191 and 255.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from samjax.data.datasets.base import Case, Pictures, find_files, one_of, wrong_tree
from samjax.data.datasets.outlines import (
    PARTS,
    Target,
    of_size,
    pictures_of_target,
    read_grey,
    target_labels,
)

TREE = """
    Training/Images/drishtiGS_002.png …                                     50 photographs
    Training/GT/drishtiGS_002/SoftMap/drishtiGS_002_ODsegSoftmap.png …      disc
    Training/GT/drishtiGS_002/SoftMap/drishtiGS_002_cupsegSoftmap.png …     cup
    Test/Images/drishtiGS_001.png …                                         51 photographs
    Test/Test_GT/… (or Test/GT/…)                                           as in training
    (the photographs may lie in sub-folders, such as GLAUCOMA and NORMAL)
"""
_FOLDERS = {"train": "Training", "test": "Test"}
_TRUTH = ("GT", "Test_GT")
_FILES = {"disc": "ODsegSoftmap", "cup": "cupsegSoftmap"}


def drishti_gs(root: str | Path, split: str = "train", *, target: Target = "disc") -> Pictures:
    """Reads Drishti-GS1.

    Args:
        root: see ``TREE``.
        split: "train" (50) or "test" (51).
        target: "disc" with the cup in it, "cup", "rim" (the disc without the cup), or "disc+cup":
            1 rim, 2 cup.

    Raises:
        DataError: another tree.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, tuple(_FOLDERS))
    one_of("target", target, tuple(PARTS))
    folder = root / _FOLDERS[split]
    images = find_files(root, f"{_FOLDERS[split]}/Images/**/drishtiGS_*.png", TREE)
    truth = next((folder / name for name in _TRUTH if (folder / name).is_dir()), None)
    if truth is None:
        raise wrong_tree(folder, f"folder {' or '.join(_TRUTH)}", TREE)
    cases = []
    for image in images:
        maps = truth / image.stem / "SoftMap"
        labels = tuple(maps / f"{image.stem}_{_FILES[part]}.png" for part in PARTS[target])
        cases.append(Case(image.stem, (image,), labels))
    return pictures_of_target("drishti_gs", root, split, cases, target, _labels)


def _labels(case: Case, size: tuple[int, int], *, target: str) -> np.ndarray:
    masks = {}
    for part, file in zip(PARTS[target], case.labels, strict=True):
        levels = of_size(read_grey(file), size, file, case.images[0])
        masks[part] = levels > (int(levels.max()) + int(levels.min())) / 2
    return target_labels(masks, target)
