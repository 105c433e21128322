"""What is in a data set: counts, sizes, spacings, class frequencies, and what looks wrong."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from samjax.data.datasets.base import Scans, Source
from samjax.data.slices import Slices
from samjax.data.subsets import SegmentationDataset, Subset, in_threads, patients_of
from samjax.data.volumes import axis_codes, through_plane_axis

_NAMED = 5  # examples named with a finding
_FEW = 0.1  # a size or orientation of fewer than this share of the cases stands out


class Seen(NamedTuple):
    """What is kept of an example: its name, patient, (h, w), the sha256 of its pixels, the number
    of pixels of each label (k + 1,), and whether all its pixels are equal."""

    name: str
    patient: str
    size: tuple[int, int]
    digest: str
    pixels: np.ndarray
    flat: bool


@dataclass(frozen=True)
class Survey:
    """All of a data set.

    Attributes:
        examples: in the data set's order.
        class_names: label i + 1 is the class class_names[i].
        scans: of volumes, for each case: its name, shape, spacing in mm, axis codes such as "RAS",
            through-plane axis.
        suspicious: a sentence for each thing that looks wrong.
    """

    examples: tuple[Seen, ...]
    class_names: tuple[str, ...]
    scans: tuple[dict[str, Any], ...] = ()
    suspicious: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """Counts, sizes, class frequencies and findings, not the examples one by one."""
        pixels = np.stack([example.pixels for example in self.examples])
        return {
            "examples": len(self.examples),
            "patients": len({example.patient for example in self.examples}),
            "sizes": {
                f"{w}x{h}": n
                for (h, w), n in Counter(example.size for example in self.examples).most_common()
            },
            "classes": {
                name: {
                    "examples": int((pixels[:, label] > 0).sum()),
                    "share_of_pixels": float(pixels[:, label].sum() / pixels.sum()),
                }
                for label, name in enumerate(self.class_names, start=1)
            },
            "spacings_mm": _counted(scan["spacing"] for scan in self.scans),
            "orientations": _counted(scan["orientation"] for scan in self.scans),
            "suspicious": list(self.suspicious),
        }


def survey(
    dataset: SegmentationDataset,
    others: Mapping[str, SegmentationDataset] | None = None,
    *,
    threads: int = 4,
    progress: bool = True,
) -> Survey:
    """Reads every example once.

    Args:
        dataset: whose labels 1..k have names if it has `class_names`.
        others: other splits by name, read too: a picture or patient in both is a leak.

    Raises:
        DataError: an example that cannot be used.
    """
    examples = _look(dataset, threads, progress)
    names = getattr(dataset, "class_names", None)
    if names is None:
        names = tuple(f"class {i}" for i in range(1, len(examples[0].pixels)))
    whole = _whole(dataset)
    scans = _scans(whole)
    labelled = (*_empty(examples, whole), *_absent(examples, names)) if _has_labels(whole) else ()
    found = [
        *labelled,
        *_flat(examples),
        *_twice(examples),
        *_odd("size", [(e.name, f"{e.size[1]}x{e.size[0]}") for e in examples]),
        *_odd("orientation", [(scan["name"], scan["orientation"]) for scan in scans]),
        *_across(scans, whole),
    ]
    for split, other in (others or {}).items():
        found += _leaks(examples, split, _look(other, threads, progress))
    return Survey(examples, tuple(names), scans, tuple(found))


def _look(dataset: SegmentationDataset, threads: int, progress: bool) -> tuple[Seen, ...]:
    patients = patients_of(dataset)
    count = getattr(dataset, "num_classes", 1)

    def look(index: int) -> Seen:
        example = dataset[index]
        image, mask = example["image"], example["mask"]
        pixels = np.bincount(mask.ravel(), minlength=1 + count)
        digest = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        flat = bool(image.min() == image.max())
        return Seen(example["name"], patients[index], mask.shape, digest, pixels, flat)

    seen = in_threads(look, len(dataset), "reading", threads=threads, progress=progress)
    width = max(len(example.pixels) for example in seen)
    return tuple(
        example._replace(pixels=np.pad(example.pixels, (0, width - len(example.pixels))))
        for example in seen
    )


def _whole(dataset: Any) -> Any:
    return _whole(dataset.dataset) if isinstance(dataset, Subset) else dataset


def _has_labels(dataset: Any) -> bool:
    source = dataset.scans if isinstance(dataset, Slices) else dataset
    return not isinstance(source, Source) or any(case.labels for case in source.cases)


def _scans(dataset: Any) -> tuple[dict[str, Any], ...]:
    """What the volumes' own files say."""
    if not isinstance(dataset, Slices):
        return ()
    scans: Scans = dataset.scans
    found = []
    for index, name in enumerate(scans.names):
        volume = scans.volume(index)
        found.append(
            {
                "name": name,
                "shape": volume.array.shape,
                "spacing": " x ".join(f"{step:.3g}" for step in volume.spacing),
                "orientation": axis_codes(volume),
                "axis": through_plane_axis(volume),
            }
        )
    return tuple(found)


def _counted(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _empty(examples: Sequence[Seen], dataset: Any) -> Iterator[str]:
    """Pictures without foreground, and volumes without any in all their slices."""
    if isinstance(dataset, Slices):
        filled = {e.patient for e in examples if e.pixels[1:].any()}
        empty = list(dict.fromkeys(e.patient for e in examples if e.patient not in filled))
        kind = "volumes have no foreground in any slice"
    else:
        empty = [e.name for e in examples if not e.pixels[1:].any()]
        kind = "masks are empty"
    if empty:
        yield f"{len(empty)} {kind}: {_named(empty)}"


def _absent(examples: Sequence[Seen], names: Sequence[str]) -> Iterator[str]:
    seen = np.stack([e.pixels for e in examples]).sum(0)
    absent = [f"{name} ({label})" for label, name in enumerate(names, start=1) if not seen[label]]
    if absent:
        yield f"{len(absent)} classes are in no example: {_named(absent)}"


def _flat(examples: Sequence[Seen]) -> Iterator[str]:
    flat = [e.name for e in examples if e.flat and e.pixels[1:].any()]
    if flat:
        yield f"{len(flat)} pictures with a label have pixels of one value only: {_named(flat)}"


def _twice(examples: Sequence[Seen]) -> Iterator[str]:
    of_digest: dict[str, list[Seen]] = {}
    for example in examples:
        if not example.flat:
            of_digest.setdefault(example.digest, []).append(example)
    for same in of_digest.values():
        if len(same) > 1:
            yield f"the same picture {len(same)} times: {_named([e.name for e in same])}"


def _odd(what: str, of_name: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Names whose size or orientation is not what nearly all have."""
    if not of_name:
        return
    (usual, count), *rare = Counter(value for _, value in of_name).most_common()
    if count < (1 - _FEW) * len(of_name):
        if what == "orientation" and rare:
            kinds = ", ".join(f"{value} ({n})" for value, n in [(usual, count), *rare])
            yield f"volumes lie in different orientations: {kinds}"
        return
    for value, _ in rare:
        names = [name for name, own in of_name if own == value]
        yield f"{len(names)} have the {what} {value}, nearly all {usual}: {_named(names)}"


def _across(scans: Sequence[dict[str, Any]], dataset: Any) -> Iterator[str]:
    """Volumes whose thick axis is not the one that is sliced."""
    axis = dataset.axis if isinstance(dataset, Slices) else None
    other = [scan["name"] for scan in scans if axis is not None and scan["axis"] != axis]
    if other:
        yield f"{len(other)} volumes look sliced across another axis than {axis}: {_named(other)}"


def _leaks(examples: Sequence[Seen], split: str, others: Sequence[Seen]) -> Iterator[str]:
    digests = {other.digest: other.name for other in others if not other.flat}
    same = [f"{e.name} = {digests[e.digest]}" for e in examples if e.digest in digests]
    if same:
        yield f"leak: {len(same)} pictures are in the split {split!r} too: {_named(same)}"
    patients = sorted({e.patient for e in examples} & {other.patient for other in others})
    if patients:
        yield f"leak: {len(patients)} patients are in the split {split!r} too: {_named(patients)}"
