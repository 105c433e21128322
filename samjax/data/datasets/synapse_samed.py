"""Synapse (BTCV) as SAMed publishes it: training slices as npz, test volumes as HDF5.

Zhang and Liu, arXiv:2304.13785; https://github.com/hitachinsk/SAMed (preprocess/README.md). The
images are 0..1 for -125 to 275 Hounsfield units, the labels 0..8 in the order of
`synapse.CLASSES`. The training slices that are distributed are 224×224 pixels, the test slices
512×512. The split is that of `synapse`. Files of other projects with the same names may number the
organs otherwise.

Both have SAMed's orientation: the voxel axes of the NIfTI files from the last to the first, (D, H,
W). Hence the test volumes are sliced along axis 0, and axis 1 runs down the picture:
`Slices(scans, rows="first")`.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from samjax.data.datasets.base import Case, Pictures, Scans, find_files, one_of, to_labels
from samjax.data.datasets.hdf5 import H5Scans, h5_shape, read_h5
from samjax.data.datasets.synapse import CLASSES
from samjax.data.images import DataError
from samjax.data.intensity import Window

TREE = """
    train_npz/case0005_slice000.npz …       2211 slices; keys image, label
    test_vol_h5/case0001.npy.h5 …           12 volumes; keys image, label
"""


def synapse_samed(
    root: str | Path, split: str = "train", *, list_file: str | Path | None = None
) -> Pictures | Scans:
    """Reads SAMed's files.

    Args:
        root: see ``TREE``.
        split: "train" for `Pictures` of the slices, "test" for `Scans` of the volumes.
        list_file: a text file of the examples to take, a name a line, in its order: SAMed's
            lists/lists_Synapse/train.txt, or H-SAM's train_220.txt for a tenth of the slices.
            None for all, by name.

    Raises:
        DataError: another tree, or a list that names what is not there. ValueError: another split.
    """
    root = Path(root)
    one_of("split", split, ("train", "test"))
    if split == "train":
        files = find_files(root, "train_npz/case*_slice*.npz", TREE)
        cases = [Case(f.stem, (f,), (f,), patient=f.stem[:8]) for f in files]
        return Pictures(
            dataset="synapse_samed",
            root=root,
            split=split,
            cases=_listed(cases, list_file),
            class_names=CLASSES,
            read_label=_read_label,
            read_picture=_read_picture,
        )
    files = find_files(root, "test_vol_h5/case*.npy.h5", TREE)
    cases = [Case(f.name.removesuffix(".npy.h5"), (f,), (f,)) for f in files]
    return H5Scans(
        dataset="synapse_samed",
        root=root,
        split=split,
        cases=_listed(cases, list_file),
        class_names=CLASSES,
        intensity=Window(0, 1),
        axis=0,
        read=read_h5,
        shape=h5_shape,
    )


def _listed(cases: list[Case], list_file: str | Path | None) -> tuple[Case, ...]:
    if list_file is None:
        return tuple(cases)
    by_name = {case.name: case for case in cases}
    names = Path(list_file).read_text("utf-8").split()
    if missing := [name for name in names if name not in by_name]:
        raise DataError(
            f"{list_file}: {len(missing)} of {len(names)} names have no file, such as {missing[0]}"
        )
    return tuple(by_name[name] for name in names)


def _read_picture(file: Path) -> np.ndarray:
    """uint8 (h, w, 3) of the image, 0..1."""
    image = _array(file, "image")
    if image.ndim != 2 or not (image.min() >= 0 and image.max() <= 1):  # NaN fails it too
        raise DataError(
            f"{file}: image of the shape {image.shape} with values from {image.min()} to "
            f"{image.max()}; expected (h, w) from 0 to 1"
        )
    grey = np.rint(image * 255).astype(np.uint8)
    return np.stack([grey] * 3, axis=-1)


def _read_label(case: Case, size: tuple[int, int]) -> np.ndarray:
    (file,) = case.labels
    return to_labels(_array(file, "label"), file, CLASSES)


def _array(file: Path, key: str) -> np.ndarray:
    try:
        with file.open("rb") as handle, np.load(handle) as arrays:
            if key not in arrays:
                raise DataError(f"{file}: no key {key!r}; there are {', '.join(arrays)}")
            return arrays[key]
    except DataError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file}: not a readable npz file ({error})") from error
