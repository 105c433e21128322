"""AMOS22: 15 organs in 500 CT and 100 MR scans of abdomens, 360 of them with published labels.

Ji et al., NeurIPS 2022 (arXiv:2206.08023), https://zenodo.org/records/7262581 (terms there). Cases
up to 0500 are CT, those above MR. One scan a patient. Training and validation set (200 + 40 and
100 + 20 scans) are the authors'; the labels of the test set are not published. SAMora
(arXiv:2511.08626) takes all of it as unlabelled images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from samjax.data.datasets.base import Case, Scans, find_files, one_of
from samjax.data.datasets.msd import read_dataset_json
from samjax.data.images import DataError
from samjax.data.intensity import Percentiles, Window

TREE = """
    dataset.json                              which scan is in which set (may be missing)
    imagesTr/amos_0001.nii.gz …, labelsTr/amos_0001.nii.gz …     240 scans and their organs
    imagesVa/amos_0008.nii.gz …, labelsVa/amos_0008.nii.gz …     120
    imagesTs/amos_0002.nii.gz …                                  240
"""
CLASSES = (
    *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach"),
    *("aorta", "postcava", "pancreas", "right adrenal gland", "left adrenal gland", "duodenum"),
    *("bladder", "prostate or uterus"),
)
_LAST_CT = 500
# Split → its key in dataset.json, folder of images, folder of labels.
_PARTS = {
    "train": ("training", "imagesTr", "labelsTr"),
    "validation": ("validation", "imagesVa", "labelsVa"),
    "test": ("test", "imagesTs", None),
}


def amos22(
    root: str | Path,
    split: str = "train",
    *,
    modality: Literal["ct", "mri", "both"] = "ct",
    labelled: bool = True,
) -> Scans:
    """Reads AMOS22.

    The grey values are those of SAMed's window, -125 to 275 Hounsfield units, for CT and of
    percentiles for MR. No window fits "both", which has percentiles too: read the two apart to
    have the window for the CT.

    Args:
        root: see ``TREE``. Where dataset.json lists the scans of a set, they are the ones that it
            lists; elsewhere those in its folder.
        split: "train", "validation", "test" (no labels), or "all": the first two, and the third
            as well where ``labelled`` is False.
        modality: see above.
        labelled: False leaves the labels alone, so that they need not be there.

    Raises:
        DataError: another tree, a broken dataset.json, no scan of that modality.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, (*_PARTS, "all"))
    one_of("modality", modality, ("ct", "mri", "both"))
    everything = ("train", "validation") if labelled else ("train", "validation", "test")
    about = read_dataset_json(root) or {}
    cases = []
    for part in everything if split == "all" else (split,):
        key, images, labels = _PARTS[part]
        listed = about.get(key)
        names = (
            [f.name for f in find_files(root, f"{images}/amos_*.nii.gz", TREE)]
            if listed is None
            else [_file_name(root, entry) for entry in listed]
        )
        for name in names:
            is_ct = int(name[5:9]) <= _LAST_CT
            if modality == "both" or is_ct == (modality == "ct"):
                label = (root / labels / name,) if labels and labelled else ()
                cases.append(Case(name.removesuffix(".nii.gz"), (root / images / name,), label))
    return Scans(
        dataset="amos22",
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=CLASSES,
        intensity=Window(-125, 275) if modality == "ct" else Percentiles(),
    )


def _file_name(root: Path, entry: object) -> str:
    """amos_0001.nii.gz of {"image": "./imagesTr/amos_0001.nii.gz", …} or of that path alone."""
    path = entry.get("image") if isinstance(entry, dict) else entry
    name = Path(path).name if isinstance(path, str) else ""
    if not (name.startswith("amos_") and name[5:9].isdigit() and name.endswith(".nii.gz")):
        raise DataError(f"{root / 'dataset.json'}: {entry}; expected a file amos_0001.nii.gz")
    return name
