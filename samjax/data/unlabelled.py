"""Unlabelled slices for training without labels: kept small on disk, and drawn as views.

SAMora's first stage (arXiv 2511.08626; ShChen233/SAMora@d492a95, ``datasets/dataset_unlabeled.py``)
and the training of its teachers. A slice is stretched to a square, its lowest grey value to 0 and
its highest to 1. There it is drawn anew for each step; here once, before all steps, since a
shuffled order would decode a volume for every slice. Views are therefore cut from the square.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from samjax.atomic import atomic_write
from samjax.data.contrastive_views import samora_view, simclr_view
from samjax.data.images import DataError
from samjax.data.pipeline import Batch, Loader, _read_options, _Shuffled
from samjax.data.subsets import SegmentationDataset, in_threads
from samjax.data.warps import BICUBIC, blur, picture_of, resized_crop

Draw = Callable[[np.ndarray, np.random.Generator], Batch]
"""(slice uint8 (side, side), rng) -> pictures uint8 (side, side, 3) by name. Picklable."""

NOISE = 0.08  # standard deviation, of grey values in 0..1


class Pool:
    """Several arrays of slices, each uint8 (n, side, side), as one; of at least one slice."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = tuple(arrays)
        self._ends = np.cumsum([len(array) for array in arrays])
        if not len(self):
            raise ValueError("there is no unlabelled slice")

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.arrays else 0

    def __getitem__(self, index: int, /) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        which = int(np.searchsorted(self._ends, index, side="right"))
        array = self.arrays[which]
        return np.asarray(array[index - int(self._ends[which]) + len(array)])

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself: they would travel to it with all their pixels.
        return _pool_of, (tuple(_as_file(array) for array in self.arrays),)


def squared(image: np.ndarray, side: int) -> np.ndarray:
    """An image uint8 (h, w, 3) of grey values as uint8 (side, side), from 0 to 255.

    One of a single value becomes 0. By Pillow's bicubic filter (upstream: a cubic spline).
    Raises ``DataError`` for another type or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or not image.size:
        raise DataError(f"an image of {image.dtype} {image.shape}, expected uint8 (h, w, 3)")
    grey = image[..., 0].astype(np.float32)
    low, high = grey.min(), grey.max()
    grey = np.rint((grey - low) * (255 / max(high - low, 1))).astype(np.uint8)
    return np.asarray(Image.fromarray(grey).resize((side, side), BICUBIC))


def kept_slices(
    dataset: SegmentationDataset, side: int, folder: Path, name: str, *, progress: bool = False
) -> np.ndarray:
    """All images of a data set, `squared`: uint8 (n, side, side), read from disk where needed.

    Written below `folder` the first time, which takes as long as reading everything once. A file
    counts for data sets whose examples have the same names; give data of other contents another
    ``name``.

    Raises:
        DataError: an example cannot be read. ValueError: a file that is damaged. OSError.
    """
    names = getattr(dataset, "names", None)
    about = "\n".join([str(len(dataset)), *(names or ())])
    digest = hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    file = folder / f"{name}_{side}_{digest}.npy"
    shape = (len(dataset), side, side)
    if not file.exists():
        with atomic_write(file) as temporary:
            array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)

            def keep(index: int) -> None:
                array[index] = squared(dataset[index]["image"], side)

            in_threads(keep, len(dataset), name, progress=progress)
            array.flush()
    try:
        array = np.load(file, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: damaged; delete it ({error})") from error
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(f"{file}: {array.dtype} {array.shape}, expected uint8 {shape}; delete it")
    return array


def plain(grey: np.ndarray, rng: np.random.Generator) -> Batch:
    """{"image"}: the slice as it is; for the patch expert."""
    del rng
    return {"image": _colour(grey)}


def noisy(grey: np.ndarray, rng: np.random.Generator) -> Batch:
    """{"image", "noisy"}: the slice, and with normal noise and half the times a blur."""
    values = grey / np.float32(255) + rng.normal(0, NOISE, grey.shape).astype(np.float32)
    values = np.clip(values, 0, 1)
    if rng.random() < 0.5:
        values = blur(values[..., None], int(rng.choice((3, 5))), rng.uniform(0.6, 1.4))[..., 0]
    return {"image": _colour(grey), "noisy": _colour(np.rint(255 * values).astype(np.uint8))}


def of_samora(grey: np.ndarray, rng: np.random.Generator) -> Batch:
    """{"view1", "view2"}: two of `samora_view`; for the image expert."""
    return _two(samora_view, grey, rng)


def of_simclr(grey: np.ndarray, rng: np.random.Generator) -> Batch:
    """{"view1", "view2"}: two of `simclr_view`."""
    return _two(simclr_view, grey, rng)


def of_mae(grey: np.ndarray, rng: np.random.Generator) -> Batch:
    """{"image"}: a crop of 20 to 100 % of the area with sides of 3/4 to 4/3, half the times
    mirrored left-right, as masked autoencoders are trained (facebookresearch/mae)."""
    side = len(grey)
    box = (0, 0, side, side)
    for _ in range(10):
        area, ratio = side**2 * rng.uniform(0.2, 1), np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= side and h <= side:
            left, top = rng.integers(side - w + 1), rng.integers(side - h + 1)
            box = (int(left), int(top), int(left) + w, int(top) + h)
            break
    cut = np.asarray(resized_crop(picture_of(_colour(grey)), box, (side, side), BICUBIC))
    return {"image": np.ascontiguousarray(cut[:, ::-1] if rng.random() < 0.5 else cut)}


def make_views(
    slices: Pool,
    draw: Draw,
    *,
    batch_size: int,
    seed: int = 0,
    start_step: int = 0,
    workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """An endless stream of batches: what ``draw`` makes, stacked, and ``index`` int32 (b,).

    Arguments and what follows from them as in `samjax.data.make_loader`: order and views come from
    the seed and the place in the stream, and epochs run into each other.

    Raises ``ValueError`` for a batch size that is no positive multiple of the hosts.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size}: expected a positive multiple of the {process_count} hosts"
        )
    places = grain.MapDataset.range(len(slices)).seed(seed).repeat(None)
    places = places.map_with_index(_Shuffled(len(slices), seed))
    batches = places.random_map(_Drawn(slices, draw)).batch(batch_size // process_count)
    batches = batches[process_index::process_count][start_step:]
    stream = batches.to_iter_dataset(_read_options(None, workers))
    if workers:
        if not flags.FLAGS.is_parsed():  # see `make_loader`
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        stream = stream.mp_prefetch(options)
    return Loader(len(slices), None, stream)


@dataclass(frozen=True)
class _File:
    """An array that lies in a file."""

    name: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]


def _as_file(array: np.ndarray) -> np.ndarray | _File:
    if isinstance(array, np.memmap) and array.mode == "r" and isinstance(array.base, mmap.mmap):
        return _File(str(array.filename), array.dtype, array.offset, array.shape)
    return array


def _pool_of(arrays: Sequence[np.ndarray | _File]) -> Pool:
    return Pool(
        [
            np.memmap(a.name, a.dtype, "r", a.offset, a.shape) if isinstance(a, _File) else a
            for a in arrays
        ]
    )


@dataclass(frozen=True)
class _Drawn:
    slices: Pool
    draw: Draw

    def __call__(self, index: int, rng: np.random.Generator) -> Batch:
        return {**self.draw(self.slices[index], rng), "index": np.array(index, np.int32)}


def _two(view: Callable[..., np.ndarray], grey: np.ndarray, rng: np.random.Generator) -> Batch:
    drawn = partial(view, _colour(grey), rng, side=len(grey))
    return {"view1": drawn(), "view2": drawn()}


def _colour(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)
