"""Synapse (BTCV): 13 organs in 30 abdominal CT scans of 512×512×85–198 voxels, 8 of them used.

Landman et al., MICCAI 2015 Multi-Atlas Labeling Beyond the Cranial Vault, by registration from
https://www.synapse.org/Synapse:syn3193805 (terms there). One scan a patient. The split, the window
and the choice of organs are SAMed's (preprocess/preprocess_data.py; Zhang and Liu,
arXiv:2304.13785) and TransUNet's before it: 12 cases are the test set, the other 18 train. For
SAMed's own files see `synapse_samed`.
"""

from __future__ import annotations

from pathlib import Path

from samjax.data.datasets.base import Case, Scans, find_files, one_of, wrong_tree
from samjax.data.intensity import Window

TREE = """
    RawData/Training/img/img0001.nii.gz … img0010, img0021 … img0040       30 scans
    RawData/Training/label/label0001.nii.gz …                              their organs
"""
CLASSES = (
    *("spleen", "right kidney", "left kidney", "gallbladder"),
    *("liver", "stomach", "aorta", "pancreas"),
)
# Stored organ → label. 5 esophagus, 9 postcava, 10 veins, 12 and 13 adrenal glands are left out.
VALUES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 0, 6: 5, 7: 6, 8: 7, 9: 0, 10: 0, 11: 8, 12: 0, 13: 0}
TEST_CASES = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)


def synapse(root: str | Path, split: str = "train") -> Scans:
    """Reads the scans as they are downloaded.

    `Slices(synapse(root))` are the pictures that SAMed trains on, in 8 bits: voxel axis 2 across
    the slices, axis 1 down the picture, -125 to 275 Hounsfield units as black to white.

    Args:
        root: see ``TREE``; RawData and Training may be missing from the path.
        split: "train" (18), "test" (12) or "all" (30); of a partial copy what is there.

    Raises:
        DataError: another tree. ValueError: another split.
    """
    root = Path(root)
    one_of("split", split, ("train", "test", "all"))
    folders = (root / "RawData" / "Training", root / "Training", root)
    folder = next((f for f in folders if (f / "img").is_dir()), None)
    if folder is None:
        raise wrong_tree(root, "RawData/Training/img", TREE)
    cases = []
    for image in find_files(folder, "img/img[0-9][0-9][0-9][0-9].nii.gz", TREE):
        number = image.name[3:7]
        if split == "all" or (int(number) in TEST_CASES) == (split == "test"):
            label = folder / "label" / f"label{number}.nii.gz"
            cases.append(Case(f"case{number}", (image,), (label,)))
    return Scans(
        dataset="synapse",
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=CLASSES,
        values=VALUES,
        intensity=Window(-125, 275),
    )
