"""What a record says of its data: how many there are, and a hash of the files they come from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fundus_pools import Joined
from samjax.data.datasets.base import Case, Source
from samjax.data.folder import FolderDataset
from samjax.data.slices import Slices
from samjax.data.subsets import Subset


def data_hash(files: Iterable[Path], root: Path) -> str:
    """sha256 of files: of their names relative to `root` and their contents, by name.

    The same wherever the folder lies and in whatever order the files come; one that comes twice
    counts once. Of a folder all files below it count.

    Raises:
        ValueError: a file outside `root`. OSError: it cannot be read.
    """
    digests = {}
    for file in files:
        for part in sorted(f for f in file.rglob("*") if f.is_file()) if file.is_dir() else [file]:
            if not part.is_relative_to(root):
                raise ValueError(f"{part}: not in {root}, from which the names are taken")
            name = part.relative_to(root).as_posix()
            if name not in digests:
                about = part.stat()
                digests[name] = _file_hash(part, about.st_size, about.st_mtime_ns)
    return sha256_of(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))


@cache  # one process describes the same data for one run after the other
def _file_hash(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def describe_data(name: str, dataset: Any) -> dict[str, Any]:
    """What a record says of a part of its data: {"name", "count", "patients", "sha256"}.

    count: examples; patients: how many different ones, None where the data set knows none; sha256:
    `data_hash` of the files that its examples are read from, with the places of the slices where
    it has slices. Data sets whose files are not known (anything but `Pictures`, `Scans`, `Slices`,
    `FolderDataset`, subsets of these, and these joined) are read, and the hash is of the examples'
    names and arrays, in whatever order. It reads every file: seconds a gigabyte.

    Raises:
        DataError: an example cannot be read. OSError: a file cannot be.
    """
    patients = getattr(dataset, "patients", None)
    inner, indices = dataset, range(len(dataset))
    while isinstance(inner, Subset):  # whose own patients are invented where nobody knows any
        inner, indices = inner.dataset, [inner.indices[index] for index in indices]
        patients = patients if hasattr(inner, "patients") else None
    places: list[str] = []
    if isinstance(inner, Source):
        digest = _source_hash(inner, (inner.cases[index] for index in indices))
    elif isinstance(inner, Slices):
        chosen = [inner.places[index] for index in indices]
        cases = {place.case: inner.scans.cases[place.case] for place in chosen}
        places = [f"{cases[p.case].name} {p.slice} {p.modality}" for p in chosen]
        digest = _source_hash(inner.scans, cases.values())
        digest = sha256_of([digest, *(f"\n{place}" for place in sorted(places))])
    elif isinstance(inner, FolderDataset):
        root = Path(os.path.commonpath([inner.images_dir.absolute(), inner.masks_dir.absolute()]))
        pairs = [inner.pairs[index] for index in indices]
        digest = data_hash((file.absolute() for pair in pairs for file in pair), root)
    elif isinstance(inner, Joined) and inner is dataset:
        parts = {title: describe_data(title, part) for title, part in inner.parts.items()}
        digest = sha256_of(f"{title} {part['sha256']}\n" for title, part in sorted(parts.items()))
    else:
        digest = sha256_of(sorted(_example_hash(dataset[i]) for i in range(len(dataset))))
    return {
        "name": name,
        "count": len(dataset),
        "patients": None if patients is None else len(set(patients)),
        "sha256": digest,
    }


def _source_hash(source: Source, cases: Iterable[Case]) -> str:
    files = [
        part.absolute() for case in cases for f in case.images + case.labels for part in _parts(f)
    ]
    # A table of masks may lie outside the data set's own folder.
    root = os.path.commonpath([source.root.absolute(), *(file.parent for file in files)])
    return data_hash(files, Path(root))


def _parts(file: Path) -> list[Path]:
    """A file with those that hold the rest of it: .mhd is a header, and DICOM a slice a file."""
    if file.suffix.lower() == ".dcm":
        return sorted(file.parent.glob("*.dcm"))
    if file.suffix.lower() != ".mhd":
        return [file]
    beside = (file.with_suffix(suffix) for suffix in (".raw", ".zraw"))
    return [file, *(other for other in beside if other.exists())]


def _example_hash(example: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(example.items()):
        digest.update(f"{key}\0".encode())
        if isinstance(value, np.ndarray):
            digest.update(f"{value.dtype} {value.shape}\0".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        else:
            digest.update(f"{value}\0".encode())
    return digest.hexdigest()


def sha256_of(texts: Iterable[str]) -> str:
    """Of the texts one after the other."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
