"""Volumes through SimpleITK: MetaImage, NRRD, and DICOM series, as (i, j, k) arrays in RAS."""

from __future__ import annotations

import locale
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from samjax.data.images import DataError

_OFF_GRID = 0.1  # of the slice distance: how far a DICOM slice may lie off its place
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])


def read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (x, y, z[, t]) and RAS affine of a file that SimpleITK reads by itself."""
    sitk = library("SimpleITK")
    with _itk_errors(sitk, "not a readable volume"):
        image = sitk.ReadImage(str(path))
    if image.GetDimension() < 3:
        raise DataError(f"an image of the shape {image.GetSize()}; expected a volume (i, j, k)")
    return _from_itk(sitk, image, *_edges_and_origin(image))


def itk_shape(path: Path) -> tuple[int, ...]:
    """The shape of a file that SimpleITK reads by itself, from its header."""
    sitk = library("SimpleITK")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    with _itk_errors(sitk, f"{path}: not a readable volume"):
        reader.ReadImageInformation()
    return tuple(reader.GetSize())


def _edges_and_origin(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """The edges of a voxel, columns of (3, 3), and where the first one lies, (3,); LPS in mm."""
    spacing = np.array(image.GetSpacing())
    edges = np.array(image.GetDirection()).reshape(len(spacing), -1) * spacing
    return edges[:3, :3], np.array(image.GetOrigin()[:3])


def _from_itk(sitk: Any, image: Any, edges: np.ndarray, origin: np.ndarray) -> tuple:
    """Array (x, y, z[, t]) and RAS affine."""
    components = image.GetNumberOfComponentsPerPixel()
    if components != 1:
        raise DataError(f"{components} values per voxel; expected one")
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = _LPS_TO_RAS @ edges, _LPS_TO_RAS @ origin
    return sitk.GetArrayFromImage(image).T, affine + 0.0  # -0 becomes 0


def read_dicom(path: Path, series: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Array (x, y, z) and RAS affine of the series in a folder, or around a file."""
    sitk = library("SimpleITK")
    folder = path if path.is_dir() else path.parent
    with _itk_errors(sitk, "not a readable folder of DICOM files"):
        files_of = {
            uid: [Path(f) for f in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), uid)]
            for uid in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
        }
    fits = [u for u, files in files_of.items() if path in (folder, *files) and series in (None, u)]
    if len(fits) != 1:
        what = f"{len(fits)} series of DICOM images" + (f" with the UID {series}" if series else "")
        listed = ", ".join(f"{uid} ({len(files)} files)" for uid, files in files_of.items())
        raise DataError(f"{what}; pick one with series= from: {listed or 'none'}")
    files = files_of[fits[0]]
    _check_left_out(folder, files, {file for group in files_of.values() for file in group})
    edges, origin, pixel_types = _slices(sitk, files)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in files])
    if len(pixel_types) > 1:  # each slice has its own rescale slope: the first's type may not do
        reader.SetOutputPixelType(sitk.sitkFloat32)
    with _itk_errors(sitk, "the slices cannot be read"):
        return _from_itk(sitk, reader.Execute(), edges, origin)


def _check_left_out(folder: Path, files: list[Path], known: set[Path]) -> None:
    """GDCM passes over files that it cannot read; the slice at an end would be missed by nobody."""
    kind = storage_class(files[0])
    for file in sorted(folder.iterdir()):
        if file.is_file() and file not in known and not file.name.startswith("."):
            found = storage_class(file)
            if found == kind or (found is None and file.suffix.lower() == ".dcm"):
                raise DataError(f"{file.name} is broken or truncated: expected a DICOM image")


def _slices(sitk: Any, files: list[Path]) -> tuple[np.ndarray, np.ndarray, set[int]]:
    """The edges and origin as `_edges_and_origin`, and the pixel types.

    The edge between slices comes from their positions: a tilted gantry shears the volume.
    """
    planes, places, pixel_types = [], [], set()
    reader = sitk.ImageFileReader()
    for file in files:
        reader.SetFileName(str(file))
        with _itk_errors(sitk, f"{file.name} cannot be read"):
            reader.ReadImageInformation()
        edges, place = _edges_and_origin(reader)
        pixel_types.add(reader.GetPixelID())
        size = reader.GetSize()
        if len(files) == 1:
            return edges, place, pixel_types
        if not reader.HasMetaDataKey("0020|0032") or size[2:] not in ((), (1,)):
            raise DataError(f"{file.name} is not one slice with an ImagePositionPatient")
        planes.append((size[:2], edges[:, :2]))
        places.append(place)
        if size[:2] != planes[0][0] or np.abs(edges[:, :2] - planes[0][1]).max() > 1e-3:
            raise DataError(f"{file.name}: not the size, spacing or direction of {files[0].name}")
    step = (places[-1] - places[0]) / (len(places) - 1)
    distance = float(np.linalg.norm(step))
    off = np.array(places) - places[0] - np.arange(len(places))[:, None] * step
    if distance == 0 or np.linalg.norm(off, axis=1).max() > _OFF_GRID * distance:
        gaps = np.unique(np.linalg.norm(np.diff(places, axis=0), axis=1).round(2))
        apart = " and ".join(f"{gap:g}" for gap in gaps)
        raise DataError(f"slices {apart} mm apart: expected one distance (a missing slice?)")
    return np.column_stack([planes[0][1], step]), places[0], pixel_types


def storage_class(path: Path) -> bytes | None:
    """What kind of DICOM object a file says it is (its SOP class); None if it is not DICOM."""
    with path.open("rb") as file:
        head = file.read(1024)
    if head[128:132] != b"DICM":
        return None
    at = head.find(b"\x02\x00\x02\x00UI")  # the tag (0002,0002), its type, its length
    length = int.from_bytes(head[at + 6 : at + 8], "little")
    return head[at + 8 : at + 8 + length].rstrip(b"\0 ") if at >= 0 else b""


@contextmanager
def _itk_errors(sitk: Any, what: str) -> Iterator[None]:
    """Errors of ITK become a DataError; its warnings, which go to stderr, are silent.

    GDCM leaves the process with the C locale, in which Python would open texts as ASCII.
    """
    spoken = locale.setlocale(locale.LC_ALL)
    display = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    except RuntimeError as error:
        raise DataError(f"{what} ({reason(error)})") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(display)
        locale.setlocale(locale.LC_ALL, spoken)


def reason(error: Exception) -> str:
    """The last line of what a library complains about."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def library(name: str) -> Any:
    """nibabel or SimpleITK; `ImportError` that names the extra where it is not installed."""
    try:
        if name == "nibabel":
            import nibabel as library
        else:
            import SimpleITK as library
        return library
    except ImportError as error:
        raise ImportError(f"this format needs {name}: pip install 'samjax[volumes]'") from error
