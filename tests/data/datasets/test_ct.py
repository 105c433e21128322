"""CT data sets: units, label maps and splits against nibabel, h5py and numpy; bad files."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from data_sets import cut, touch, voxels
from samjax.data import Slices
from samjax.data.datasets.amos22 import amos22
from samjax.data.datasets.base import Case, Pictures, Scans
from samjax.data.datasets.kits19 import kits19
from samjax.data.datasets.lits import lits
from samjax.data.datasets.synapse import CLASSES, TEST_CASES, synapse
from samjax.data.datasets.synapse_samed import synapse_samed
from samjax.data.images import DataError
from samjax.data.intensity import Window
from samjax.data.layouts.volumes import (
    write_amos22,
    write_kits19,
    write_lits,
    write_synapse,
    write_synapse_samed,
)

nib = pytest.importorskip("nibabel")
h5py = pytest.importorskip("h5py")

SHAPE = (20, 18, 6)
SYNAPSE_MAP = {1: 1, 2: 2, 3: 3, 4: 4, 6: 5, 7: 6, 8: 7, 11: 8}  # SAMed's; other organs become 0
SAME_GREY = 1 / 510 + 1e-6  # half a step of 8 bits


def windowed(scan: np.ndarray) -> np.ndarray:
    """SAMed's 0..1 of Hounsfield units, float64."""
    return (np.clip(scan.astype(np.float64), -125, 275) + 125) / 400


def test_synapse_is_sameds_preprocessing(tmp_path):
    write_synapse(tmp_path, shape=SHAPE, cases=(1, 5, 6))
    slices = Slices(synapse(tmp_path))
    folder = tmp_path / "RawData" / "Training"
    images, labels = [], []
    for case in ("0005", "0006"):
        images.append(windowed(voxels(folder / f"img/img{case}.nii.gz").transpose(2, 1, 0)))
        stored = voxels(folder / f"label/label{case}.nii.gz").transpose(2, 1, 0)
        assert set(np.unique(stored)) == set(range(14))
        labels.append(np.vectorize(lambda value: SYNAPSE_MAP.get(value, 0))(stored))
    images, labels = np.concatenate(images), np.concatenate(labels)
    assert len(slices) == len(images) == 12
    assert slices.names[7] == "case0006_slice001"
    assert slices.patients == ("case0005",) * 6 + ("case0006",) * 6
    assert slices.class_names == CLASSES
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        example = slices[number]
        assert np.abs(example["image"] / 255 - image[..., None]).max() <= SAME_GREY
        np.testing.assert_array_equal(example["mask"], label)


def test_synapse_has_18_and_12_cases(tmp_path):
    ids = [*range(1, 11), *range(21, 41)]
    for number in ids:
        touch(tmp_path / f"RawData/Training/img/img{number:04d}.nii.gz")
    touch(tmp_path / "RawData/Testing/img/img0061.nii.gz")
    train, test, both = (synapse(tmp_path, split).names for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (18, 12, 30)
    assert test == tuple(f"case{number:04d}" for number in TEST_CASES)
    assert set(train) | set(test) == set(both)
    assert synapse(tmp_path / "RawData", "test").names == test
    with pytest.raises(
        DataError, match=r"30 files of the synapse data set are missing:\n.*label00"
    ):
        synapse(tmp_path, "all").check()


def test_samed_files_show_what_the_raw_ones_do(tmp_path):
    write_synapse(tmp_path / "raw", shape=SHAPE, cases=(5, 6, 1))
    write_synapse_samed(tmp_path / "samed", shape=SHAPE, cases=(5, 6), test_cases=(1,))
    pictures = synapse_samed(tmp_path / "samed")
    scans = synapse_samed(tmp_path / "samed", "test")
    assert isinstance(pictures, Pictures)
    assert isinstance(scans, Scans)
    pairs = [
        (Slices(synapse(tmp_path / "raw")), pictures),
        (Slices(synapse(tmp_path / "raw", "test")), Slices(scans, rows="first")),
    ]
    for raw, samed in pairs:
        assert (len(raw), raw.names, raw.patients) == (len(samed), samed.names, samed.patients)
        for number in range(len(raw)):
            for key in ("image", "mask"):
                np.testing.assert_array_equal(raw[number][key], samed[number][key])
    with h5py.File(tmp_path / "samed/test_vol_h5/case0001.npy.h5") as file:
        image, label = file["image"][()], file["label"][()]
    assert image.shape == SHAPE[::-1]
    shown = [pairs[1][1][number] for number in range(len(image))]
    grey = np.stack([example["image"][..., 0] for example in shown])
    assert np.abs(grey / 255 - image).max() <= SAME_GREY
    np.testing.assert_array_equal(np.stack([example["mask"] for example in shown]), label)


def test_samed_list_file_chooses_and_orders(tmp_path):
    write_synapse_samed(tmp_path, shape=SHAPE)
    names = tmp_path / "train_220.txt"
    names.write_text("case0006_slice001\ncase0005_slice004\n")
    chosen = synapse_samed(tmp_path, list_file=names)
    assert chosen.names == ("case0006_slice001", "case0005_slice004")
    assert chosen.patients == ("case0006", "case0005")
    names.write_text("case0005_slice004\ncase0099_slice000\n")
    with pytest.raises(DataError, match="1 of 2 names have no file, such as case0099_slice000"):
        synapse_samed(tmp_path, list_file=names)


def test_samed_files_go_to_worker_processes_and_need_h5py(tmp_path, monkeypatch):
    write_synapse_samed(tmp_path, shape=SHAPE)
    scans = synapse_samed(tmp_path, "test")
    assert isinstance(scans, Scans)
    for examples in (synapse_samed(tmp_path), Slices(scans)):
        copy = pickle.loads(pickle.dumps(examples))
        for key in ("image", "mask"):
            np.testing.assert_array_equal(copy[3][key], examples[3][key])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"need h5py: pip install 'samjax\[volumes\]'"):
        scans[0]


def test_bad_samed_files(tmp_path):
    write_synapse_samed(tmp_path, shape=SHAPE, cases=(5,), test_cases=(1, 2))
    slices = synapse_samed(tmp_path)
    file = tmp_path / "train_npz" / "case0005_slice000.npz"
    good = dict(np.load(file))
    for arrays, message in (
        ({"image": good["image"] * 2, "label": good["label"]}, "expected .h, w. from 0 to 1"),
        ({"image": good["image"] * np.nan, "label": good["label"]}, "from nan to nan; expected"),
        ({"image": good["image"]}, "no key 'label'; there are image"),
        ({"image": good["image"], "label": good["label"] + 7}, "values .* are no class; expected"),
        ({"image": good["image"], "label": good["label"][1:]}, "the mask is 20x17 .*, its image"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(DataError, match=rf"case0005_slice000\.npz: .*{message}"):
            slices[0]
    cut(file)
    with pytest.raises(DataError, match=r"case0005_slice000\.npz: not a readable npz file"):
        slices[0]

    scans = synapse_samed(tmp_path, "test")
    file = tmp_path / "test_vol_h5" / "case0001.npy.h5"
    with h5py.File(file, "a") as opened:
        label = opened["label"][()]
        del opened["label"]
        opened["label"] = label[1:]
    with pytest.raises(DataError, match=r"case0001\.npy\.h5: the label has \(5, 18, 20\) voxels"):
        scans[0]
    with h5py.File(file, "a") as opened:
        del opened["label"]
    with pytest.raises(DataError, match=r"case0001\.npy\.h5: no key 'label'; there are image"):
        scans[0]
    file = tmp_path / "test_vol_h5" / "case0002.npy.h5"
    with h5py.File(file, "a") as opened:
        opened["image"][0, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"case0002\.npy\.h5: image: 1 of 2160 voxels are NaN"):
        scans[1]
    cut(file)
    for read in (lambda: scans[1], lambda: scans.shape_of(1)):
        with pytest.raises(DataError, match=r"case0002\.npy\.h5: not a readable HDF5 file"):
            read()


def amos_json(root: Path) -> None:
    """The published numbers: 200 + 40, 100 + 20 and 200 + 40 scans."""
    ct, mri = iter(range(1, 501)), iter(range(501, 601))
    about = {}
    for key, images, labels, counts in (
        ("training", "imagesTr", "labelsTr", (200, 40)),
        ("validation", "imagesVa", "labelsVa", (100, 20)),
        ("test", "imagesTs", None, (200, 40)),
    ):
        ids = [next(ct) for _ in range(counts[0])] + [next(mri) for _ in range(counts[1])]
        names = [f"amos_{number:04d}.nii.gz" for number in ids]
        about[key] = [{"image": f"./{images}/{name}"} for name in names]
        for entry, name in zip(about[key], names, strict=True):
            if labels:
                entry["label"] = f"./{labels}/{name}"
    (root / "dataset.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("split", "modality", "labelled", "count"),
    [
        ("train", "ct", True, 200),
        ("train", "mri", True, 40),
        ("validation", "both", True, 120),
        ("test", "ct", True, 200),
        ("all", "ct", True, 300),
        ("all", "ct", False, 500),
        ("all", "mri", False, 100),
    ],
)
def test_amos22_has_the_scans_of_its_list(tmp_path, split, modality, labelled, count):
    amos_json(tmp_path)
    scans = amos22(tmp_path, split, modality=modality, labelled=labelled)
    assert len(scans) == count
    has_labels = labelled and split != "test"
    assert all(len(case.labels) == has_labels for case in scans.cases)
    assert all(
        (int(name[5:]) <= 500) == (modality == "ct") or modality == "both" for name in scans.names
    )


def test_amos22_reads_labels_and_what_has_none(tmp_path):
    write_amos22(tmp_path, shape=SHAPE)
    listed = amos22(tmp_path)
    (tmp_path / "dataset.json").unlink()
    assert amos22(tmp_path).names == listed.names == ("amos_0001", "amos_0004")
    scan = listed[1]
    np.testing.assert_array_equal(
        scan.volumes[0].array, voxels(tmp_path / "imagesTr/amos_0004.nii.gz")
    )
    np.testing.assert_array_equal(scan.label, voxels(tmp_path / "labelsTr/amos_0004.nii.gz"))
    assert set(np.unique(scan.label)) == set(range(16))
    (tmp_path / "labelsTr/amos_0001.nii.gz").unlink()
    with pytest.raises(DataError, match=r"1 files .* missing:\n.*labelsTr.amos_0001\.nii\.gz"):
        listed.check()
    unlabelled = Slices(amos22(tmp_path, "all", labelled=False))
    unlabelled.check()
    assert len(unlabelled) == 4 * SHAPE[2]
    assert not unlabelled[0]["mask"].any()
    mri = Slices(amos22(tmp_path, "all", modality="mri"))
    assert len(mri) == 3 * SHAPE[2]
    assert (mri[0]["image"][0, 0] == 0).all()
    (tmp_path / "dataset.json").write_text('{"training": [{"label": "a"}]}')
    with pytest.raises(DataError, match=r"dataset\.json: .*label.*; expected a file amos_0001"):
        amos22(tmp_path)


def test_lits_is_in_order_of_numbers(tmp_path):
    for number in range(131):
        touch(tmp_path / f"Training Batch {1 + (number > 27)}" / f"volume-{number}.nii")
        touch(tmp_path / "segmentations" / f"segmentation-{number}.nii")
        touch(tmp_path / f"test-volume-{number % 70}.nii")
    train, test = lits(tmp_path), lits(tmp_path, "test")
    assert train.names == tuple(f"volume-{number}" for number in range(131))
    assert test.names == tuple(f"test-volume-{number}" for number in range(70))
    assert {case.labels[0].parent.name for case in train.cases} == {"segmentations"}
    assert not any(case.labels for case in (*test.cases, *lits(tmp_path, labelled=False).cases))
    train.check()
    (tmp_path / "segmentations" / "segmentation-100.nii").unlink()
    with pytest.raises(DataError, match=r"1 files .* missing:\n.*segmentation-100\.nii"):
        lits(tmp_path).check()


def test_lits_reads_liver_and_tumour(tmp_path):
    write_lits(tmp_path, shape=SHAPE)
    example = Slices(lits(tmp_path), take="largest")[3]
    scan, labels = (voxels(tmp_path / f"{name}-10.nii") for name in ("volume", "segmentation"))
    largest = int((labels > 0).sum(axis=(0, 1)).argmax())
    assert example["name"] == f"volume-10_slice{largest:03d}"
    grey = example["image"][..., 0] / 255
    assert np.abs(grey - windowed(scan[:, :, largest].T)).max() <= SAME_GREY
    np.testing.assert_array_equal(example["mask"], labels[:, :, largest].T)
    assert set(np.unique(example["mask"])) == {0, 1, 2}


def test_kits19_has_210_labelled_of_300_cases(tmp_path):
    for number in range(300):
        touch(tmp_path / "data" / f"case_{number:05d}" / "imaging.nii.gz")
        if number < 210:
            touch(tmp_path / "data" / f"case_{number:05d}" / "segmentation.nii.gz")
    train, test = kits19(tmp_path), kits19(tmp_path, "test")
    assert (len(train), len(test)) == (210, 90)
    assert (train.names[-1], test.names[0]) == ("case_00209", "case_00210")
    assert len(kits19(tmp_path, "all", labelled=False)) == 300
    train.check()
    (tmp_path / "data/case_00100/segmentation.nii.gz").unlink()
    with pytest.raises(DataError, match=r"missing:\n.*case_00100.segmentation\.nii\.gz"):
        kits19(tmp_path).check()
    with pytest.raises(ValueError, match="split 'all': expected one of train, test"):
        kits19(tmp_path, "all")


def test_kits19_slices_lie_along_the_first_axis(tmp_path):
    write_kits19(tmp_path, shape=SHAPE)
    slices = Slices(kits19(tmp_path), rows="first")
    assert len(slices) == 3 * SHAPE[2]
    folder = tmp_path / "case_00001"
    scan, labels = (voxels(folder / f"{name}.nii.gz") for name in ("imaging", "segmentation"))
    assert scan.shape == SHAPE[::-1]
    for number in range(SHAPE[2]):
        example = slices[SHAPE[2] + number]
        assert np.abs(example["image"][..., 0] / 255 - windowed(scan[number])).max() <= SAME_GREY
        np.testing.assert_array_equal(example["mask"], labels[number])


def rewrite(file: Path, change) -> None:
    """Writes a NIfTI file anew, with what `change` makes of its (voxels, affine)."""
    loaded = nib.load(file)
    array, affine = change(np.asarray(loaded.dataobj), loaded.affine)
    nib.save(nib.Nifti1Image(array, affine), file)


def unknown_class(array, affine):
    array[0, 0, 0] = 14
    return array, affine


def not_a_number(array, affine):
    array = array.astype(np.float32)
    array[0, 0, 0] = np.nan
    return array, affine


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("img", lambda a, m: (a[:-1], m), r"\(20, 18, 6\) voxels, but .*\(19, 18, 6\); expected"),
        ("label", lambda a, m: (a, m + np.eye(4, k=3)), "its affine .* expected one grid"),
        ("label", lambda a, m: (a, m * [-1, 1, 1, 1]), "its affine .* expected one grid"),
        ("label", unknown_class, r"label0005\.nii\.gz: values 14 are no class; expected 0 and 1"),
        ("img", not_a_number, r"img0005\.nii\.gz: 1 of 2160 voxels are NaN or infinite"),
    ],
)
def test_bad_voxels(tmp_path, name, change, message):
    write_synapse(tmp_path, shape=SHAPE, cases=(5,))
    rewrite(tmp_path / "RawData" / "Training" / name / f"{name}0005.nii.gz", change)
    with pytest.raises(DataError, match=message):
        synapse(tmp_path)[0]


def test_truncated_and_missing_files(tmp_path):
    write_synapse(tmp_path, shape=SHAPE, cases=(5, 6))
    scans = synapse(tmp_path)
    scans.check()
    cut(tmp_path / "RawData/Training/img/img0005.nii.gz")
    with pytest.raises(DataError, match=r"img0005\.nii\.gz: not a readable NIfTI file"):
        scans[0]
    (tmp_path / "RawData/Training/label/label0006.nii.gz").unlink()
    with pytest.raises(DataError, match=r"label0006\.nii\.gz: no such file; expected by the syn"):
        scans[1]


def test_real_ct(shared_data):
    folder = shared_data / "totalseg_ct"
    organs = json.loads((folder / "labels_total.json").read_text())
    files = folder / "example_ct_sm.nii.gz", folder / "example_seg.nii.gz"
    scans = Scans(
        dataset="totalseg",
        root=folder,
        split="all",
        cases=(Case("ct", files[:1], files[1:]),),
        class_names=tuple(organs[str(number)] for number in range(1, len(organs) + 1)),
        intensity=Window(-125, 275),
    )
    slices = Slices(scans, take="foreground")
    scan, labels = (voxels(file) for file in files)
    filled = np.flatnonzero(labels.any(axis=(0, 1)))
    assert [place.slice for place in slices.places] == filled.tolist()
    assert len(slices) > 20
    for number, k in enumerate(filled.tolist()):
        example = slices[number]
        grey = example["image"][..., 0] / 255
        assert np.abs(grey - windowed(scan[:, :, k].T)).max() <= SAME_GREY
        np.testing.assert_array_equal(example["mask"], labels[:, :, k].T)
