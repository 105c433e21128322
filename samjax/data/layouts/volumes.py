"""Phantom CT and MR scans in the layouts in which the volume data sets are published.

One writer for each reader of `samjax.data.datasets`, with the official names, formats and types of
numbers. The pictures are those of `samjax.data.phantom_volume`: they model no disease. A writer
takes the ids of the cases, so that a test can write what a split needs, and by default writes a few
for each side of it. Every case is drawn from ``seed`` and its position: no two are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from samjax.atomic import write_json
from samjax.data.datasets.amos22 import CLASSES as AMOS_CLASSES
from samjax.data.datasets.brats import MEN_MODALITIES, MODALITIES_2020
from samjax.data.datasets.hdf5 import write_h5
from samjax.data.datasets.la2018 import HSAM_TRAIN, UAMT_TEST
from samjax.data.datasets.synapse import VALUES
from samjax.data.intensity import Window
from samjax.data.itk import library
from samjax.data.phantom_volume import phantom_ct, phantom_mr

Item = TypeVar("Item")
Shape = tuple[int, int, int]
SHAPE = (48, 40, 8)  # voxels along i, j, k
_CT_SPACING = (0.8, 0.8, 3.0)  # mm
_SYNAPSE = {
    **{"spleen": 1, "right kidney": 2, "left kidney": 3, "gallbladder": 4, "esophagus": 5},
    **{"liver": 6, "stomach": 7, "aorta": 8, "postcava": 9, "veins": 10, "pancreas": 11},
    **{"right adrenal gland": 12, "left adrenal gland": 13},
}
_ATRIA = (*HSAM_TRAIN, *UAMT_TEST[:2])
_AMOS = {name: n for n, name in enumerate(AMOS_CLASSES[:-1], start=1)} | {"prostate": 15}


def write_synapse(
    root: str | Path, *, shape: Shape = SHAPE, cases: Sequence[int] = (1, 2, 5, 6), seed: int = 0
) -> None:
    """Raw Synapse: int16 Hounsfield units, 13 organs uint8; cases 1 and 2 are of the test set."""
    root = Path(root)
    for number, case in enumerate(cases):
        scan, organs = phantom_ct(shape, _SYNAPSE, seed=_seed(seed, number))
        folder = root / "RawData" / "Training"
        _write(folder / "img" / f"img{case:04d}.nii.gz", scan, _CT_SPACING)
        _write(folder / "label" / f"label{case:04d}.nii.gz", organs, _CT_SPACING)


def write_synapse_samed(
    root: str | Path,
    *,
    shape: Shape = SHAPE,
    cases: Sequence[int] = (5, 6),
    test_cases: Sequence[int] = (1, 2),
    seed: int = 0,
) -> None:
    """SAMed's files: float32 0..1 and labels 0..8 uint8, (D, H, W) of a scan of ``shape``."""
    root = Path(root)
    stored_to_label = np.zeros(14, np.uint8)
    for stored, label in VALUES.items():
        stored_to_label[stored] = label
    for number, case in enumerate((*cases, *test_cases)):
        scan, organs = phantom_ct(shape, _SYNAPSE, seed=_seed(seed, number))
        image, label = Window(-125, 275)(scan).T, stored_to_label[organs].T
        if number >= len(cases):
            file = root / "test_vol_h5" / f"case{case:04d}.npy.h5"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_h5(file, image=image, label=label)
            continue
        (root / "train_npz").mkdir(parents=True, exist_ok=True)
        for at in range(len(image)):
            name = f"case{case:04d}_slice{at:03d}.npz"
            np.savez(root / "train_npz" / name, image=image[at], label=label[at])


def write_amos22(
    root: str | Path,
    *,
    shape: Shape = SHAPE,
    cases: Sequence[int] = (1, 4, 507, 508),
    validation: Sequence[int] = (8, 510),
    test: Sequence[int] = (2,),
    seed: int = 0,
) -> None:
    """AMOS22 with its dataset.json: int16 and 15 organs uint8; those above 500 have MR signals."""
    root = Path(root)
    parts = {"training": ("Tr", cases), "validation": ("Va", validation), "test": ("Ts", test)}
    about: dict[str, Any] = {
        "name": "AMOS",
        "labels": {str(n): name for n, name in enumerate(("background", *AMOS_CLASSES))},
    }
    number = 0
    for key, (end, ids) in parts.items():
        about[key] = []
        for case in ids:
            scan, organs = phantom_ct(shape, _AMOS, seed=_seed(seed, number))
            if case > 500:  # on a background of 0; bright and dark change places
                scan = np.where(scan < -500, 0, 500 - scan.clip(-200, 400)).astype(np.int16)
            name, number = f"amos_{case:04d}.nii.gz", number + 1
            entry = {"image": f"./images{end}/{name}"}
            _write(root / f"images{end}" / name, scan, _CT_SPACING)
            if key != "test":
                entry["label"] = f"./labels{end}/{name}"
                _write(root / f"labels{end}" / name, organs, _CT_SPACING)
            about[key].append(entry)
    write_json(root / "dataset.json", about)


def write_lits(
    root: str | Path,
    *,
    shape: Shape = SHAPE,
    cases: Sequence[int] = (0, 1, 2, 10),
    test: Sequence[int] = (0,),
    seed: int = 0,
) -> None:
    """LiTS: .nii of int16 Hounsfield units and labels uint8, 1 the liver, 2 its tumour."""
    root = Path(root)
    names = [f"volume-{case}" for case in cases] + [f"test-volume-{case}" for case in test]
    for number, name in enumerate(names):
        organs = {"liver": 1, "liver tumour": 2}
        scan, labels = phantom_ct(shape, organs, seed=_seed(seed, number))
        _write(root / f"{name}.nii", scan, _CT_SPACING)
        if number < len(cases):
            _write(root / f"{name.replace('volume', 'segmentation')}.nii", labels, _CT_SPACING)


def write_kits19(
    root: str | Path, *, shape: Shape = SHAPE, cases: Sequence[int] = (0, 1, 2, 210), seed: int = 0
) -> None:
    """KiTS19: (slices, height, width) of a scan of ``shape``, float32; labels from 210 on not."""
    root = Path(root)
    for number, case in enumerate(cases):
        organs = {"right kidney": 1, "left kidney": 1, "kidney tumour": 2}
        scan, labels = phantom_ct(shape, organs, seed=_seed(seed, number))
        folder = root / f"case_{case:05d}"
        _write(folder / "imaging.nii.gz", scan.T.astype(np.float32), _CT_SPACING[::-1])
        if case < 210:
            _write(folder / "segmentation.nii.gz", labels.T, _CT_SPACING[::-1])


def write_la2018(
    root: str | Path,
    *,
    shape: Shape = SHAPE,
    cases: Sequence[str] = _ATRIA,
    seed: int = 0,
) -> None:
    """The challenge's left atria: nrrd of uint8, 255 the atrium, in a folder an id."""
    root = Path(root)
    for case, signal, atrium in _mr_scans(cases, shape, seed):
        folder = root / "Training Set" / case
        spacing = (0.625, 0.625, 0.625)
        _write(folder / "lgemri.nrrd", (signal // 4).clip(0, 255).astype(np.uint8), spacing)
        _write(folder / "laendo.nrrd", atrium * np.uint8(255), spacing)


def write_la2018_h5(
    root: str | Path,
    *,
    shape: Shape = SHAPE,
    cases: Sequence[str] = _ATRIA,
    seed: int = 0,
) -> None:
    """UA-MT's left atria: HDF5 of float32 with mean 0 and deviation 1, labels uint8 0 and 1."""
    root = Path(root)
    for case, signal, atrium in _mr_scans(cases, shape, seed):
        file = root / "2018LA_Seg_Training Set" / case / "mri_norm2.h5"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = ((signal - signal.mean()) / signal.std()).astype(np.float32)
        write_h5(file, image=image, label=atrium)


def write_promise12(
    root: str | Path,
    *,
    shape: Shape = SHAPE,
    cases: Sequence[int] = (0, 1, 2, 3),
    test: Sequence[int] = (0,),
    seed: int = 0,
) -> None:
    """PROMISE12: MetaImage with a raw file, int16, and the prostate as int8."""
    root = Path(root)
    folders = [("training_data", case) for case in cases] + [("test_data", case) for case in test]
    for (folder, case), signal, prostate in _mr_scans(folders, shape, seed):
        spacing = (0.625, 0.625, 3.6)
        _write(root / folder / f"Case{case:02d}.mhd", signal, spacing)
        if folder == "training_data":
            label = prostate.astype(np.int8)
            _write(root / folder / f"Case{case:02d}_segmentation.mhd", label, spacing)


def write_brats_men(
    root: str | Path,
    *,
    shape: Shape = SHAPE,
    cases: Sequence[str] = ("00004-000", "00008-000", "00009-000", "00009-001", "00010-000"),
    unlabelled: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """BraTS-MEN 2023: int16 signals, uint8 labels: SNFH (2) around ET (3) around NETC (1)."""
    root = Path(root)
    folder = root / "ASNR-MICCAI-BraTS2023-MEN-Challenge-TrainingData"
    for number, case in enumerate((*cases, *unlabelled)):
        signals, labels = phantom_mr(shape, 4, (2, 3, 1), seed=_seed(seed, number))
        stem = f"BraTS-MEN-{case}"
        images: dict[str, np.ndarray] = dict(zip(MEN_MODALITIES, signals, strict=True))
        if number < len(cases):
            images["seg"] = labels
        for name, image in images.items():
            _write(folder / stem / f"{stem}-{name}.nii.gz", image, (1.0, 1.0, 1.0))


def write_brats2020(
    root: str | Path,
    *,
    shape: Shape = SHAPE,
    cases: Sequence[int] = (1, 2, 3),
    validation: Sequence[int] = (1,),
    seed: int = 0,
) -> None:
    """BraTS 2020: int16 signals, uint8 labels: ED (2) around ET (4) around NCR/NET (1)."""
    root = Path(root)
    parts = [("Training", case) for case in cases] + [("Validation", c) for c in validation]
    for number, (part, case) in enumerate(parts):
        signals, labels = phantom_mr(shape, 4, (2, 4, 1), seed=_seed(seed, number))
        stem = f"BraTS20_{part}_{case:03d}"
        images: dict[str, np.ndarray] = dict(zip(MODALITIES_2020, signals, strict=True))
        if part == "Training":
            images["seg"] = labels
        for name, image in images.items():
            folder = root / f"MICCAI_BraTS2020_{part}Data" / stem
            _write(folder / f"{stem}_{name}.nii.gz", image, (1.0, 1.0, 1.0))


def write_msd(
    root: str | Path,
    *,
    shape: Shape = SHAPE,
    cases: Sequence[int] = (1, 3, 4),
    test: Sequence[int] = (2,),
    name: str = "hippocampus",
    modalities: Sequence[str] = ("MRI",),
    labels: Mapping[int, str] | None = None,
    seed: int = 0,
) -> None:
    """A task of the Decathlon with its dataset.json: 4-D images where there are several modalities.

    Args:
        name: the files are called so: hippocampus_001.nii.gz.
        labels: 1..k → name, nested from the outermost to the core; None for the hippocampus's.
    """
    root = Path(root)
    labels = {1: "Anterior", 2: "Posterior"} if labels is None else labels
    files = []
    for number, case in enumerate((*cases, *test)):
        scans, parts = phantom_mr(shape, len(modalities), (*labels,), seed=_seed(seed, number))
        image = scans[0] if len(scans) == 1 else np.moveaxis(scans, 0, -1)
        end = "Tr" if number < len(cases) else "Ts"
        files.append(f"./images{end}/{name}_{case:03d}.nii.gz")
        _write(root / files[-1], image, (1.0, 1.0, 1.0))
        if end == "Tr":
            _write(root / files[-1].replace("images", "labels"), parts, (1.0, 1.0, 1.0))
    training = files[: len(cases)]
    about = {
        "name": name,
        "modality": {str(n): modality for n, modality in enumerate(modalities)},
        "labels": {"0": "background"} | {str(n): label for n, label in labels.items()},
        "training": [{"image": f, "label": f.replace("images", "labels")} for f in training],
        "test": files[len(cases) :],
    }
    write_json(root / "dataset.json", about)


def _mr_scans(
    cases: Sequence[Item], shape: Shape, seed: int
) -> Iterator[tuple[Item, np.ndarray, np.ndarray]]:
    """Each case with the signal and the part of a phantom of its own."""
    for number, case in enumerate(cases):
        (signal,), part = phantom_mr(shape, seed=_seed(seed, number))
        yield case, signal, part


def _seed(seed: int, number: int) -> int:
    """Different for every case of every seed."""
    return int(np.random.default_rng((seed, number)).integers(2**31))


def _write(file: Path, array: np.ndarray, spacing: Sequence[float]) -> None:
    """Writes a volume (i, j, k[, volumes]) in the format that its name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.name.endswith((".nii", ".nii.gz")):
        nibabel = library("nibabel")
        nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])), file)
        return
    sitk = library("SimpleITK")
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file), useCompression=file.suffix == ".nrrd")
