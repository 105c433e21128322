"""What the tests of medical data share: files made, cut and replaced; pictures that tell labels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from samjax.data.layouts import fundus, fundus_disc

HEIGHT, WIDTH = 48, 70
PHOTOGRAPH = (48, 40)  # height and width of the phantom photographs


def touch(*files: Path) -> None:
    """Makes empty files, and the folders that they lie in."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def cut(file: Path) -> None:
    """Leaves the first half of a file."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@contextmanager
def replaced(file: Path, content: bytes | None) -> Iterator[None]:
    """Another content of a file, or none, for a while."""
    before = file.read_bytes()
    file.unlink()  # others may be links to it
    if content is not None:
        file.write_bytes(content)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        file.write_bytes(before)


def write_fundus(name: str, root: Path, **options) -> dict[str, np.ndarray]:
    """Writes the phantoms of a data set of fundus photographs, by the name of its reader."""
    writers = {**vars(fundus), **vars(fundus_disc)}
    return writers[f"write_{name}"](root, size=PHOTOGRAPH, **options)


def voxels(file: Path) -> np.ndarray:
    """The array of a NIfTI file as nibabel reads it."""
    nibabel = pytest.importorskip("nibabel")
    return np.asarray(nibabel.load(file).dataobj)


def l_and_blot() -> np.ndarray:
    """Labels uint8 (HEIGHT, WIDTH): no symmetry hides a mirrored or swapped axis."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[8:36, 10:18] = 1
    mask[28:36, 10:40] = 1
    mask[10:22, 44:58] = 2
    return mask


def painted(mask: np.ndarray) -> np.ndarray:
    """The image whose colours are the labels 0, 1 and 2 of the mask."""
    return np.stack([(mask == 1), (mask == 2), (mask > 0)], axis=-1).astype(np.uint8) * 255


def read_back(image: np.ndarray) -> np.ndarray:
    """The labels of a painted image that was moved."""
    return np.where(image[..., 0] > 127, 1, np.where(image[..., 1] > 127, 2, 0))
