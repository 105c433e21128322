"""MR data sets: voxels, labels and splits against nibabel, SimpleITK, h5py; bad files."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data_sets import cut, touch, voxels
from samjax.data import Slices
from samjax.data.datasets.brats import MEN_MODALITIES, MODALITIES_2020, brats2020, brats_men
from samjax.data.datasets.la2018 import HSAM_TRAIN, UAMT_TEST, la2018
from samjax.data.datasets.msd import msd
from samjax.data.datasets.promise12 import HSAM_TEST, promise12
from samjax.data.images import DataError
from samjax.data.intensity import Brats2023, Percentiles, Window
from samjax.data.layouts.volumes import (
    write_brats2020,
    write_brats_men,
    write_la2018,
    write_la2018_h5,
    write_msd,
    write_promise12,
)
from samjax.frame import resized_size

nib = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")
h5py = pytest.importorskip("h5py")

SHAPE = (20, 18, 6)
MEN = "ASNR-MICCAI-BraTS2023-MEN-Challenge-TrainingData"
GLIOMA = "MICCAI_BraTS2020_TrainingData"


def itk_voxels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file))).T


def touch_men(
    root: Path,
    patients: dict[str, int],
    unlabelled: int = 0,
    modalities: tuple[str, ...] = MEN_MODALITIES,
) -> None:
    """Empty files of patients with so many timepoints; then cases without a segmentation."""
    cases = [f"{patient}-{t:03d}" for patient, times in patients.items() for t in range(times)]
    without = [f"{90000 + number}-000" for number in range(unlabelled)]
    for case in (*cases, *without):
        folder = root / MEN / f"BraTS-MEN-{case}"
        folder.mkdir(parents=True)
        for name in (*modalities, *(["seg"] if case in cases else [])):
            (folder / f"{folder.name}-{name}.nii.gz").touch()


def test_brats_men_has_680_and_200_of_880_annotated_cases(tmp_path):
    patients = {f"{number:05d}": 1 for number in range(4, 884)}
    touch_men(tmp_path, patients, unlabelled=12, modalities=())
    train, validation = brats_men(tmp_path), brats_men(tmp_path, "validation")
    assert (len(train), len(validation)) == (680, 200)
    both = brats_men(tmp_path / MEN, "all")
    assert set(train.names) | set(validation.names) == set(both.names)
    assert len(both) == 880
    order = np.random.default_rng(0).permutation(880)[:200]
    assert validation.names == tuple(both.names[index] for index in sorted(order))


def test_brats_men_keeps_timepoints_of_a_patient_together(tmp_path):
    touch_men(tmp_path, {f"{number:05d}": 1 + number % 3 for number in range(44)})
    train, validation = brats_men(tmp_path), brats_men(tmp_path, "validation")
    assert not set(train.patients) & set(validation.patients)
    assert len(train) + len(validation) == 87
    assert 20 <= len(validation) <= 22  # 200 / 880 of 87, and the rest of the last patient
    assert brats_men(tmp_path, "validation", seed=1).names != validation.names
    train.check()
    (tmp_path / MEN / train.names[3] / f"{train.names[3]}-t2f.nii.gz").unlink()
    with pytest.raises(DataError, match=rf"1 files .* missing:\n.*{train.names[3]}-t2f\.nii\.gz"):
        train.check()


def test_brats_men_pictures_are_samsegs(tmp_path):
    """The crop of 138 × 202 pixels, the order of modalities, the label, the size in SAM's frame."""
    rescale_intensity = pytest.importorskip("skimage.exposure").rescale_intensity
    write_brats_men(tmp_path, shape=(240, 240, 2), cases=("00004-000",))
    crop = ((51, 189), (19, 221))
    slices = Slices(brats_men(tmp_path, "all"), crop=crop, rows="first")
    folder = tmp_path / MEN / "BraTS-MEN-00004-000"
    label = voxels(folder / "BraTS-MEN-00004-000-seg.nii.gz")[51:189, 19:221]
    assert set(np.unique(label)) == {0, 1, 2, 3}
    assert len(slices) == 8
    for number, place in enumerate(slices.places):
        name = ("t1c", "t1n", "t2f", "t2w")[place.modality[0]]
        assert slices.names[number] == f"BraTS-MEN-00004-000_slice{number // 4:03d}_{name}"
        signal = voxels(folder / f"{folder.name}-{name}.nii.gz").astype(np.float64)
        z = (signal - signal[signal > 0].mean()) / signal[signal > 0].std()
        scaled = np.round(rescale_intensity(z, out_range=(0, 255)), 2)
        limits = tuple(np.percentile(scaled, (1, 99)))
        grey = rescale_intensity(scaled, in_range=limits, out_range=(0, 1))
        assert np.abs(Brats2023()(signal.astype(np.int16)) - grey).max() <= 1e-6
        example = slices[number]
        assert example["image"].shape == (138, 202, 3)
        shown = example["image"] / 255 - grey[51:189, 19:221, place.slice, None]
        assert np.abs(shown).max() <= 1 / 510 + 1e-6
        np.testing.assert_array_equal(example["mask"], label[:, :, place.slice] > 0)
    assert resized_size((138, 202), (1024, 1024)) == (700, 1024)


def test_brats_men_labels_and_combined_modalities(tmp_path):
    write_brats_men(tmp_path, shape=SHAPE)
    scans = brats_men(tmp_path, "all", target="labels")
    assert scans.class_names == ("NETC", "SNFH", "ET")
    assert scans.patients[2] == scans.patients[3] == "BraTS-MEN-00009"
    folder = tmp_path / MEN / "BraTS-MEN-00009-001"
    scan = scans[3]
    for volume, name in zip(scan.volumes, MEN_MODALITIES, strict=True):
        np.testing.assert_array_equal(volume.array, voxels(folder / f"{folder.name}-{name}.nii.gz"))
    np.testing.assert_array_equal(scan.label, voxels(folder / f"{folder.name}-seg.nii.gz"))
    one = Slices(scans, modality="t2f")
    three = Slices(scans, modality="t2f,t1c,t1n")
    assert len(one) == len(three) == 5 * SHAPE[2]
    np.testing.assert_array_equal(three[8]["image"][..., 0], one[8]["image"][..., 0])
    (folder / f"{folder.name}-t2f.nii.gz").unlink()
    with pytest.raises(DataError, match=r"BraTS-MEN-00009-001-t2f\.nii\.gz: no such file"):
        one[3 * SHAPE[2]]
    other = nib.Nifti1Image(scan.volumes[2].array[:, :, 1:], np.eye(4))
    nib.save(other, folder / f"{folder.name}-t2f.nii.gz")
    with pytest.raises(DataError, match=r"t2f\.nii\.gz: \(20, 18, 5\) voxels, but .*-t1c\.nii"):
        scans[3]


def test_brats2020(tmp_path):
    write_brats2020(tmp_path, shape=SHAPE, cases=(1, 355))
    folder = tmp_path / GLIOMA / "BraTS20_Training_355"
    label = folder / "BraTS20_Training_355_seg.nii.gz"
    stored = voxels(label)
    nib.save(nib.load(label), folder / "W39_1998.09.19_Segm.nii")  # as in the copies around
    label.unlink()
    scans = brats2020(tmp_path)
    scans.check()
    assert scans.names == ("BraTS20_Training_001", "BraTS20_Training_355")
    assert scans.modalities == MODALITIES_2020
    assert scans.cases[1].labels[0].name == "W39_1998.09.19_Segm.nii"
    assert set(np.unique(stored)) == {0, 1, 2, 4}
    np.testing.assert_array_equal(scans[1].label, np.where(stored == 4, 3, stored))
    np.testing.assert_array_equal(brats2020(tmp_path, target="whole")[1].label, stored > 0)
    flair = voxels(tmp_path / GLIOMA / "BraTS20_Training_001/BraTS20_Training_001_flair.nii.gz")
    np.testing.assert_array_equal(scans[0].volumes[0].array, flair)
    validation = brats2020(tmp_path, "validation")
    assert validation.names == ("BraTS20_Validation_001",)
    assert not validation[0].label.any()
    (tmp_path / GLIOMA / "BraTS20_Training_001/BraTS20_Training_001_seg.nii.gz").unlink()
    with pytest.raises(DataError, match=r"missing:\n.*BraTS20_Training_001_seg\.nii\.gz"):
        scans.check()


def test_promise12_splits(tmp_path):
    for number in range(50):
        case = tmp_path / "training_data" / f"Case{number:02d}"
        touch(case.with_suffix(".mhd"), case.with_name(f"{case.name}_segmentation.mhd"))
        touch(tmp_path / "test_data" / f"Case{number % 30:02d}.mhd")
        touch(tmp_path / "livechallenge_data" / f"Case{number % 20:02d}.mhd")
    train, test = promise12(tmp_path), promise12(tmp_path, "test")
    assert train.names == tuple(f"Case{number:02d}" for number in range(50))
    assert len(test) == 30
    assert {case.images[0].parent.name for case in test.cases} == {"test_data"}
    few, held_out = promise12(tmp_path, "hsam3"), promise12(tmp_path, "hsam3_test")
    assert few.names == ("Case29", "Case14", "Case05")
    assert held_out.names == HSAM_TEST
    assert (len(set(HSAM_TEST)), set(HSAM_TEST) & set(few.names)) == (10, set())
    train.check()
    (tmp_path / "training_data" / "Case14_segmentation.mhd").unlink()
    with pytest.raises(DataError, match=r"missing:\n.*Case14_segmentation\.mhd"):
        few.check()
    (tmp_path / "training_data" / "Case14.mhd").unlink()
    with pytest.raises(DataError, match=r"no Case14\.mhd .*expected\n"):
        promise12(tmp_path, "hsam3")


def test_promise12_has_simpleitks_voxels(tmp_path):
    write_promise12(tmp_path, shape=SHAPE)
    scans = promise12(tmp_path)
    file = tmp_path / "training_data" / "Case02.mhd"
    scan = scans[2]
    np.testing.assert_array_equal(scan.volumes[0].array, itk_voxels(file))
    np.testing.assert_array_equal(scan.label, itk_voxels(file.with_name("Case02_segmentation.mhd")))
    assert scan.volumes[0].array.shape == SHAPE
    assert scan.volumes[0].spacing == pytest.approx((0.625, 0.625, 3.6))
    assert not promise12(tmp_path, "test")[0].label.any()
    cut(file.with_suffix(".raw"))
    with pytest.raises(DataError, match=r"Case02\.mhd: not a readable volume"):
        scans[2]
    file.with_suffix(".raw").unlink()
    with pytest.raises(DataError, match=r"Case02\.mhd: not a readable volume"):
        scans[2]


@pytest.mark.parametrize("files", ["nrrd", "h5"])
def test_la2018_splits(tmp_path, files):
    ids = [*HSAM_TRAIN, *(f"3CASE{number:015d}" for number in range(76)), *UAMT_TEST]
    for name in ids:
        touch(
            tmp_path / "Training Set" / name / {"nrrd": "lgemri.nrrd", "h5": "mri_norm2.h5"}[files]
        )
    touch(tmp_path / "Testing Set" / "4OTHER" / "lgemri.nrrd")
    train, test = (la2018(tmp_path, split, files=files) for split in ("train", "test"))
    assert (len(train), len(test), len(la2018(tmp_path, "all", files=files))) == (80, 20, 100)
    assert set(test.names) == set(UAMT_TEST)
    assert la2018(tmp_path, "hsam4", files=files).names == train.names[:4] == HSAM_TRAIN
    (tmp_path / "train.list").write_text(f"{ids[9]}\n{ids[2]}\n")
    for root in (tmp_path, tmp_path / "Training Set"):
        assert la2018(root, files=files).names == (ids[9], ids[2])
    (tmp_path / "train.list").write_text("ELSEWHERE\n")
    with pytest.raises(DataError, match=r"train\.list: .* has 1 scans, of which 1 are missing, su"):
        la2018(tmp_path, files=files)


def test_la2018_has_simpleitks_voxels(tmp_path):
    write_la2018(tmp_path, shape=SHAPE)
    scans = la2018(tmp_path, "hsam4")
    for scan, name in zip((scans[0], scans[3]), (HSAM_TRAIN[0], HSAM_TRAIN[3]), strict=True):
        folder = tmp_path / "Training Set" / name
        np.testing.assert_array_equal(scan.volumes[0].array, itk_voxels(folder / "lgemri.nrrd"))
        stored = itk_voxels(folder / "laendo.nrrd")
        assert set(np.unique(stored)) == {0, 255}
        np.testing.assert_array_equal(scan.label, stored == 255)
    (folder / "laendo.nrrd").unlink()
    with pytest.raises(DataError, match=rf"missing:\n.*{name}.laendo\.nrrd"):
        scans.check()
    cut(folder / "lgemri.nrrd")
    with pytest.raises(DataError, match=rf"{name}.lgemri\.nrrd: not a readable volume"):
        scans[3]


def test_la2018_h5_is_hsams_slices(tmp_path):
    write_la2018_h5(tmp_path, shape=SHAPE)
    slices = Slices(la2018(tmp_path, "hsam4", files="h5"), take="foreground", rows="first")
    file = tmp_path / "2018LA_Seg_Training Set" / HSAM_TRAIN[0] / "mri_norm2.h5"
    with h5py.File(file) as opened:
        image, label = opened["image"][()], opened["label"][()]
    assert image.shape == label.shape == SHAPE
    filled = np.flatnonzero(label.any(axis=(0, 1)))
    assert 0 < len(filled) < SHAPE[2]
    assert [place.slice for place in slices.places if place.case == 0] == filled.tolist()
    low, high = np.percentile(image[image > image.min()], (0.5, 99.5))
    for number, s in enumerate(filled):
        example = slices[number]
        grey = (np.clip(image[:, :, s], low, high) - low) / (high - low)
        assert np.abs(example["image"][..., 0] / 255 - grey).max() <= 1 / 510 + 1e-5
        np.testing.assert_array_equal(example["mask"], label[:, :, s])
    with h5py.File(file, "a") as opened:
        opened["picture"] = opened["image"][()]
        del opened["image"]
    with pytest.raises(DataError, match=r"mri_norm2\.h5: no key 'image'; there are label, picture"):
        Slices(la2018(tmp_path, "hsam4", files="h5"))


def test_msd_reads_dataset_json_and_its_test_scans(tmp_path):
    write_msd(tmp_path, shape=SHAPE)
    touch(tmp_path / "imagesTr" / "._hippocampus_001.nii.gz")
    scans = msd(tmp_path)
    assert scans.names == ("hippocampus_001", "hippocampus_003", "hippocampus_004")
    assert (scans.class_names, scans.modalities) == (("Anterior", "Posterior"), ("MRI",))
    assert scans.intensity == Percentiles()
    for folder, array in (("imagesTr", scans[1].volumes[0].array), ("labelsTr", scans[1].label)):
        np.testing.assert_array_equal(array, voxels(tmp_path / folder / "hippocampus_003.nii.gz"))
    test = msd(tmp_path, "test", class_names=("one", "two"))
    assert (test.names, test.class_names) == (("hippocampus_002",), ("one", "two"))
    assert not test[0].label.any()
    (tmp_path / "labelsTr" / "hippocampus_003.nii.gz").unlink()
    with pytest.raises(DataError, match=r"missing:\n.*labelsTr.hippocampus_003\.nii\.gz"):
        scans.check()


def test_msd_modalities_are_the_volumes_of_a_file(tmp_path):
    names = ("FLAIR", "T1w", "t1gd", "T2w")
    labels = {1: "edema", 2: "non-enhancing tumor", 3: "enhancing tumour"}
    write_msd(tmp_path, shape=SHAPE, name="BRATS", modalities=names, labels=labels)
    scans = msd(tmp_path)
    assert (scans.modalities, scans.class_names) == (names, tuple(labels.values()))
    stored = voxels(tmp_path / "imagesTr" / "BRATS_004.nii.gz")
    assert stored.shape == (*SHAPE, 4)
    for number, volume in enumerate(scans[2].volumes):
        np.testing.assert_array_equal(volume.array, stored[..., number])
    slices = Slices(scans, modality="each")
    assert len(slices) == 3 * SHAPE[2] * 4
    assert slices.names[-1] == "BRATS_004_slice005_T2w"
    copy = pickle.loads(pickle.dumps(slices))
    np.testing.assert_array_equal(copy[5]["image"], slices[5]["image"])
    shown = slices[len(slices) - 1]["image"][..., 0] / 255
    grey = Percentiles()(stored[..., 3])[:, :, 5].T
    assert np.abs(shown - grey).max() <= 1 / 510 + 1e-6
    with pytest.raises(DataError, match=r"BRATS_001\.nii\.gz: 4 volumes in the shape"):
        msd(tmp_path, modalities=("image",))[0]


def test_msd_by_arguments_and_broken_json(tmp_path):
    write_msd(tmp_path, shape=SHAPE, modalities=("CT",))
    assert msd(tmp_path).intensity == Window(-125, 275)
    file = tmp_path / "dataset.json"
    for content, message in (
        ("{", r"dataset\.json: not readable"),
        ("[]", r"dataset\.json: a list; expected an object"),
        (
            json.dumps({"labels": {"0": "background", "2": "a"}}),
            'labels is .* expected names by "0"',
        ),
        (json.dumps({"labels": {"0": "background", "1": "a"}}), "modality is None; expected names"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            msd(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"no dataset\.json; expected it, or class_names"):
        msd(tmp_path)
    scans = msd(tmp_path, class_names=("one",))
    assert scans.modalities == ("image",)
    with pytest.raises(
        DataError, match=r"labelsTr.*_001\.nii\.gz: values 2 are no class; .*\(one\)"
    ):
        scans[0]


def test_brats_men_without_annotated_cases(tmp_path):
    touch_men(tmp_path, {}, unlabelled=2)
    with pytest.raises(DataError, match=r"no annotated case .*expected\n"):
        brats_men(tmp_path)


def test_real_hippocampi(shared_data):
    """All 61 scans: the slices with a hippocampus; of every sixth scan the pictures too."""
    root = shared_data / "msd_hippocampus"
    scans = msd(root, class_names=("anterior", "posterior"))
    scans.check()
    assert len(scans) == 61
    slices = Slices(scans, take="foreground", keep=1, progress=False)
    position = 0
    for index, case in enumerate(scans.cases):
        label = voxels(case.labels[0])
        filled = np.flatnonzero(label.any(axis=(0, 1)))
        end = position + len(filled)
        assert [place.slice for place in slices.places[position:end]] == filled.tolist()
        if index % 6 == 0:
            image = voxels(case.images[0]).astype(np.float64)
            low, high = np.percentile(image[image != image.min()], (0.5, 99.5))
            grey = (np.clip(image, low, high) - low) / (high - low)
            for number, k in enumerate(filled, start=position):
                example = slices[number]
                np.testing.assert_array_equal(example["mask"], label[:, :, k].T)
                shown = example["image"][..., 0] / 255 - grey[:, :, k].T
                assert np.abs(shown).max() <= 1 / 510 + 1e-5
        position = end
    assert position == len(slices) > 61 * 10
