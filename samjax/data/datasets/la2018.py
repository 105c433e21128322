"""LA 2018: the left atrium in 100 labelled late-enhanced MR scans of 0.625 mm, 88 slices each.

Xiong et al., Medical Image Analysis 67, 2021, by registration from
https://www.cardiacatlas.org/atriaseg2018-challenge/ (terms there). The organisers part the scans
into folders, not by patient, and publish no patients.

UA-MT (Yu et al., arXiv:1907.07034; https://github.com/yulequan/UA-MT) parts the 100 into 80 and
20 and distributes them cropped around the atrium, (x - mean) / deviation, as HDF5 with the axes
(W, H, D). H-SAM (arXiv:2403.18271, preprocess_LA.py) trains on the first four of these 80 and
tests on the 20, with axis 0 down the picture: `Slices(scans, rows="first")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from samjax.data.datasets.base import Case, Scans, find_files, one_of, wrong_tree
from samjax.data.datasets.hdf5 import H5Scans, h5_shape, read_h5
from samjax.data.images import DataError

TREE = """
    Training Set/<id>/lgemri.nrrd, laendo.nrrd     100 scans, their labels (255)
    or, of UA-MT, for files="h5":
    2018LA_Seg_Training Set/<id>/mri_norm2.h5      100 scans; keys image, label
    train.list, test.list                          ids of a split (may be missing)
"""
HSAM_TRAIN = (
    *("06SR5RBREL16DQ6M8LWS", "0RZDK210BSMWAA6467LU"),
    *("1D7CUD1955YZPGK8XHJX", "1GU15S0GJ6PFNARO469W"),
)
# UA-MT's data/test.list.
UAMT_TEST = (
    *("UPT6DX9IQY9JAZ7HJKA7", "UTBUJIWZMKP64E3N73YC", "ULHWPWKKLTE921LQLH1P"),
    *("V0MZOWJ6MU3RMRCV9EXR", "VDOF02M8ZHEAADFMS6NP", "VG4C826RAAKVMV9BQLVD"),
    *("VIXBEFTNVHZWKAKURJBN", "VQ2L3WM8KEVF6L44E6G9", "WBG9WYZ1B25WDT5WAT8T"),
    *("WMDG2EFA6L2SNDZXIRU0", "WNPKE0W404QE9AELX1LR", "WSJB9P4JCXUVHBOYFVWL"),
    *("WW8F5CO4S4K5IM5Z7EXX", "X18LU5AOBNNDMLTA0JZL", "XYDLYJ5CS19FDBVLJIPI"),
    *("Y7ZU0B2APPF54WG6PDMF", "YDKD1HVHSME6NVMA8I39", "Z9GMG63CJLL0VW893BB1"),
    *("ZIJLJAVQV3FJ6JSQOH1E", "ZQPMJ4XEC5A4BISD45P1"),
)


def la2018(
    root: str | Path, split: str = "train", *, files: Literal["nrrd", "h5"] = "nrrd"
) -> Scans:
    """Reads the challenge's files or UA-MT's.

    Args:
        root: see ``TREE``; scans of a folder "Testing Set" are not looked at.
        split: "train" (80) and "test" (20) of UA-MT, "hsam4" (H-SAM's 4), or "all" (100). A file
            train.list or test.list in the root or beside the folder of the ids decides instead.
        files: "nrrd", or "h5" for UA-MT's, which may lie beside them.

    Raises:
        DataError: another tree, or an id of a list or of H-SAM's that is missing.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, ("train", "test", "hsam4", "all"))
    one_of("files", files, ("nrrd", "h5"))
    image_name, label_name = {
        "nrrd": ("lgemri.nrrd", "laendo.nrrd"),
        "h5": ("mri_norm2.h5", "mri_norm2.h5"),
    }[files]
    found = {
        file.parent.name: file
        for file in find_files(root, f"**/{image_name}", TREE)
        if file.parent.parent.name != "Testing Set"
    }
    if not found:
        raise wrong_tree(root, f"{image_name} of the training set", TREE)
    ids = _ids(root, split, found)
    images = [found[name] for name in ids]
    cases = [Case(f.parent.name, (f,), (f.with_name(label_name),)) for f in images]
    if files == "h5":
        return H5Scans(
            dataset="la2018",
            root=root,
            split=split,
            cases=tuple(cases),
            class_names=("left atrium",),
            read=read_h5,
            shape=h5_shape,
        )
    return Scans(
        dataset="la2018",
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=("left atrium",),
        values={255: 1},
    )


def _ids(root: Path, split: str, found: dict[str, Path]) -> list[str]:
    """The ids of a split, in its order."""
    beside = next(iter(found.values())).parent.parent.parent
    lists = [folder / f"{split}.list" for folder in (root, beside)]
    source = next((file for file in lists if file.is_file()), None)
    if source is not None:
        ids = source.read_text("utf-8").split()
    elif split == "hsam4":
        ids = list(HSAM_TRAIN)
    else:
        ids = [i for i in sorted(found) if split == "all" or (i in UAMT_TEST) == (split == "test")]
    if missing := [name for name in ids if name not in found]:
        raise DataError(
            f"{source or root}: the split {split!r} has {len(ids)} scans, of which "
            f"{len(missing)} are missing, such as {missing[0]}"
        )
    return ids
