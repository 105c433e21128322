"""DICOM series with a SEG: frames by position, segments by number or name, what is refused."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from samjax.data import DataError, Slices
from samjax.data.datasets.dicom_seg import dicom_seg
from samjax.data.intensity import Percentiles, Window
from samjax.data.layouts.own import make_seg, write_dicom_seg

highdicom = pytest.importorskip("highdicom")
pydicom = pytest.importorskip("pydicom")
sitk = pytest.importorskip("SimpleITK")


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("dicom")
    return root, write_dicom_seg(root)


@pytest.fixture
def phantoms(written, tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """Two cases, of which each test gets its own copy."""
    source, drawn = written
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    return tmp_path, drawn


def headers_of(case: Path) -> list:
    """By slice, from the lowest."""
    headers = [pydicom.dcmread(file) for file in (case / "ct").iterdir()]
    return sorted(headers, key=lambda header: header.ImagePositionPatient[2])


def shuffle_frames(file: Path, rng: np.random.Generator) -> list[int]:
    """Puts a SEG's frames into another order; frames of 48 bytes, a bit a pixel."""
    seg = pydicom.dcmread(file)
    groups = list(seg.PerFrameFunctionalGroupsSequence)
    order = rng.permutation(len(groups)).tolist()
    seg.PerFrameFunctionalGroupsSequence = [groups[i] for i in order]
    pixels = [seg.PixelData[48 * i : 48 * i + 48] for i in order]
    seg.PixelData = b"".join(pixels)
    seg.save_as(file)
    return order


def test_voxels_are_those_of_itk_and_labels_those_drawn(phantoms):
    root, drawn = phantoms
    dataset = dicom_seg(root)
    assert (dataset.names, dataset.patients) == (("case0", "case1"), ("P0", "P1"))
    assert dataset.class_names == ("organ", "lesion")
    assert dataset.intensity == Window(-125, 275)
    assert dataset.shape_of(1) == (24, 16, 5)
    for index, name in enumerate(dataset.names):
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(root / name / "ct")))
        image = reader.Execute()
        scan = dataset[index]
        assert np.array_equal(scan.volumes[0].array, sitk.GetArrayFromImage(image).T)
        corner = scan.volumes[0].affine @ (23, 15, 4, 1)
        assert np.allclose(
            corner[:3] * (-1, -1, 1), image.TransformIndexToPhysicalPoint((23, 15, 4))
        )
        assert np.array_equal(scan.label, drawn[name])
        assert set(np.unique(scan.label)) == {0, 1, 2}
    again = pickle.loads(pickle.dumps(dataset))[0]
    assert np.array_equal(again.label, drawn["case0"])
    assert np.array_equal(again.volumes[0].array, dataset[0].volumes[0].array)
    slices = Slices(dataset, take="foreground")
    assert [place.slice for place in slices.places] == [1, 2, 3] * 2
    assert np.array_equal(slices[1]["mask"], drawn["case0"][..., 2].T)


def test_frames_count_by_position(phantoms, rng):
    root, drawn = phantoms
    file = root / "case0" / "seg.dcm"
    seg = pydicom.dcmread(file)
    assert seg.NumberOfFrames == 4  # of 10: organ in three slices, lesion in one
    assert shuffle_frames(file, rng) != [0, 1, 2, 3]
    assert np.array_equal(dicom_seg(root)[0].label, drawn["case0"])
    theirs = highdicom.seg.segread(file).get_volume(combine_segments=True)
    ours = dicom_seg(root)[0].label
    assert np.array_equal(theirs.array.transpose(2, 1, 0), ours[..., 1:4])


def test_label_maps_empty_frames_and_files_in_any_folder(phantoms):
    root, drawn = phantoms
    case = root / "case1"
    frames = drawn["case1"].transpose(2, 1, 0)
    backwards = headers_of(case)[::-1]
    seg = make_seg(backwards, frames[::-1], segmentation_type="LABELMAP", omit_empty_frames=False)
    assert (seg.SegmentationType, int(seg.NumberOfFrames)) == ("LABELMAP", 5)
    (case / "seg.dcm").unlink()
    seg.save_as(case / "ct" / "a.dcm")  # among the slices
    (case / "deep" / "er").mkdir(parents=True)
    (case / "ct").rename(case / "deep" / "er" / "files")
    (case / "notes.txt").write_text("nothing")
    scan = dicom_seg(root)[1]
    assert np.array_equal(scan.label, drawn["case1"])
    assert scan.volumes[0].array.shape == (24, 16, 5)


def test_tilted_slices_that_run_downwards(phantoms):
    root, drawn = phantoms
    shutil.rmtree(root / "case1")
    case = root / "case0"
    for k, header in enumerate(headers_of(case)):
        header.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]  # sagittal
        header.ImagePositionPatient = [40 - 3.0 * k, -5, 7]
        header.Modality = "MR"
        header.save_as(case / "ct" / f"{k}_.dcm")
    for file in case.glob("ct/[0-9][0-9][0-9].dcm"):
        file.unlink()
    headers = [pydicom.dcmread(file) for file in sorted((case / "ct").iterdir())]
    make_seg(headers, drawn["case0"].transpose(2, 1, 0)).save_as(case / "seg.dcm")
    dataset = dicom_seg(root)
    scan = dataset[0]
    voxels = np.stack([header.pixel_array.T for header in headers], axis=-1)
    forward = np.array_equal(scan.volumes[0].array, voxels)
    assert forward or np.array_equal(scan.volumes[0].array, voxels[..., ::-1])
    assert np.array_equal(scan.label, drawn["case0"][..., :: 1 if forward else -1])
    assert dataset.intensity == Percentiles()


def test_a_single_slice(phantoms):
    root, drawn = phantoms
    shutil.rmtree(root / "case1")
    headers = headers_of(root / "case0")
    for file in (root / "case0" / "ct").iterdir():
        if pydicom.dcmread(file).InstanceNumber != 3:
            file.unlink()
    seg = make_seg([headers[2]], drawn["case0"].transpose(2, 1, 0)[2:3])
    seg.save_as(root / "case0" / "seg.dcm")
    assert np.array_equal(dicom_seg(root)[0].label, drawn["case0"][..., 2:3])


def test_classes_by_name(phantoms):
    root, drawn = phantoms
    seg = pydicom.dcmread(root / "case1" / "seg.dcm")
    for segment, name in zip(seg.SegmentSequence, ("lesion", "organ"), strict=True):
        segment.SegmentLabel = name
    seg.save_as(root / "case1" / "seg.dcm")
    with pytest.raises(DataError, match=r"case1/seg.dcm: segments .*'lesion'.* but .*case0/seg"):
        dicom_seg(root)
    dataset = dicom_seg(root, classes=("lesion", "organ", "vessel"))
    assert dataset.class_names == ("lesion", "organ", "vessel")
    assert np.array_equal(dataset[0].label, np.array([0, 2, 1])[drawn["case0"]])
    assert np.array_equal(dataset[1].label, drawn["case1"])
    with pytest.raises(DataError, match=r"case0/seg.dcm: segment 'lesion'; expected of organ"):
        dicom_seg(root, classes=("organ",))


def test_folders_of_splits(phantoms):
    root, _ = phantoms
    for name, split in (("case0", "train"), ("case1", "test")):
        (root / split).mkdir()
        (root / name).rename(root / split / name)
    assert dicom_seg(root).names == ("case0",)
    assert dicom_seg(root, "test").names == ("case1",)


def test_a_case_has_one_seg_of_a_series_that_is_there(phantoms):
    root, _ = phantoms
    case = root / "case0"
    shutil.copy(case / "seg.dcm", case / "again.dcm")
    with pytest.raises(DataError, match=r"case0: 2 DICOM SEGs \(again.dcm, seg.dcm\); expected on"):
        dicom_seg(root)
    (case / "again.dcm").unlink()
    shutil.copy(root / "case1" / "seg.dcm", case / "seg.dcm")
    with pytest.raises(DataError, match=r"seg.dcm: is of the series .*511.2.1, which is not in"):
        dicom_seg(root)
    (case / "seg.dcm").unlink()
    with pytest.raises(DataError, match="case0: 0 DICOM SEGs; expected one a case"):
        dicom_seg(root)


def test_another_frame_of_reference(phantoms):
    root, _ = phantoms
    seg = pydicom.dcmread(root / "case0" / "seg.dcm")
    seg.FrameOfReferenceUID = "1.2.3"
    seg.save_as(root / "case0" / "seg.dcm")
    with pytest.raises(DataError, match=r"lies in the frame of reference 1.2.3, but .*ct.* in 1.2"):
        dicom_seg(root)


def test_images_of_several_frames_or_without_a_place_are_named(phantoms):
    root, drawn = phantoms
    case, other = root / "case0", root / "case1" / "ct" / "095.dcm"
    headers = headers_of(case)
    ids = ("1.2.3", 1, "1.2.3.4", 1)
    enhanced = highdicom.legacy.LegacyConvertedEnhancedCTImage(headers, *ids)
    make_seg([enhanced], drawn["case0"].transpose(2, 1, 0)).save_as(case / "seg.dcm")
    shutil.rmtree(case / "ct")
    enhanced.save_as(case / "enhanced.dcm")
    with pytest.raises(DataError, match=r"enhanced.dcm: a DICOM image of 5 frames; expected a fi"):
        dicom_seg(root)
    shutil.rmtree(case)
    image = pydicom.dcmread(other)
    del image.ImagePositionPatient
    image.save_as(other)
    with pytest.raises(DataError, match=r"ct/095.dcm: no ImagePositionPatient; expected one slice"):
        dicom_seg(root)


def test_frames_must_lie_on_the_slices(phantoms):
    root, drawn = phantoms
    case = root / "case0"
    headers = headers_of(case)
    frames = drawn["case0"].transpose(2, 1, 0)
    for header in headers:
        header.ImagePositionPatient[2] += 1.0
    make_seg(headers, frames).save_as(case / "seg.dcm")
    with pytest.raises(DataError, match=r"seg.dcm: a frame at .* 1.00 mm off the nearest slice"):
        dicom_seg(root)[0]
    for header in headers:
        header.ImagePositionPatient[2] -= 1.0
        header.PixelSpacing = [0.75, 0.6]
    make_seg(headers, frames).save_as(case / "seg.dcm")
    with pytest.raises(DataError, match=r"seg.dcm: frames of \(16, 24\) pixels, \[0.75, 0.6\] mm"):
        dicom_seg(root)[0]


def test_segments_that_overlap_or_are_fractions(phantoms):
    root, drawn = phantoms
    case = root / "case0"
    organ = drawn["case0"].transpose(2, 1, 0) > 0
    both = np.stack([organ, organ], axis=-1).astype(np.uint8)
    make_seg(headers_of(case), both).save_as(case / "seg.dcm")
    with pytest.raises(DataError, match=r"seg.dcm: its segments overlap; expected one a voxel"):
        dicom_seg(root)[0]
    seg = make_seg(
        headers_of(case),
        organ.astype(float)[..., None].repeat(2, -1) / 2,
        segmentation_type="FRACTIONAL",
    )
    seg.save_as(case / "seg.dcm")
    with pytest.raises(DataError, match=r"seg.dcm: a SEG of fractions; expected BINARY"):
        dicom_seg(root)[0]


def test_broken_files_and_another_tree(phantoms, tmp_path):
    root, _ = phantoms
    file = root / "case0" / "seg.dcm"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"seg.dcm: not a readable DICOM SEG"):
        dicom_seg(root)[0]
    (root / "case0" / "ct" / "097.dcm").unlink()
    with pytest.raises(DataError, match=r"case0/ct: slices 2.5 and 5 mm apart"):
        dicom_seg(root)[0]
    with pytest.raises(DataError, match=r"no cases of 'test' (.|\n)*and one DICOM SEG of it"):
        dicom_seg(root, "test")
