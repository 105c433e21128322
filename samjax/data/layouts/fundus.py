"""Phantom fundus photographs in the layouts of the vessel data sets.

The folders, names, formats and values are the owners'; the pictures are `samjax.data.phantom`'s.
Three are drawn, and the n-th file of a set repeats the n-th modulo three, so that hundreds of
files are written in a moment.

Every `write_…` takes a folder, new or empty, the size (h, w) of the pictures, at least 32 a side,
and the seed of the phantoms; ``full=False`` writes the first three pictures of each folder only,
which the readers of sets whose split is drawn refuse. It returns what was drawn: the path of each
photograph below the folder → its label map uint8 (h, w) as `make_phantom` gives it. A folder that
holds something is a ``ValueError``.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from samjax.data.phantom import make_phantom, target_mask

Phantom = dict[str, np.ndarray]
Size = tuple[int, int]

_DRAWN = 3
SIZE = (40, 48)
_STARE = (1, 2, 3, 4, 5, 44, 77, 81, 82, 139, 162, 163, 235, 236, 239, 240, 255, 291, 319, 324)


class Tree:
    """A folder that is being written, and what was drawn in it."""

    def __init__(self, root: str | Path, size: Size, full: bool, seed: int) -> None:
        self.root = Path(root)
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise ValueError(f"{self.root}: exists already, expected a new or empty folder")
        self.full = full
        self.phantoms = [make_phantom((seed, i), "colour", size) for i in range(_DRAWN)]
        self.drawn: dict[str, np.ndarray] = {}
        self._encoded: dict[tuple[object, int], bytes] = {}
        self._folders: set[Path] = set()

    def some(self, names: Iterable[str]) -> list[tuple[int, str]]:
        """Number and name of each picture of a folder, or of its first three."""
        return list(enumerate(names))[: None if self.full else _DRAWN]

    def photograph(self, path: str, number: int, encode: Callable[[Phantom], bytes]) -> None:
        """Writes a photograph."""
        self.write(path, number, encode)
        self.drawn[path] = self.phantom(number)["mask"]

    def write(self, path: str, number: int, encode: Callable[[Phantom], bytes]) -> None:
        """Writes a file of the n-th picture; a format is encoded once for each phantom."""
        key = (encode, number % _DRAWN)
        if key not in self._encoded:
            self._encoded[key] = encode(self.phantom(number))
        self.put(path, self._encoded[key])

    def put(self, path: str, data: bytes) -> None:
        """Writes a file."""
        file = self.root / path
        if file.parent not in self._folders:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._folders.add(file.parent)
        file.write_bytes(data)

    def phantom(self, number: int) -> Phantom:
        """The phantom that the n-th picture of a folder repeats."""
        return self.phantoms[number % _DRAWN]


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    """An image file in memory."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def photograph(format: str) -> Callable[[Phantom], bytes]:
    """Encodes the picture, RGB."""
    return lambda phantom: encoded(Image.fromarray(phantom["image"]), format)


def _vessels(format: str, mode: str = "L", second: bool = False) -> Callable[[Phantom], bytes]:
    """Encodes the vessels, 0 and 255; the second observer's lie one pixel further right."""

    def encode(phantom: Phantom) -> bytes:
        mask = target_mask(phantom["mask"], "vessel")
        mask = np.roll(mask, 1, axis=1) if second else mask
        return encoded(Image.fromarray(mask).convert(mode), format)

    return encode


def _field_of_view(format: str) -> Callable[[Phantom], bytes]:
    def encode(phantom: Phantom) -> bytes:
        lit = phantom["image"].max(2) > 20
        return encoded(Image.fromarray(np.where(lit, 255, 0).astype(np.uint8)), format)

    return encode


def write_chasedb1(
    root: str | Path, *, size: Size = SIZE, full: bool = True, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes CHASEDB1: 28 jpg and two observers' vessels, png of one bit, in one folder."""
    tree = Tree(root, size, full, seed)
    image, first, second = photograph("JPEG"), _vessels("PNG", "1"), _vessels("PNG", "1", True)
    for number, name in tree.some(f"Image_{n:02d}{eye}" for n in range(1, 15) for eye in "LR"):
        tree.photograph(f"{name}.jpg", number, image)
        tree.write(f"{name}_1stHO.png", number, first)
        tree.write(f"{name}_2ndHO.png", number, second)
    return tree.drawn


def write_drive(
    root: str | Path,
    *,
    size: Size = SIZE,
    full: bool = True,
    seed: int = 0,
    test_labels: bool = False,
) -> dict[str, np.ndarray]:
    """Writes DRIVE: 20 and 20 tif, vessels and fields of view in gif.

    Args:
        test_labels: both observers' vessels of the test images, as in older archives.
    """
    tree = Tree(root, size, full, seed)
    image, view = photograph("TIFF"), _field_of_view("GIF")
    observers = {"1st_manual/{}_manual1": _vessels("GIF")}
    older = {**observers, "2nd_manual/{}_manual2": _vessels("GIF", second=True)}
    for folder, start, end in (("training", 21, 41), ("test", 1, 21)):
        labels = observers if folder == "training" else older if test_labels else {}
        for number, name in tree.some(f"{n:02d}" for n in range(start, end)):
            tree.photograph(f"{folder}/images/{name}_{folder}.tif", number, image)
            tree.write(f"{folder}/mask/{name}_{folder}_mask.gif", number, view)
            for path, encode in labels.items():
                tree.write(f"{folder}/{path.format(name)}.gif", number, encode)
    return tree.drawn


def write_fives(
    root: str | Path,
    *,
    size: Size = SIZE,
    full: bool = True,
    seed: int = 0,
    masks: str = "Groud truth",
) -> dict[str, np.ndarray]:
    """Writes FIVES: 600 and 200 png, as many of each group.

    Args:
        masks: name of the folders of the vessels, by default with the owners' spelling mistake.
    """
    tree = Tree(root, size, full, seed)
    image, vessels = photograph("PNG"), _vessels("PNG")
    for split, each in (("train", 150), ("test", 50)):
        names = (f"{n + 1}_{'ADGN'[n // each]}.png" for n in range(4 * each))
        for number, name in tree.some(names):
            tree.photograph(f"{split}/Original/{name}", number, image)
            tree.write(f"{split}/{masks}/{name}", number, vessels)
    return tree.drawn


def write_hrf(
    root: str | Path, *, size: Size = SIZE, full: bool = True, seed: int = 0
) -> dict[str, np.ndarray]:
    """Writes HRF: 45 jpg, those of diabetic patients JPG; vessels and fields of view in tif."""
    tree = Tree(root, size, full, seed)
    image, vessels, view = photograph("JPEG"), _vessels("TIFF"), _field_of_view("TIFF")
    groups = {"dr": "JPG", "g": "jpg", "h": "jpg"}
    for number, name in tree.some(f"{n:02d}_{group}" for n in range(1, 16) for group in groups):
        suffix = groups[name.split("_")[1]]
        tree.photograph(f"images/{name}.{suffix}", number, image)
        tree.write(f"manual1/{name}.tif", number, vessels)
        tree.write(f"mask/{name}_mask.tif", number, view)
    return tree.drawn


def write_stare(
    root: str | Path,
    *,
    size: Size = SIZE,
    full: bool = True,
    seed: int = 0,
    packed: bool = True,
) -> dict[str, np.ndarray]:
    """Writes STARE: 20 ppm and two observers' vessels, grey ppm.

    Args:
        packed: each as .ppm.gz, as it is published.
    """
    tree = Tree(root, size, full, seed)

    def maybe_packed(encode: Callable[[Phantom], bytes]) -> Callable[[Phantom], bytes]:
        return lambda p: gzip.compress(encode(p), mtime=0) if packed else encode(p)

    image = maybe_packed(photograph("PPM"))
    observers = {
        "ah": maybe_packed(_vessels("PPM")),
        "vk": maybe_packed(_vessels("PPM", "RGB", second=True)),
    }
    suffix = "ppm.gz" if packed else "ppm"
    for number, name in tree.some(f"im{n:04d}" for n in _STARE):
        tree.photograph(f"stare-images/{name}.{suffix}", number, image)
        for who, encode in observers.items():
            tree.write(f"labels-{who}/{name}.{who}.{suffix}", number, encode)
    return tree.drawn
