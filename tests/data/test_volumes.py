"""Volumes: what each format gives, frames and the way back, labels in the volume's place."""

import dataclasses
import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from samjax.data.images import DataError
from samjax.data.volumes import (
    Volume,
    frames_to_voxels,
    read_volume,
    through_plane_axis,
    to_frames,
    write_labels,
)

nib = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")

SHAPE = (5, 6, 7)
PLAIN = np.diag([1.0, 1.0, 1.0, 1.0])


def oblique(spacing=(0.7, 0.8, 2.5), angles=(0.3, -0.2, 0.4)) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles).as_matrix() * spacing
    affine[:3, 3] = -10.5, 20.25, -33.1
    return affine


def voxels(rng, dtype=np.int16, shape=SHAPE) -> np.ndarray:
    return rng.integers(0, 200, shape).astype(dtype)


def write_nifti(path: Path, array, affine=PLAIN, codes=(1, 1), header=None, kind=None) -> Path:
    image = (kind or nib.Nifti1Image)(array, affine, header)
    for code, setter in zip(codes, (image.set_qform, image.set_sform), strict=True):
        setter(affine if code else None, code, update_affine=False)
    nib.save(image, path)
    return path


def write_series(folder: Path, array, uid: str, *, affine=None, names=None, tags=None, places=None):
    """A DICOM series, a file per slice: `array` is (i, j, k), `affine` to RAS."""
    folder.mkdir(exist_ok=True)
    affine = oblique() if affine is None else affine
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = lps[:3, :3] / spacing
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(array.shape[2]):
        image = sitk.GetImageFromArray(array[:, :, k].T)
        image.SetSpacing([float(value) for value in spacing[:2]])
        place = lps[:3, :3] @ [0, 0, k] + lps[:3, 3] if places is None else places[k]
        values = {
            "0020|000e": uid,
            "0020|000d": "1.2.3",
            "0008|0018": f"{uid}.{k + 1}",
            "0008|0060": "CT",
            "0020|0032": "\\".join(f"{value:.9g}" for value in place),
            "0020|0037": "\\".join(f"{value:.9g}" for value in direction[:, :2].T.ravel()),
            "0018|0050": f"{spacing[2]:.9g}",
            **{key: str(v[k] if isinstance(v, list) else v) for key, v in (tags or {}).items()},
        }
        for key, value in values.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / (names[k] if names else f"{k:03d}.dcm")))
        writer.Execute(image)
    return folder


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "A.NII.GZ"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64, ">i2"])
def test_nifti_keeps_order_type_and_affine(tmp_path, rng, name, dtype):
    array = voxels(rng, dtype)
    path = write_nifti(tmp_path / name, array, oblique())
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, array)
    expected = np.dtype(dtype).newbyteorder("=")
    assert volume.array.dtype == (np.float32 if expected == np.float64 else expected)
    assert volume.affine.dtype == np.float64
    np.testing.assert_array_equal(volume.affine, nib.load(path).affine)
    np.testing.assert_allclose(volume.spacing, (0.7, 0.8, 2.5), rtol=1e-6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        volume.array = array


def test_nifti_scaling_is_applied(tmp_path, rng):
    array = voxels(rng)
    stored = bytearray(write_nifti(tmp_path / "a.nii", array).read_bytes())
    stored[112:120] = np.array([2.5, -1024], "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(stored)
    volume = read_volume(tmp_path / "a.nii")
    assert volume.array.dtype == np.float32
    np.testing.assert_array_equal(volume.array, array * 2.5 - 1024)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.mha"])
def test_4d_needs_a_choice_unless_there_is_none(tmp_path, rng, name):
    array = voxels(rng, np.int16, (*SHAPE, 4))
    path = tmp_path / name

    def write(array):
        if name.endswith("nii.gz"):
            return write_nifti(path, array)
        return sitk.WriteImage(sitk.GetImageFromArray(array.T, isVector=False), str(path))

    write(array)
    reason = r"4 volumes in the shape \(5, 6, 7, 4\); pick one with volume=0 to volume=3"
    with pytest.raises(DataError, match=reason) as error:
        read_volume(path)
    assert str(path) in str(error.value)
    np.testing.assert_array_equal(read_volume(path, volume=2).array, array[..., 2])
    for wrong in (4, -1):
        with pytest.raises(DataError, match=f"volume={wrong} of the shape .* expected volume=0 to"):
            read_volume(path, volume=wrong)
    write(array[..., :1])
    np.testing.assert_array_equal(read_volume(path).array, array[..., 0])
    write(array[..., 0])
    np.testing.assert_array_equal(read_volume(path, volume=0).array, array[..., 0])
    with pytest.raises(DataError, match="volume=1"):
        read_volume(path, volume=1)


@pytest.mark.parametrize("codes", [(1, 1), (1, 0), (0, 2)])
@pytest.mark.parametrize("unit", ["mm", "micron", "meter"])
def test_nifti_metaimage_and_nrrd_agree(tmp_path, rng, codes, unit):
    """ITK itself reads the NIfTI file, turns it into LPS and scales it to mm."""
    array = voxels(rng, np.float32)
    header = nib.Nifti1Header()
    header.set_xyzt_units(unit)
    scale = {"mm": 1, "micron": 1000, "meter": 0.001}[unit]
    affine = np.diag([scale, scale, scale, 1]) @ oblique()
    first = read_volume(write_nifti(tmp_path / "a.nii.gz", array, affine, codes, header))
    np.testing.assert_allclose(first.spacing, (0.7, 0.8, 2.5), rtol=1e-5)
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    for name in ("a.mha", "a.mhd", "a.nrrd"):
        sitk.WriteImage(image, str(tmp_path / name))
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.array, first.array)
        assert volume.array.dtype == first.array.dtype
        np.testing.assert_allclose(volume.affine, first.affine, atol=2e-5)


def test_a_dicom_series_is_sorted_by_position(tmp_path, rng):
    array = voxels(rng, np.int16, (5, 6, 4))
    tags = {"0020|0013": [3, 1, 4, 2]}  # InstanceNumber
    names = ["c.dcm", "a.dcm", "d.dcm", "b.dcm"]
    write_series(tmp_path / "b", array, "1.2.5", names=names, tags=tags)
    (tmp_path / "b" / "d.dcm").rename(tmp_path / "b" / "d")
    (tmp_path / "b" / "README.txt").write_text("no DICOM")
    (tmp_path / "b" / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    for path in (tmp_path / "b", tmp_path / "b" / "a.dcm", tmp_path / "b" / "d"):
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.array, array)
        assert volume.array.dtype.kind == "i"
        np.testing.assert_allclose(volume.affine, oblique(), atol=1e-6)
    files = [str(tmp_path / "b" / name.replace("d.dcm", "d")) for name in names]
    sitk.WriteImage(sitk.ReadImage(files), str(tmp_path / "a.nii.gz"))
    nifti = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(nifti.array, volume.array)
    np.testing.assert_allclose(nifti.affine, volume.affine, atol=1e-5)


RESCALE = {"0028|1052": "-1024", "0028|1053": "1"}  # intercept and slope


def patch(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def test_dicom_is_rescaled_slice_by_slice(tmp_path, rng):
    array = voxels(rng, np.int16, (5, 6, 3))
    folder = write_series(tmp_path / "b", array, "1.2.5", tags=RESCALE)
    np.testing.assert_array_equal(read_volume(folder).array, array)
    assert read_volume(folder).array.dtype.kind == "i"
    slope = b"\x28\x00\x53\x10\x02\x00\x00\x00"  # (0028,1053), of two characters
    patch(folder / "001.dcm", slope + b"1 ", slope + b".5")
    volume = read_volume(folder)
    expected = (array + 1024) * np.array([1, 0.5, 1]) - 1024
    np.testing.assert_array_equal(volume.array, expected)
    assert volume.array.dtype == np.float32


def test_a_tilted_gantry_shears_the_affine(tmp_path, rng):
    array = voxels(rng, np.int16, (5, 6, 4))
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    affine[1, 2] = 0.6
    places = [(np.diag([-1, -1, 1, 1]) @ affine @ [0, 0, k, 1])[:3] for k in range(4)]
    flat = np.diag([0.7, 0.8, 2.5, 1.0])
    folder = write_series(tmp_path / "b", array, "1.2.5", affine=flat, places=places)
    volume = read_volume(folder)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    write_labels(tmp_path / "l.nii", array, volume)
    written = nib.load(tmp_path / "l.nii")
    np.testing.assert_allclose(written.affine, affine, atol=1e-6)
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (1, 0)


def test_several_series_need_a_choice(tmp_path, rng):
    first, second = voxels(rng, np.int16, (5, 6, 4)), voxels(rng, np.int16, (6, 5, 3))
    write_series(tmp_path, first, "1.2.5")
    write_series(tmp_path, second, "1.2.7", names=["x.dcm", "y.dcm", "z.dcm"])
    listed = r"1\.2\.5 \(4 files\), 1\.2\.7 \(3 files\)"
    with pytest.raises(DataError, match=rf"2 series of DICOM images; pick one .*{listed}"):
        read_volume(tmp_path)
    np.testing.assert_array_equal(read_volume(tmp_path, series="1.2.7").array, second)
    np.testing.assert_array_equal(read_volume(tmp_path / "002.dcm").array, first)
    with pytest.raises(DataError, match=rf"0 series of DICOM images with the UID 9.9; .*{listed}"):
        read_volume(tmp_path, series="9.9")
    with pytest.raises(DataError, match=rf"002.dcm: 0 series .* with the UID 1.2.7; .*{listed}"):
        read_volume(tmp_path / "002.dcm", series="1.2.7")
    write_nifti(tmp_path / "a.nii", first)
    with pytest.raises(DataError, match=r"a.nii: series='1.2.7' picks from a folder of DICOM"):
        read_volume(tmp_path / "a.nii", series="1.2.7")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gap", r"slices 2.5 and 5 mm apart: expected one distance"),
        ("uneven", r"slices 2 and 3 mm apart: expected one distance"),
        ("twice", r"slices 0 and 2.5 mm apart"),
        ("same place", r"slices 0 mm apart"),
        ("no place", r"00\d.dcm is not one slice with an ImagePositionPatient"),
        ("turned", r"00\d.dcm: not the size, spacing or direction of 00\d.dcm"),
        ("truncated", r"003.dcm is broken or truncated: expected a DICOM image"),
        ("empty file", r"003.dcm is broken or truncated: expected a DICOM image"),
        ("empty folder", r"0 series of DICOM images; pick one with series= from: none"),
        ("text", r"0 series of DICOM images"),
    ],
)
def test_broken_series(tmp_path, rng, kind, reason):
    array = voxels(rng, np.int16, (5, 6, 4))
    turned = {"0020|0037": ["0\\1\\0\\0\\0\\1", *3 * ["1\\0\\0\\0\\1\\0"]]}
    tags = turned if kind == "turned" else {}
    depths = {"uneven": [0, 2, 5, 8], "twice": [0, 2.5, 5, 5], "same place": [0, 0, 0, 0]}
    folder, affine = tmp_path / "series", np.diag([1, 1, 2.5, 1])
    places = [(0, 0, z) for z in depths.get(kind, [0, 2.5, 5, 7.5])]
    write_series(folder, array, "1.2.5", affine=affine, tags=tags, places=places)
    if kind in ("empty folder", "text"):
        for file in folder.iterdir():
            file.unlink()
        (folder / ".hidden" if kind == "empty folder" else folder / "a.txt").write_text("no DICOM")
    elif kind == "gap":
        (folder / "001.dcm").unlink()
    elif kind == "no place":
        for file in folder.iterdir():  # (0020,0032) becomes (0020,0031)
            patch(file, b"\x20\x00\x32\x00", b"\x20\x00\x31\x00")
    elif kind == "truncated":
        (folder / "003.dcm").write_bytes((folder / "003.dcm").read_bytes()[:-20])
    elif kind == "empty file":
        (folder / "003.dcm").write_bytes(b"")
    with pytest.raises(DataError, match=reason) as error:
        read_volume(folder)
    assert str(folder) in str(error.value)


def test_broken_dicom_files_by_themselves(tmp_path, rng):
    write_series(tmp_path, voxels(rng, np.int16, (5, 6, 4)), "1.2.5")
    (tmp_path / "003.dcm").write_bytes((tmp_path / "003.dcm").read_bytes()[:-20])
    with pytest.raises(DataError, match=r"003.dcm: 0 series of DICOM images"):
        read_volume(tmp_path / "003.dcm")
    (tmp_path / "x.dcm").write_text("no DICOM")
    with pytest.raises(DataError, match=r"x.dcm: unknown format; expected \.nii, .*DICOM"):
        read_volume(tmp_path / "x.dcm")


def test_a_dicom_file_alone_is_a_slice_or_a_volume(tmp_path, rng):
    array = voxels(rng, np.int16, (5, 6, 1))
    volume = read_volume(write_series(tmp_path / "b", array, "1.2.5"))
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.spacing[:2], (0.7, 0.8), rtol=1e-6)
    assert to_frames(volume, axis=2).shape == (1, 6, 5, 3)
    image = sitk.GetImageFromArray(voxels(rng, np.uint16).T)
    image.SetSpacing((0.7, 0.8, 2.5))
    sitk.WriteImage(image, str(tmp_path / "frames.dcm"))
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image).T)
    np.testing.assert_allclose(volume.spacing, (0.7, 0.8, 2.5))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.nii", np.zeros((5, 6), np.uint8), r"an image of the shape \(5, 6\); expected a volume"),
        ("a.nii", np.zeros((5, 6, 7, 1, 3), np.uint8), r"the shape \(5, 6, 7, 1, 3\); expected"),
        ("a.nii", np.zeros(SHAPE, np.complex64), "voxels of the type complex64; expected integers"),
        ("a.nii", np.full(SHAPE, 1e200), "210 of 210 voxels are NaN or infinite"),  # as float32
        ("a.nii", "", "not a readable NIfTI file"),
        ("a.nii", "no NIfTI" * 100, "not a readable NIfTI file"),
        ("a.nii.gz", "no gzip", "not a readable NIfTI file"),
        ("a.mha", "no MetaImage", r"not a readable volume \("),
        ("a.mhd", "NDims = 3\nElementDataFile = b.raw", r"not a readable volume \("),
        ("a.mha", sitk.Image(5, 6, sitk.sitkUInt8), r"an image of the shape \(5, 6\)"),
        ("a.nrrd", sitk.Image([5, 6, 7], sitk.sitkVectorUInt8, 3), "3 values per voxel"),
        ("a.png", "", r"unknown format; expected \.nii, \.nii\.gz, \.mhd, .*DICOM"),
        ("a.gz", "", "unknown format"),
    ],
)
def test_files_that_are_no_volume(tmp_path, name, content, reason):
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, np.ndarray):
        write_nifti(path, content)
    else:
        sitk.WriteImage(content, str(path))
    with pytest.raises(DataError, match=reason) as error:
        read_volume(path)
    assert str(path) in str(error.value)


def test_missing_files_and_libraries(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"a.nii: no such file or folder"):
        read_volume(tmp_path / "a.nii")
    (tmp_path / "a.nii").touch()
    (tmp_path / "a.mha").touch()
    for library, name in (("nibabel", "a.nii"), ("SimpleITK", "a.mha"), ("SimpleITK", "")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ImportError, match=rf"{library}: pip install 'samjax\[volumes\]'"):
            read_volume(tmp_path / name)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_counted(tmp_path, rng, bad):
    array = voxels(rng, np.float32)
    array[1, 2, 3] = array[2, 2, 3] = bad
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "a.mha"))
    for path in (tmp_path / "a.mha", write_nifti(tmp_path / "a.nii.gz", array)):
        with pytest.raises(DataError, match=rf"{path}: 2 of 210 voxels are NaN or infinite"):
            read_volume(path)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_affines_that_cannot_be_inverted(tmp_path, rng, value):
    broken = oblique()
    broken[:3, 1] = value
    with pytest.raises(DataError, match="cannot be inverted"):
        Volume(voxels(rng), broken)
    path = write_nifti(tmp_path / "a.nii", voxels(rng), codes=(0, 1))
    image = bytearray(path.read_bytes())
    image[280:328] = broken[:3].astype("<f4").tobytes()
    path.write_bytes(image)
    with pytest.raises(DataError, match=r"a.nii: the affine \[\[.* cannot be inverted"):
        read_volume(path)
    for affine in (np.eye(3), np.ones((4, 4))):
        with pytest.raises(DataError, match="cannot be inverted"):
            Volume(voxels(rng), affine)


def test_truncated_gzip_is_an_error_or_whole(tmp_path, rng):
    path = write_nifti(tmp_path / "a.nii.gz", rng.integers(0, 9999, SHAPE).astype(np.int16))
    whole, expected = path.read_bytes(), read_volume(path).array
    errors = 0
    for length in (*range(0, len(whole), 23), *range(len(whole) - 12, len(whole))):
        path.write_bytes(whole[:length])
        try:
            np.testing.assert_array_equal(read_volume(path).array, expected)
        except DataError as error:
            assert "a.nii.gz: not a readable NIfTI file" in str(error)  # noqa: PT017
            errors += 1
    assert errors > len(whole) // 23


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(position=st.integers(0, 351), value=st.integers(0, 255))
def test_a_damaged_header_is_an_error_or_a_volume(tmp_path, position, value):
    path = write_nifti(tmp_path / "a.nii", np.arange(210, dtype=np.int16).reshape(SHAPE), oblique())
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data)
    try:
        volume = read_volume(path)
    except DataError as error:
        named = str(path) in str(error)
    else:
        named = volume.array.ndim == 3 and bool(np.isfinite(np.linalg.inv(volume.affine)).all())
    assert named


@pytest.mark.parametrize(
    ("affine", "axis"),
    [
        (np.diag([3.0, 1, 1, 1]), 0),
        (np.diag([1, -5.0, 1, 1]), 1),
        (np.diag([1.0, 1, 1.5, 1]), 2),
        (np.diag([1.4, 1, 1, 1]), 2),
        (np.diag([2.0, 2, 1, 1]), 2),  # two thick axes
        (PLAIN, 2),
        (PLAIN[[1, 2, 0, 3]], 0),  # i runs upward
        (PLAIN[[0, 2, 1, 3]] * [[1], [1], [-1], [1]], 1),  # j runs downward
        (oblique(), 2),
        (oblique((0.7, 0.8, 1)), 2),
        (oblique((0.7, 0.8, 1), (1.4, 0, 0)), 1),
        (oblique((1, 1, 1), (np.pi / 4, 0, 0)), 2),  # j and k equally close
    ],
)
def test_through_plane_axis(affine, axis, rng):
    assert through_plane_axis(Volume(voxels(rng), affine)) == axis


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_frames_and_the_way_back(rng, axis):
    volume = Volume(voxels(rng, np.uint8), PLAIN)
    frames = to_frames(volume, axis=axis, window=(127.5, 255))
    width, height = (length for number, length in enumerate(SHAPE) if number != axis)
    assert frames.shape == (SHAPE[axis], height, width, 3)
    assert frames.dtype == np.uint8
    assert (frames == frames[..., :1]).all()
    np.testing.assert_array_equal(frames_to_voxels(frames[..., 0], axis), volume.array)
    x, y, t = 3, 1, 4  # pixel (x, y) = (column, row) of frame t
    assert frames[t, y, x, 0] == volume.array[{0: (t, x, y), 1: (x, t, y), 2: (x, y, t)}[axis]]


def test_frames_run_along_the_through_plane_axis(rng):
    volume = Volume(voxels(rng), np.diag([4.0, 1, 1, 1]))
    np.testing.assert_array_equal(to_frames(volume), to_frames(volume, axis=0))
    flat = Volume(voxels(rng, np.int16, (1, 6, 7)), np.diag([4.0, 1, 1, 1]))
    assert to_frames(flat).shape == (1, 7, 6, 3)
    for call in (lambda: to_frames(volume, axis=3), lambda: frames_to_voxels(volume.array, 3)):
        with pytest.raises(ValueError, match="axis 3 is out of bounds"):
            call()
    with pytest.raises(ValueError, match=r"shape \(6, 7\): expected \(t, h, w\)"):
        frames_to_voxels(volume.array[0], 0)


def test_windows(rng):
    """CT: level 40, width 400 shows -160 to 240 Hounsfield units."""
    array = np.full(SHAPE, -1000, np.int16)
    array[0, 0, :5] = -160, 60, 240, 3000, -161
    grey = to_frames(Volume(array, PLAIN), axis=2, window=(40, 400))[:5, 0, 0, 0]
    np.testing.assert_array_equal(grey, [0, 140, 255, 255, 0])


def test_the_window_of_an_mr_image_leaves_the_background_out(rng):
    mr = np.zeros((20, 20, 20), np.float32)
    mr[5:, 5:, 5:] = rng.uniform(100, 200, (15, 15, 15))
    mr[10, 10, 10] = 1e6  # one hot voxel must not make the rest black
    low, high = np.percentile(mr[mr > 0], (0.5, 99.5))
    expected = np.rint(np.clip((mr - low) / (high - low), 0, 1) * 255)
    frames = to_frames(Volume(mr, PLAIN), axis=0)
    assert np.abs(frames[..., 0].swapaxes(1, 2) - expected).max() <= 1
    assert np.median(frames[6:, 6:, 6:]) > 100
    two = np.zeros(SHAPE, np.uint8)
    two[2] = 7
    np.testing.assert_array_equal(to_frames(Volume(two, PLAIN), axis=0)[1:4, 0, 0, 0], [0, 255, 0])


def test_windows_that_show_nothing(rng):
    with pytest.raises(ValueError, match=r"all voxels are 7: expected window=\(level, width\)"):
        to_frames(Volume(np.full(SHAPE, 7), PLAIN))
    assert to_frames(Volume(np.full(SHAPE, 7), PLAIN), window=(7, 2)).max() == 128
    for window in ((40, 0), (40, -1), (np.nan, 1), (0, np.inf)):
        with pytest.raises(ValueError, match=r"expected \(level, width\) with a width above 0"):
            to_frames(Volume(voxels(rng), PLAIN), window=window)


@pytest.mark.parametrize("name", ["l.nii", "l.nii.gz"])
@pytest.mark.parametrize("codes", [(0, 0), (0, 2), (1, 0), (1, 1), (4, 3)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_labels_lie_exactly_where_the_volume_lies(tmp_path, rng, name, codes, kind):
    affine = oblique((0.7123456789, 0.8, 2.5))
    header = kind.header_class()
    header["descrip"] = b"a name that is nobody's business"
    header["cal_max"] = 1000
    path = write_nifti(tmp_path / "a.nii.gz", voxels(rng, np.float32), affine, codes, header, kind)
    labels = voxels(rng, np.int64)
    write_labels(tmp_path / name, labels, read_volume(path))
    written, source = nib.load(tmp_path / name), nib.load(path)
    assert written.affine.tobytes() == source.affine.tobytes()
    assert type(written) is kind
    for field in ("qform_code", "sform_code", "srow_x", "srow_z", "quatern_b", "qoffset_x"):
        assert written.header[field].tobytes() == source.header[field].tobytes()
    np.testing.assert_array_equal(written.header["pixdim"][:4], source.header["pixdim"][:4])
    assert written.header.get_xyzt_units()[0] == "mm"
    assert written.header["descrip"].item() == b""
    assert written.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    assert (tmp_path / name).read_bytes().startswith(b"\x1f\x8b") == name.endswith("gz")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["a.nii.gz", name])
    assert read_volume(tmp_path / name).affine.tobytes() == source.affine.tobytes()


def test_labels_in_other_units_and_of_4d_files(tmp_path, rng):
    header = nib.Nifti1Header()
    header.set_xyzt_units("micron", "sec")
    array = voxels(rng, np.int16, (*SHAPE, 3))
    path = write_nifti(tmp_path / "a.nii", array, oblique((700, 800, 2500)), header=header)
    volume = read_volume(path, volume=1)
    write_labels(tmp_path / "l.nii", array[..., 1], volume)
    written = nib.load(tmp_path / "l.nii")
    assert written.shape == SHAPE
    assert written.header.get_xyzt_units() == ("micron", "unknown")
    assert written.affine.tobytes() == nib.load(path).affine.tobytes()
    assert read_volume(tmp_path / "l.nii").affine.tobytes() == volume.affine.tobytes()
    moved = dataclasses.replace(volume, affine=oblique())  # the header is out of date now
    write_labels(tmp_path / "l.nii", array[..., 1], moved)
    np.testing.assert_allclose(nib.load(tmp_path / "l.nii").affine, oblique(), atol=1e-5)


def test_labels_of_other_formats_get_both_forms(tmp_path, rng):
    folder = write_series(tmp_path / "b", voxels(rng, np.int16, (5, 6, 4)), "1.2.5")
    volume = read_volume(folder)
    labels = voxels(rng, np.uint8, (5, 6, 4))
    write_labels(tmp_path / "new" / "l.nii.gz", labels, volume)
    written = nib.load(tmp_path / "new" / "l.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    assert written.affine.tobytes() == volume.affine.astype(np.float32).astype(float).tobytes()
    for affine, code in (written.get_sform(coded=True), written.get_qform(coded=True)):
        assert code == 1
        np.testing.assert_allclose(affine, volume.affine, atol=1e-5)
    image = sitk.ReadImage(str(tmp_path / "new" / "l.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image).T, labels)


@pytest.mark.parametrize(
    ("highest", "dtype"),
    [(0, np.uint8), (255, np.uint8), (256, np.uint16), (65536, np.uint32), (2**32, np.uint64)],
)
def test_labels_get_the_smallest_type(tmp_path, highest, dtype):
    labels = np.zeros(SHAPE, np.int64)
    labels[1, 2, 3] = highest
    write_labels(tmp_path / "l.nii.gz", labels, Volume(labels, PLAIN))
    written = nib.load(tmp_path / "l.nii.gz")
    assert written.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)


def test_equal_labels_make_equal_files(tmp_path, rng):
    labels = voxels(rng) > 100
    volume = Volume(labels.astype(np.uint8), oblique())
    write_labels(tmp_path / "a.nii.gz", labels, volume)
    write_labels(tmp_path / "b.nii.gz", labels.astype(np.int32), volume)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    write_labels(tmp_path / "c.nii", labels, volume)
    packed = (tmp_path / "a.nii.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "c.nii").read_bytes()


@pytest.mark.parametrize(
    ("name", "labels", "reason"),
    [
        ("l.mha", np.zeros(SHAPE, int), r"l.mha: expected a name that ends in \.nii or \.nii\.gz"),
        ("l.gz", np.zeros(SHAPE, int), r"l.gz: expected a name"),
        ("l.nii", np.zeros((5, 6), int), r"shape \(5, 6\); expected the volume's \(5, 6, 7\)"),
        ("l.nii", np.zeros(SHAPE[::-1], int), r"shape \(7, 6, 5\); expected the volume's"),
        ("l.nii", np.zeros(SHAPE), r"labels of the type float64; expected integers"),
        ("l.nii", np.full(SHAPE, -1), r"labels down to -1; expected 0 or more"),
    ],
)
def test_labels_that_are_none(tmp_path, rng, name, labels, reason):
    with pytest.raises(ValueError, match=reason):
        write_labels(tmp_path / name, labels, Volume(voxels(rng), PLAIN))
    assert list(tmp_path.iterdir()) == []


def test_real_mr_volumes(shared_data, tmp_path):
    folder = shared_data / "msd_hippocampus"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    for path in sorted((folder / "imagesTr").glob("*.nii.gz"))[:5]:
        image, label = read_volume(path), read_volume(folder / "labelsTr" / path.name)
        assert image.array.shape == label.array.shape
        assert (image.spacing, through_plane_axis(image)) == ((1, 1, 1), 2)
        frames = to_frames(image)
        assert frames.shape == (*image.array.shape[::-1], 3)
        assert 60 < frames.std() < 110  # the window uses the range
        write_labels(tmp_path / path.name, label.array.astype(int), image)  # some are float
        written = nib.load(tmp_path / path.name)
        assert written.affine.tobytes() == nib.load(path).affine.tobytes()
        np.testing.assert_array_equal(np.asarray(written.dataobj), label.array)


def test_real_ct_volumes(shared_data, tmp_path):
    folder = shared_data / "totalseg_ct"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    for path in (folder / "example_ct_sm.nii.gz", folder / "example_ct_512.nii.gz"):
        volume = read_volume(path)
        assert volume.array.min() <= -1000
        assert volume.array.dtype == np.int16
        assert through_plane_axis(volume) == 2
        frames = to_frames(volume, window=(40, 400))
        assert frames.shape == (*volume.array.shape[::-1], 3)
        sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / "a.nrrd"))
        again = read_volume(tmp_path / "a.nrrd")
        np.testing.assert_array_equal(again.array, volume.array)
        np.testing.assert_allclose(again.affine, volume.affine, atol=1e-4)
