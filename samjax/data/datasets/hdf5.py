"""Volumes in HDF5 files that hold an image and its label map under two keys.

SAMed's test volumes and UA-MT's left atria come so. An HDF5 file says nothing of where its voxels
lie: the affine is the identity. It needs h5py: `samjax[volumes]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from samjax.data.datasets.base import Scans, to_labels
from samjax.data.images import DataError
from samjax.data.volumes import Volume


def read_h5(file: Path, key: str = "image") -> Volume:
    """Reads one array of three axes, float64 becoming float32; the affine is the identity.

    Raises:
        DataError: a broken or truncated file, a key that it lacks, what `Volume` refuses.
        ImportError: h5py is not installed.
    """
    with _array_of(file, key) as stored:
        array = np.asarray(stored[()])
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    try:
        return Volume(array, np.eye(4))
    except DataError as error:
        raise DataError(f"{file}: {key}: {error}") from error


def h5_shape(file: Path, key: str = "image") -> tuple[int, int, int]:
    """(i, j, k) of the array, without reading it. Raises what `read_h5` raises."""
    with _array_of(file, key) as stored:
        shape = stored.shape
    if len(shape) != 3:
        raise DataError(f"{file}: {key}: the shape {shape}; expected a volume (i, j, k)")
    return shape


def write_h5(file: Path, **arrays: np.ndarray) -> None:
    """Writes arrays under their keys, as the data sets' authors do: packed with gzip.

    Raises ``ImportError`` where h5py is not installed.
    """
    with _library().File(file, "w") as opened:
        for key, array in arrays.items():
            opened.create_dataset(key, data=array, compression="gzip")


class H5Scans(Scans):
    """Scans whose image and label lie in one file, under the keys "image" and "label".

    A case names that file twice; `read` and `shape` are `read_h5` and `h5_shape`.
    """

    def label(self, index: int, like: Volume | None = None) -> np.ndarray:
        """Label map of a case, uint8 (i, j, k); ``DataError`` unless it has the image's shape."""
        (file,) = self.cases[index].labels
        stored = read_h5(self._there(file), "label").array
        if like is not None and stored.shape != like.array.shape:
            raise DataError(
                f"{file}: the label has {stored.shape} voxels, its image {like.array.shape}; "
                "expected one grid"
            )
        return to_labels(stored, file, self.class_names, self.values)


@contextmanager
def _array_of(file: Path, key: str) -> Iterator[Any]:
    """Opens the array under a key; what HDF5 complains about becomes a DataError."""
    h5py = _library()
    try:
        with h5py.File(file, "r") as opened:
            if not isinstance(opened.get(key), h5py.Dataset):
                raise DataError(f"{file}: no key {key!r}; there are {', '.join(opened) or 'none'}")
            yield opened[key]
    except (OSError, RuntimeError) as error:
        raise DataError(f"{file}: not a readable HDF5 file ({error})") from error


def _library() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError("HDF5 files need h5py: pip install 'samjax[volumes]'") from error
    return h5py
