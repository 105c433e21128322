"""BraTS: brain tumours in four MR modalities on one grid of 240×240×155 voxels of 1 mm.

BraTS-MEN 2023 (meningioma; LaBella et al., arXiv:2305.07642, Synapse syn51514106) and BraTS 2020
(glioma; Menze et al., IEEE TMI 34, 2015; https://www.med.upenn.edu/cbica/brats2020), both by
registration (terms there). Labels of their validation and test sets are not published. SAMSEG
(Chikumbu, University of Cape Town, 2024) parts the 880 annotated meningiomas into 680 and 200, we
do not know how; MedSAGa (arXiv:2407.15042) takes the FLAIR images of BraTS 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from samjax.data.datasets.base import Case, Scans, find_files, one_of, wrong_tree
from samjax.data.intensity import Brats2023

MEN_TREE = """
    ASNR-MICCAI-BraTS2023-MEN-Challenge-TrainingData/
        BraTS-MEN-00004-000/BraTS-MEN-00004-000-t1c.nii.gz, …-t1n.nii.gz, …-t2f.nii.gz,
                            …-t2w.nii.gz, …-seg.nii.gz (where annotated)
"""
TREE_2020 = """
    MICCAI_BraTS2020_TrainingData/
        BraTS20_Training_001/BraTS20_Training_001_flair.nii.gz, …_t1.nii.gz, …_t1ce.nii.gz,
                             …_t2.nii.gz, …_seg.nii.gz
    MICCAI_BraTS2020_ValidationData/BraTS20_Validation_001/…   (for split="validation" only)
"""
MEN_MODALITIES = ("t1c", "t1n", "t2f", "t2w")
MODALITIES_2020 = ("flair", "t1", "t1ce", "t2")
_VALIDATION = 200 / 880
# What the segmentation of case 355 is called in the copies of BraTS 2020 that go around.
_MISNAMED = "W39_1998.09.19_Segm"
Target = Literal["whole", "labels"]


def brats_men(
    root: str | Path, split: str = "train", *, target: Target = "whole", seed: int = 0
) -> Scans:
    """Reads the annotated cases of BraTS-MEN 2023, those with a segmentation.

    The sides are drawn by ``np.random.default_rng(seed)``: patients, sorted by id, are permuted,
    and go to validation until it has 200/880 of the annotated cases, rounded. So 880 cases give
    680 and 200, a partial copy its share. All timepoints of a patient (BraTS-MEN-00004-000, -001)
    are on one side.

    SAMSEG's crop to 138×202 pixels is `Slices(scans, crop=((51, 189), (19, 221)), rows="first")`.

    Args:
        root: see ``MEN_TREE``, or a folder above.
        split: "train", "validation" or "all".
        target: "whole" for one class, the whole tumour, as in SAMSEG; "labels" for NETC
            (non-enhancing core), SNFH (surrounding FLAIR hyperintensity) and ET (enhancing).
        seed: of the split.

    Raises:
        DataError: another tree, no annotated case.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, ("train", "validation", "all"))
    one_of("target", target, ("whole", "labels"))
    cases = []
    for folder in find_files(root, "**/BraTS-MEN-[0-9]*-[0-9][0-9][0-9]", MEN_TREE):
        label = folder / f"{folder.name}-seg.nii.gz"
        if label.exists():
            images = tuple(folder / f"{folder.name}-{m}.nii.gz" for m in MEN_MODALITIES)
            cases.append(Case(folder.name, images, (label,), patient=folder.name[:-4]))
    if not cases:
        raise wrong_tree(root, "annotated case (…-seg.nii.gz)", MEN_TREE)
    if split != "all":
        away = _drawn([case.patient for case in cases], seed)
        cases = [case for case in cases if (case.patient in away) == (split == "validation")]
    return Scans(
        dataset="brats_men",
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=("tumour",) if target == "whole" else ("NETC", "SNFH", "ET"),
        modalities=MEN_MODALITIES,
        values={1: 1, 2: 1, 3: 1} if target == "whole" else None,
        intensity=Brats2023(),
    )


def brats2020(root: str | Path, split: str = "train", *, target: Target = "labels") -> Scans:
    """Reads BraTS 2020; files may be unpacked (.nii).

    The labelled part has no official split: `samjax.data.split` parts it by patient (one scan
    each). The segmentation of case 355, which bears another name in copies that go around
    (W39_1998.09.19_Segm.nii), is taken by that name.

    Args:
        root: see ``TREE_2020``, or a folder above.
        split: "train" for the 369 labelled cases, "validation" for the 125 without labels.
        target: "labels" for NCR/NET (stored 1), ED (2) and ET (4), or "whole" for one class.

    Raises:
        DataError: another tree. ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, ("train", "validation"))
    one_of("target", target, ("whole", "labels"))
    cases = []
    part = "Training" if split == "train" else "Validation"
    for folder in find_files(root, f"**/BraTS20_{part}_[0-9][0-9][0-9]", TREE_2020):
        images = tuple(_nifti(folder, f"{folder.name}_{m}") for m in MODALITIES_2020)
        label = _nifti(folder, f"{folder.name}_seg")
        misnamed = _nifti(folder, _MISNAMED)
        if not label.exists() and misnamed.exists():
            label = misnamed
        cases.append(Case(folder.name, images, (label,) if split == "train" else ()))
    return Scans(
        dataset="brats2020",
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=("tumour",) if target == "whole" else ("NCR/NET", "ED", "ET"),
        modalities=MODALITIES_2020,
        values={1: 1, 2: 1, 4: 1} if target == "whole" else {1: 1, 2: 2, 4: 3},
    )


def _nifti(folder: Path, stem: str) -> Path:
    unpacked = folder / f"{stem}.nii"
    return unpacked if unpacked.is_file() else folder / f"{stem}.nii.gz"


def _drawn(patients: Sequence[str], seed: int) -> set[str]:
    """The patients of the validation side; ``patients`` has one for each case."""
    wanted = round(len(patients) * _VALIDATION)
    distinct = sorted(set(patients))
    away: set[str] = set()
    for index in np.random.default_rng(seed).permutation(len(distinct)).tolist():
        if sum(patient in away for patient in patients) >= wanted:
            break
        away.add(distinct[index])
    return away
