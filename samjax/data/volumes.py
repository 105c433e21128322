"""Medical volumes in (NIfTI, DICOM, MetaImage, NRRD), frames for a model, NIfTI labels out.

Voxel axes are (i, j, k) as nibabel has them, world axes RAS+ (right, anterior, superior) in mm,
whatever the file uses. NIfTI needs nibabel, the other formats SimpleITK: `samjax[volumes]`.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from samjax.atomic import atomic_write
from samjax.data.images import DataError
from samjax.data.itk import itk_shape, library, read_dicom, read_itk, reason, storage_class

_NIFTI_SUFFIXES = (".nii", ".nii.gz")
_ITK_SUFFIXES = (".mhd", ".mha", ".nrrd")
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # per unit of NIfTI's code; 0 names none
_SPATIAL_UNIT = 0b111  # its bits in xyzt_units
_QFORM = ("qform_code", *(f"quatern_{x}" for x in "bcd"), *(f"qoffset_{x}" for x in "xyz"))
_SFORM = ("sform_code", *(f"srow_{x}" for x in "xyz"))
_THICK = 1.5  # times the other spacings makes an axis the through-plane one


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume of one number per voxel, and where it lies.

    Attributes:
        array: integers, or float32, of the shape (i, j, k).
        affine: float64 (4, 4), voxel (i, j, k) to RAS+ mm.
        header: of the NIfTI file that the volume comes from (nibabel's), else None.

    Raises:
        DataError: not three axes; voxels that are no real numbers, NaN or infinite (they are not
            filled); an affine that cannot be inverted.
    """

    array: np.ndarray
    affine: np.ndarray
    header: Any = None

    def __post_init__(self) -> None:
        array, affine = np.asarray(self.array), np.array(self.affine, np.float64)
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "affine", affine)
        if array.ndim != 3 or 0 in array.shape:
            raise DataError(f"an image of the shape {array.shape}; expected a volume (i, j, k)")
        if array.dtype.kind not in "iuf":
            raise DataError(f"voxels of the type {array.dtype}; expected integers or real numbers")
        if array.dtype.kind == "f" and (bad := int((~np.isfinite(array)).sum())):
            raise DataError(f"{bad} of {array.size} voxels are NaN or infinite; expected numbers")
        is_affine = affine.shape == (4, 4) and np.array_equal(affine[3], (0, 0, 0, 1))
        is_affine = is_affine and bool(np.isfinite(affine).all())
        # The volume of a voxel, against that of a box with its edges.
        if not is_affine or abs(np.linalg.det(affine)) <= 1e-6 * np.prod(self.spacing):
            raise DataError(
                f"the affine {affine.tolist()} cannot be inverted; expected a (4, 4) matrix from "
                "voxels to mm with the last row 0 0 0 1"
            )

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance of the voxels along i, j and k, in mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return i, j, k


def read_volume(
    path: str | os.PathLike[str], *, series: str | None = None, volume: int | None = None
) -> Volume:
    """Reads a volume; the voxels keep the file's order and type, float64 becoming float32.

    Stored scalings (scl_slope, RescaleSlope) are applied: CT is in Hounsfield units.

    Args:
        path: .nii, .nii.gz, .mhd, .mha, .nrrd, a folder of DICOM files, or one of these files.
        series: the SeriesInstanceUID to read, where a DICOM folder has several.
        volume: which volume of a 4-D file, from 0.

    Raises:
        FileNotFoundError: no such file or folder.
        DataError: an unknown format; a file that is broken, 2-D, in colour, or 4-D without
            `volume`; several DICOM series without `series`; slices that are broken, missing or
            off their places by more than a tenth of their distance; what `Volume` refuses.
        ImportError: nibabel or SimpleITK is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    name = path.name.lower()
    try:
        if path.is_file() and name.endswith(_NIFTI_SUFFIXES + _ITK_SUFFIXES):
            if series is not None:
                raise DataError(f"series={series!r} picks from a folder of DICOM files only")
            if name.endswith(_NIFTI_SUFFIXES):
                return _read_nifti(path, volume)
            array, affine = read_itk(path)
        elif path.is_dir() or storage_class(path) is not None:
            array, affine = read_dicom(path, series)
        else:
            known = ", ".join(_NIFTI_SUFFIXES + _ITK_SUFFIXES)
            raise DataError(f"unknown format; expected {known}, DICOM or a folder of DICOM files")
        return Volume(_pick(array, volume), affine)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error.__cause__


def volume_shape(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """(i, j, k) of a file that `read_volume` reads, from its header where the format has one.

    Raises what `read_volume` raises.
    """
    path = Path(path)
    name = path.name.lower()
    if path.is_file() and name.endswith(_NIFTI_SUFFIXES):
        try:
            shape = library("nibabel").load(path, mmap=False).shape
        except ImportError:
            raise
        except Exception as error:
            raise DataError(f"{path}: not a readable NIfTI file ({reason(error)})") from error
    elif path.is_file() and name.endswith(_ITK_SUFFIXES):
        shape = itk_shape(path)
    else:
        shape = read_volume(path).array.shape
    if len(shape) < 3:
        raise DataError(f"{path}: an image of the shape {shape}; expected a volume (i, j, k)")
    return shape[0], shape[1], shape[2]


def _pick(array: Any, volume: int | None) -> np.ndarray:
    """The volume (i, j, k) in an array, or in nibabel's proxy of one, of three or more axes."""
    shape = tuple(array.shape)
    if len(shape) < 3 or any(length != 1 for length in shape[4:]):
        raise DataError(f"an image of the shape {shape}; expected a volume (i, j, k)")
    count = shape[3] if len(shape) > 3 else 1
    choice = f"volume=0 to volume={count - 1}"
    if volume is None and count > 1:
        raise DataError(f"{count} volumes in the shape {shape}; pick one with {choice}")
    if not 0 <= (volume or 0) < count:
        raise DataError(f"volume={volume} of the shape {shape}; expected {choice}")
    rest = (volume or 0, *(0 for _ in shape[4:])) if len(shape) > 3 else ()
    values = np.asarray(array[(..., *rest)])
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what becomes infinite is reported as such
            return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _read_nifti(path: Path, volume: int | None) -> Volume:
    nibabel = library("nibabel")
    try:
        image = nibabel.load(path, mmap=False)
        if not isinstance(image, nibabel.Nifti1Image):  # NIfTI-2 is one of these
            raise DataError(f"a {type(image).__name__}; expected a NIfTI volume")
        array = _pick(image.dataobj, volume)
        affine = _nifti_affine(image.header)
    except DataError:
        raise
    except Exception as error:  # nibabel lets through whatever it stumbles over
        raise DataError(f"not a readable NIfTI file ({reason(error)})") from error
    return Volume(array, affine, image.header)


def _nifti_affine(header: Any) -> np.ndarray:
    unit = int(header["xyzt_units"]) & _SPATIAL_UNIT
    if unit not in _MM:
        raise DataError(f"unknown spatial unit {unit} in the header; expected m, mm or µm")
    affine = np.array(header.get_best_affine(), np.float64)
    affine[:3] *= _MM[unit]
    return affine


def through_plane_axis(volume: Volume) -> int:
    """The voxel axis (0, 1 or 2) along which a volume is a stack of slices.

    The axis with the largest spacing if that is at least 1.5 times both others, else the one that
    runs closest to inferior-superior (so that the slices are axial).
    """
    spacing = np.array(volume.spacing)
    axis = int(spacing.argmax())
    if spacing[axis] >= _THICK * (1 - 1e-5) * np.delete(spacing, axis).max():  # float32 in headers
        return axis
    upward = (np.abs(volume.affine[2, :3]) / spacing).round(6)
    return 2 - int(upward[::-1].argmax())  # the last one where several are equally close


def axis_codes(volume: Volume) -> str:
    """Where voxel axes i, j and k run, such as "RAS" or "LPS"; of the nearest world axes."""
    return "".join(library("nibabel").aff2axcodes(volume.affine))


def to_frames(
    volume: Volume, *, axis: int | None = None, window: tuple[float, float] | None = None
) -> np.ndarray:
    """Slices of a volume as frames, uint8 (t, h, w, 3), three equal channels.

    Columns and rows are the two other voxel axes in their order: pixel (x, y) of frame t along
    axis 2 is voxel (x, y, t), along axis 0 voxel (t, x, y). `frames_to_voxels` is the way back.

    Args:
        axis: along which the slices are taken; None for `through_plane_axis`.
        window: (level, width) in the volume's units (CT: Hounsfield): level - width / 2 becomes
            0, level + width / 2 becomes 255. None for the 0.5th to the 99.5th percentile of the
            voxels that differ from the minimum, which is the background of an MR image.

    Raises:
        ValueError: no such axis; a width that is not above 0; no window, and all voxels equal.
    """
    low, high = _limits(volume.array, window)
    along = through_plane_axis(volume) if axis is None else axis
    slices = np.moveaxis(volume.array, along, 0).swapaxes(1, 2)
    frames = np.empty((*slices.shape, 3), np.uint8)
    for number, values in enumerate(slices):
        grey = (values.astype(np.float64) - low) * (255 / (high - low))
        frames[number] = np.rint(np.clip(grey, 0, 255))[..., None]
    return frames


def _limits(array: np.ndarray, window: tuple[float, float] | None) -> tuple[float, float]:
    """The values that become 0 and 255."""
    if window is not None:
        level, width = (float(value) for value in window)
        if not (np.isfinite(level) and np.isfinite(width) and width > 0):
            raise ValueError(f"window={window}: expected (level, width) with a width above 0")
        return level - width / 2, level + width / 2
    lowest = array.min()
    others = array[array != lowest]
    if not others.size:
        raise ValueError(f"all voxels are {lowest}: expected window=(level, width) to be given")
    low, high = np.percentile(others, (0.5, 99.5)).tolist()
    return (low if low < high else float(lowest)), high


def frames_to_voxels(labels: ArrayLike, axis: int) -> np.ndarray:
    """Label maps (t, h, w) of the frames along `axis` as a volume (i, j, k); a view.

    Raises:
        ValueError: not three axes; no such axis.
    """
    labels = np.asarray(labels)
    if labels.ndim != 3:
        raise ValueError(f"labels of the shape {labels.shape}: expected (t, h, w)")
    return np.moveaxis(labels.swapaxes(1, 2), 0, axis)


def write_labels(path: str | os.PathLike[str], labels: ArrayLike, like: Volume) -> None:
    """Writes a label map as .nii or .nii.gz, in the place of the volume `like`; atomically.

    A volume from a NIfTI file lends its geometry bit for bit, with codes and units (mm where it
    names none). Otherwise sform and qform are the affine in mm, rounded to the format's float32;
    the qform's code is 0 where the affine is sheared, which a qform cannot express. The values
    get the smallest unsigned type that holds them.

    Args:
        labels: integers (i, j, k) of the volume's shape, 0 or more.

    Raises:
        ValueError: another suffix, another shape, labels that are negative or no integers.
        OSError: the file cannot be written; see `samjax.atomic`.
    """
    path, labels = Path(path), np.asarray(labels)
    if not path.name.lower().endswith(_NIFTI_SUFFIXES):
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(_NIFTI_SUFFIXES)}")
    if labels.shape != (shape := like.array.shape):
        raise ValueError(
            f"{path}: labels of the shape {labels.shape}; expected the volume's {shape}"
        )
    if labels.dtype.kind not in "iub":
        raise ValueError(f"{path}: labels of the type {labels.dtype}; expected integers")
    if labels.min() < 0:
        raise ValueError(f"{path}: labels down to {labels.min()}; expected 0 or more")
    nibabel = library("nibabel")
    header = _label_header(nibabel, like)
    values = labels.astype(np.min_scalar_type(int(labels.max())))
    header.set_data_dtype(values.dtype)
    header.set_data_shape(values.shape)
    kind = nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image
    image = kind(values, header.get_best_affine(), header)
    # By stream: nibabel would look at the temporary name's suffixes. No name and no time inside,
    # so that equal labels make equal files.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(file)


def _label_header(nibabel: Any, like: Volume) -> Any:
    """A fresh header that has nothing of the volume's but its geometry."""
    source = like.header
    if source is not None and np.array_equal(_nifti_affine(source), like.affine):
        header = type(source)()
        for name in _QFORM + _SFORM:
            header[name] = source[name]
        header["pixdim"][:4] = source["pixdim"][:4]
        header["xyzt_units"] = int(source["xyzt_units"]) & _SPATIAL_UNIT or 2
        return header
    header = nibabel.Nifti1Header()
    header.set_xyzt_units("mm")
    header.set_sform(like.affine, "scanner")
    header.set_qform(like.affine, "scanner")
    if np.abs(header.get_qform() - like.affine)[:3, :3].max() > 1e-4 * min(like.spacing):
        header["qform_code"] = 0
    return header
