"""What a frozen image encoder makes of each example, computed once and kept in memory or on a disk.

The encoder is nearly all of a training step's work.  Where nothing of it is trained and the images
are not augmented, every epoch would repeat it.

On a disk: one ``.npy`` file per array, (examples, …), and ``complete.json``, which is written last:
a folder without it holds a cache that was not finished, and is filled anew.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from samjax.atomic import atomic_write
from samjax.peft.paths import path_name

MARKER = "complete.json"

Batch = Mapping[str, np.ndarray]
Encode = Callable[[Batch], Any]  # a tree of arrays, (b, …) each


class FeatureError(ValueError):
    """Features that cannot be kept or used; the message says which and why."""


def bytes_per_example(encode: Encode, batch: Batch) -> int:
    """Bytes that one example takes in a cache; nothing is computed."""
    return _bytes_per_row(jax.tree.leaves(jax.eval_shape(encode, dict(batch))))


class FeatureCache:
    """The encoder's outputs for examples 0..count-1; ``cache[indices]`` is a tree of them.

    Args:
        encode: a jitted function of a batch, or another that can be traced.
        batches: hold ``index`` int32 (b,), the example in each row, ``valid`` bool (b,), and what
            ``encode`` takes; in any order.  No more are taken than it needs: one, if the folder
            holds a whole cache.
        count: number of examples.
        folder: None keeps them in memory.
        fingerprint: text for whatever the outputs depend on, weights and images; a folder's must
            be this one.
        progress: show a bar, with images/s.

    Raises:
        FeatureError: an index out of range; examples that no batch held; a folder with another
            fingerprint, or of other shapes, or damaged; outputs that are not one row per example.
        OSError: too little space in the folder, with the bytes needed and free.
    """

    def __init__(
        self,
        encode: Encode,
        batches: Iterable[Batch],
        count: int,
        *,
        folder: Path | None = None,
        fingerprint: str = "",
        progress: bool = True,
    ):
        if count < 1:
            raise ValueError(f"count is {count}, expected at least 1 example")
        if folder is not None and not fingerprint:
            raise ValueError(f"a cache in {folder} needs a fingerprint, got an empty one")
        iterator = iter(batches)
        first = next(iterator, None)
        if first is None:
            raise FeatureError(f"no batches, but {count} examples to encode")
        if not {"index", "valid"} <= set(first):
            raise FeatureError(f"a batch holds {', '.join(first)}, expected index and valid too")
        shapes = jax.eval_shape(encode, dict(first))
        flat, self._structure = jax.tree_util.tree_flatten_with_path(shapes)
        rows = len(first["index"])
        for path, leaf in flat:
            if not leaf.shape or leaf.shape[0] != rows:
                raise FeatureError(
                    f"the encoder's output {path_name(path)!r} has shape {leaf.shape}, expected "
                    f"{rows} rows, as the batch has"
                )
        self._count = count
        self.bytes_per_example = _bytes_per_row(leaf for _, leaf in flat)
        described = [(path_name(path), leaf.shape[1:], leaf.dtype) for path, leaf in flat]

        def fill(arrays: list[np.ndarray]) -> None:
            _fill(arrays, encode, itertools.chain([first], iterator), progress)

        if folder is None:
            self._arrays = [np.empty((count, *shape), dtype) for _, shape, dtype in described]
            fill(self._arrays)
        else:
            files = _Files(Path(folder), fingerprint, count, described)
            if not files.complete():
                files.write(fill)
            self._arrays = files.open()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, indices: np.ndarray) -> Any:
        """NumPy arrays (len(indices), …); -1, which rows that only fill up a batch have, is zeros.

        Raises ``IndexError`` for any other number outside 0..count-1.
        """
        indices = np.asarray(indices)
        if indices.ndim != 1 or indices.dtype.kind not in "iu":
            raise IndexError(
                f"indices of shape {indices.shape} and type {indices.dtype}, expected integers (n,)"
            )
        wrong = indices[(indices < -1) | (indices >= self._count)]
        if wrong.size:
            raise IndexError(f"no example {_first(wrong)}: the cache holds {self._count}")

        def rows(array: np.ndarray) -> np.ndarray:
            chosen = np.asarray(array[indices])  # a copy, in memory
            chosen[indices == -1] = 0
            return chosen

        return jax.tree.unflatten(self._structure, [rows(array) for array in self._arrays])


class _Files:
    """A cache's files in ``folder``; ``described``: (path, shape of one example, dtype) by leaf."""

    def __init__(self, folder: Path, fingerprint: str, count: int, described: list[tuple]):
        self._folder, self._count, self._described = folder, count, described
        leaves = [[path, list(shape), dtype.name] for path, shape, dtype in described]
        self._marker = {"fingerprint": fingerprint, "count": count, "leaves": leaves}
        self._paths = [folder / f"leaf{number}.npy" for number in range(len(described))]

    def complete(self) -> bool:
        """Whether a whole cache is there; one of something else is an error."""
        file = self._folder / MARKER
        if not file.exists():
            return False
        try:
            found = json.loads(file.read_text("utf-8"))
            found = {name: found[name] for name in self._marker}
        except (ValueError, KeyError, TypeError) as error:
            raise FeatureError(f"{file} is damaged: delete it to encode anew") from error
        for name, expected in self._marker.items():
            if found[name] != expected:
                raise FeatureError(
                    f"{self._folder} holds features with {name} {found[name]!r}, expected "
                    f"{expected!r}: take another folder, or delete this one"
                )
        return True

    def write(self, fill: Callable[[list[np.ndarray]], None]) -> None:
        """Makes the files, lets ``fill`` write the arrays, and marks them as complete."""
        sizes = [self._count * prod(shape) * dtype.itemsize for _, shape, dtype in self._described]
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._paths:  # of a cache that was not finished
            path.unlink(missing_ok=True)
        free = shutil.disk_usage(self._folder).free
        if sum(sizes) > free:
            raise OSError(
                errno.ENOSPC,
                f"the features need {sum(sizes):,} bytes, {self._folder} has {free:,} free",
            )
        try:
            arrays = [
                _new_file(path, (self._count, *shape), dtype)
                for path, (_, shape, dtype) in zip(self._paths, self._described, strict=True)
            ]
            fill([a.view(d) for a, (_, _, d) in zip(arrays, self._described, strict=True)])
            for array in arrays:
                array.flush()
            with atomic_write(self._folder / MARKER) as temporary:
                temporary.write_text(json.dumps(self._marker, indent=1), "utf-8")
        except BaseException:
            for path in self._paths:
                path.unlink(missing_ok=True)
            raise

    def open(self) -> list[np.ndarray]:
        """The arrays, read from the disk where they are indexed."""
        arrays = []
        for path, (_, shape, dtype) in zip(self._paths, self._described, strict=True):
            try:
                array = np.load(path, mmap_mode="r")
                expected = (self._count, *shape), _on_disk(dtype)
                if (array.shape, array.dtype) != expected:
                    raise ValueError(f"{array.shape} {array.dtype}, expected {expected}")
            except (OSError, ValueError) as error:
                raise FeatureError(
                    f"{path} is damaged ({error}): delete {self._folder / MARKER} to encode anew"
                ) from error
            arrays.append(array.view(dtype))
        return arrays


def _on_disk(dtype: np.dtype) -> np.dtype:
    """NumPy's files know no bfloat16 (a type of kind V to NumPy); its bits are kept as integers."""
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" else dtype


def _new_file(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=_on_disk(dtype), shape=shape)
    if hasattr(os, "posix_fallocate"):
        # A disk or a quota that runs out under a memory map kills the process without a word.
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
            except OSError as error:
                reason = f"cannot reserve {array.nbytes:,} bytes for {path}: {error.strerror}"
                raise OSError(error.errno, reason) from error
    return array


def _fill(
    arrays: list[np.ndarray], encode: Encode, batches: Iterable[Batch], progress: bool
) -> None:
    """Every example's outputs into its row, from the first batch that holds it."""
    count = len(arrays[0])
    done = np.zeros(count, bool)
    with tqdm(total=count, unit=" images", desc="encoding", disable=not progress) as bar:
        for batch in batches:
            index = np.asarray(batch["index"])
            valid = np.asarray(batch["valid"], bool)
            wrong = index[valid & ((index < 0) | (index >= count))]
            if wrong.size:
                raise FeatureError(
                    f"a batch holds example {_first(wrong)}, expected 0 to {count - 1}"
                )
            rows = np.flatnonzero(valid)
            rows = rows[~done[index[rows]]]
            if not rows.size:
                continue
            _, first_rows = np.unique(index[rows], return_index=True)
            rows = rows[first_rows]
            outputs = jax.tree.leaves(encode(batch))
            for array, output in zip(arrays, outputs, strict=True):
                if output.shape != (len(index), *array.shape[1:]) or output.dtype != array.dtype:
                    raise FeatureError(
                        f"the encoder's output became {output.dtype} {output.shape}, expected "
                        f"{array.dtype} {(len(index), *array.shape[1:])}, as in the first batch"
                    )
                array[index[rows]] = np.asarray(output)[rows]
            done[index[rows]] = True
            bar.update(len(rows))
            if done.all():
                return
    missing = np.flatnonzero(~done)
    raise FeatureError(f"{missing.size} of {count} examples never came: {_first(missing)}")


def _bytes_per_row(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    return sum(prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in leaves)


def _first(numbers: np.ndarray) -> str:
    """The first few, for a message."""
    return ", ".join(map(str, numbers[:5].tolist())) + (", …" if numbers.size > 5 else "")
