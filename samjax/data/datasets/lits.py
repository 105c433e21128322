"""LiTS: liver and liver tumours in 131 labelled and 70 further abdominal CT scans.

Bilic et al., Medical Image Analysis 84, 2023 (arXiv:1901.04056),
https://competitions.codalab.org/competitions/17094, CC BY-NC-ND 4.0. One scan a patient. The
labels of the 70 test scans are not published, and the labelled part has no official split:
`samjax.data.split` parts it. SAMora (arXiv:2511.08626) takes it as unlabelled images.

The files of volumes 28 to 47 have no spacing (1 mm along all axes); their slices are axial along
axis 2 like all others.
"""

from __future__ import annotations

from pathlib import Path

from samjax.data.datasets.base import Case, Scans, find_files, one_of
from samjax.data.intensity import Window

TREE = """
    volume-0.nii … volume-130.nii                  131 scans, in sub-folders or not
    segmentation-0.nii … segmentation-130.nii      their labels, beside them or elsewhere
    test-volume-0.nii … test-volume-69.nii         scans without labels (for split="test" only)
"""
CLASSES = ("liver", "tumour")


def lits(root: str | Path, split: str = "train", *, labelled: bool = True) -> Scans:
    """Reads LiTS, by number; files may be packed (.nii.gz).

    Args:
        root: see ``TREE``.
        split: "train" for the 131 scans, "test" for those without labels.
        labelled: False leaves the labels alone, so that they need not be there.

    Raises:
        DataError: another tree. ValueError: another split.
    """
    root = Path(root)
    one_of("split", split, ("train", "test"))
    prefix = "volume" if split == "train" else "test-volume"
    images = find_files(root, f"**/{prefix}-[0-9]*.nii*", TREE)
    masks = {file.name: file for file in root.rglob("segmentation-[0-9]*.nii*")}
    cases = []
    for image in sorted(images, key=_number):
        label = image.name.replace("volume", "segmentation")
        wanted = labelled and split == "train"
        labels = (masks.get(label, image.parent / label),) if wanted else ()
        cases.append(Case(f"{prefix}-{_number(image)}", (image,), labels))
    return Scans(
        dataset="lits",
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=CLASSES,
        intensity=Window(-125, 275),
    )


def _number(file: Path) -> int:
    return int(file.name.split(".")[0].rsplit("-", 1)[1])
