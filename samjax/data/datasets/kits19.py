"""KiTS19: kidneys and their tumours in 300 CT scans, 210 of them labelled.

Heller et al., arXiv:1904.00445, https://github.com/neheller/kits19, CC BY-NC-SA 4.0. One scan a
patient. Cases 210 to 299 are the test set, whose labels are not published; the labelled part has
no official split: `samjax.data.split` parts it. SAMora (arXiv:2511.08626) takes it as unlabelled
images.

The files store (slices, height, width), so the slice axis is 0, and axis 1 runs down the picture:
`Slices(scans, rows="first")` shows it upright.
"""

from __future__ import annotations

from pathlib import Path

from samjax.data.datasets.base import Case, Scans, find_files, one_of
from samjax.data.intensity import Window

TREE = """
    case_00000/imaging.nii.gz, case_00000/segmentation.nii.gz     … case_00209: labelled
    case_00210/imaging.nii.gz                                     … case_00299: without labels
    (or all of it in a folder data)
"""
CLASSES = ("kidney", "tumour")
_FIRST_TEST = 210


def kits19(root: str | Path, split: str = "train", *, labelled: bool = True) -> Scans:
    """Reads KiTS19.

    Args:
        root: see ``TREE``.
        split: "train" (210), "test" (90, no labels), or "all" (300, for ``labelled=False``).
        labelled: False leaves the labels alone, so that they need not be there.

    Raises:
        DataError: another tree. ValueError: another split, or "all" with labels.
    """
    root = Path(root)
    one_of("split", split, ("train", "test") if labelled else ("train", "test", "all"))
    folder = root / "data" if (root / "data").is_dir() else root
    cases = []
    for case in find_files(folder, "case_[0-9][0-9][0-9][0-9][0-9]", TREE):
        is_test = int(case.name[5:]) >= _FIRST_TEST
        if split == "all" or is_test == (split == "test"):
            labels = () if is_test or not labelled else (case / "segmentation.nii.gz",)
            cases.append(Case(case.name, (case / "imaging.nii.gz",), labels))
    return Scans(
        dataset="kits19",
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=CLASSES,
        intensity=Window(-125, 275),
        axis=0,
    )
