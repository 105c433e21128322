"""What a reader returns: pictures or scans on disk with their label maps, by index.

A reader is a function `(root, split, …) -> Pictures` or `-> Scans`, one file a data set. It looks
at file names only, so it is fast; a file is read when its example is asked for, and `check` looks
for every file beforehand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from samjax.data.images import DataError, check_sizes, read_image
from samjax.data.intensity import Intensity, Percentiles
from samjax.data.volumes import Volume, read_volume, volume_shape

Item = TypeVar("Item")
_MR = Percentiles()
_SHOWN = 12  # entries of a folder named in an error


@dataclass(frozen=True)
class Case:
    """One example on disk.

    Attributes:
        name: unique in the data set.
        images: its files, one a modality.
        labels: the files that its label map is read from; none where it is not labelled.
        patient: examples of one patient must not be parted between training and test; "" is a
            patient of the example's own name.
    """

    name: str
    images: tuple[Path, ...]
    labels: tuple[Path, ...] = ()
    patient: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """What `Pictures` and `Scans` share.

    Attributes:
        dataset: its name, as in `samjax.data.datasets.READERS`.
        root: the folder that was given.
        split: the part of it, such as "train".
        cases: the examples, in their order.
        class_names: label i + 1 is the class class_names[i]; 0 is the background.
    """

    dataset: str
    root: Path
    split: str
    cases: tuple[Case, ...]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.cases:
            raise DataError(f"{self.root}: no examples in the split {self.split!r}")
        (name, times), *_ = Counter(self.names).most_common(1)
        if times > 1:
            raise DataError(f"{self.root}: {times} examples have the name {name}")

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def num_classes(self) -> int:
        """Number of classes beside the background."""
        return len(self.class_names)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each example."""
        return tuple(case.name for case in self.cases)

    @property
    def patients(self) -> tuple[str, ...]:
        """Patient of each example."""
        return tuple(case.patient or case.name for case in self.cases)

    def check(self) -> None:
        """Looks whether every file is there.

        Raises:
            DataError: with every file that is missing.
        """
        files = dict.fromkeys(f for case in self.cases for f in case.images + case.labels)
        missing = [file for file in files if not file.exists()]
        if missing:
            raise DataError(
                f"{self.root}: {len(missing)} files of the {self.dataset} data set are missing:\n  "
                + "\n  ".join(str(file) for file in missing)
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures(Source):
    """Pictures with label maps; a `SegmentationDataset`.

    Attributes:
        read_label: (case, (h, w) of its picture) -> label map uint8 (h, w); a function of a module
            or a partial of one, because worker processes must be able to import it. Not called for
            a case without labels, whose map is all background.
        read_picture: file -> uint8 (h, w, 3) RGB.
    """

    read_label: Callable[[Case, tuple[int, int]], np.ndarray]
    read_picture: Callable[[Path], np.ndarray] = read_image

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Image uint8 (h, w, 3) RGB, mask uint8 (h, w) labels 0..k, name, patient.

        Raises:
            DataError: a file is missing or cannot be used, or the sizes differ.
        """
        case = self.cases[index]
        image = self.read_picture(case.images[0])
        size = (image.shape[0], image.shape[1])
        mask = self.read_label(case, size) if case.labels else np.zeros(size, np.uint8)
        if case.labels:
            check_sizes(case.images[0], size, case.labels[0], mask.shape)
        return {
            "image": image,
            "mask": mask,
            "name": case.name,
            "patient": case.patient or case.name,
        }


@dataclass(frozen=True, eq=False)
class Scan:
    """A case in memory: one volume a modality on one grid, and labels uint8 (i, j, k) on it."""

    name: str
    volumes: tuple[Volume, ...]
    label: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Scans(Source):
    """Volumes with label maps; `samjax.data.Slices` makes examples of them.

    Attributes:
        modalities: their names; a case has one image file for each.
        values: the stored value of the classes → label, where 0 is the background and any other
            stored value an error; None where the stored values are the labels 0..k themselves.
        intensity: what makes grey values in 0..1 of this data set's units, by default.
        axis: the voxel axis across the slices; None for `through_plane_axis` of each volume.
        read: file -> Volume, for images and labels.
        shape: file -> (i, j, k), from its header.
    """

    modalities: tuple[str, ...] = ("image",)
    values: Mapping[int, int] | None = None
    intensity: Intensity = _MR
    axis: int | None = 2
    read: Callable[[Path], Volume] = read_volume
    shape: Callable[[Path], tuple[int, int, int]] = volume_shape

    def __post_init__(self) -> None:
        super().__post_init__()
        for case in self.cases:
            if len(case.images) != len(self.modalities):
                raise DataError(
                    f"{self.root}: {case.name} has {len(case.images)} images, expected one for "
                    f"each of {', '.join(self.modalities)}"
                )

    def __getitem__(self, index: int, /) -> Scan:
        """Reads all modalities and the labels.

        Raises:
            DataError: a file is missing or cannot be used; shapes or affines that differ, labels
                that are not of these classes.
        """
        volumes = self.volumes(index, range(len(self.modalities)))
        return Scan(self.cases[index].name, volumes, self.label(index, volumes[0]))

    def volumes(self, index: int, modalities: Iterable[int]) -> tuple[Volume, ...]:
        """Some modalities of a case, in the files' units; ``DataError`` unless on one grid."""
        files = [self.cases[index].images[modality] for modality in modalities]
        volumes = tuple(self._read(file) for file in files)
        for file, volume in zip(files, volumes, strict=True):
            _check_grid(file, volume, files[0], volumes[0])
        return volumes

    def volume(self, index: int, modality: int = 0) -> Volume:
        """One modality of a case, in the file's units."""
        return self._read(self.cases[index].images[modality])

    def label(self, index: int, like: Volume | None = None) -> np.ndarray:
        """Label map of a case, uint8 (i, j, k); all background where it has none.

        Args:
            like: the volume whose grid it must have; None does not look at any.
        """
        case = self.cases[index]
        if not case.labels:
            return np.zeros(self.shape_of(index) if like is None else like.array.shape, np.uint8)
        (file,) = case.labels
        volume = self._read(file)
        if like is not None:
            _check_grid(file, volume, case.images[0], like)
        return to_labels(volume.array, file, self.class_names, self.values)

    def shape_of(self, index: int) -> tuple[int, int, int]:
        """(i, j, k) of a case, from its header."""
        return self.shape(self._there(self.cases[index].images[0]))

    def _read(self, file: Path) -> Volume:
        return self.read(self._there(file))

    def _there(self, file: Path) -> Path:
        if not file.exists():
            raise DataError(f"{file}: no such file; expected by the {self.dataset} data set")
        return file


def to_labels(
    stored: np.ndarray,
    file: Path,
    class_names: Sequence[str],
    values: Mapping[int, int] | None = None,
) -> np.ndarray:
    """Labels uint8 of stored values (integers, or floats that are whole).

    Args:
        values: stored value → label; None for labels that are stored as they are.

    Raises:
        DataError: another value, named with the file.
    """
    if values is None:
        values = {label: label for label in range(1, len(class_names) + 1)}
    labels = np.zeros(stored.shape, np.uint8)
    known = stored == 0
    for value, label in values.items():
        found = stored == value
        labels[found] = label
        known |= found
    if not known.all():
        unknown = np.unique(stored[~known]).tolist()
        raise DataError(
            f"{file}: values {', '.join(f'{v:g}' for v in unknown[:8])} are no class; expected 0 "
            f"and {', '.join(str(value) for value in values)} ({', '.join(class_names)})"
        )
    return labels


def _check_grid(file: Path, volume: Volume, other_file: Path, other: Volume) -> None:
    if volume.array.shape != other.array.shape:
        raise DataError(
            f"{file}: {volume.array.shape} voxels, but {other_file} has {other.array.shape}; "
            "expected one grid"
        )
    off = np.abs(volume.affine - other.affine)[:3]
    allowed = 1e-2 * min(other.spacing)  # headers round; the far corner moves by less than this
    reach = np.array([*other.array.shape, 1.0])
    if (off @ reach).max() > max(allowed, 0.05):
        raise DataError(
            f"{file}: its affine {volume.affine[:3].round(4).tolist()} is not that of "
            f"{other_file}, {other.affine[:3].round(4).tolist()}; expected one grid"
        )


def find_files(root: Path, pattern: str, tree: str) -> list[Path]:
    """The files of a glob pattern below ``root``, by name whatever the case of its letters.

    That is the order in which the authors' own scripts, run on Windows, saw them.

    Raises:
        DataError: there is none; with the expected ``tree`` and what was found.
    """
    files = [file for file in root.glob(pattern) if not file.name.startswith(".")]
    if not files:
        raise wrong_tree(root, pattern, tree)
    return sorted(files, key=lambda file: (file.name.lower(), file.as_posix()))


def wrong_tree(root: Path, wanted: str, tree: str) -> DataError:
    """The error of a folder that is not what a reader expects."""
    if not root.is_dir():
        found = "no such folder"
    else:
        names = sorted(f.name + "/" * f.is_dir() for f in root.iterdir())
        more = ", …" if len(names) > _SHOWN else ""
        found = f"found there: {', '.join(names[:_SHOWN]) or 'nothing'}{more}"
    indented = "    " + tree.strip("\n ")
    return DataError(f"{root}: no {wanted} ({found}); expected\n{indented}")


def drawn_split(
    items: Sequence[Item], split: str, test_size: float, *, total: int, root: Path, seed: int = 0
) -> list[Item]:
    """The part "train", "test" or "all" of a split drawn as scikit-learn's `train_test_split`.

    Such a split is drawn from the whole data set, so a partial copy would change it.

    Args:
        test_size: share of the items that becomes the test set, rounded up.
        total: number of items that the data set has.
        seed: scikit-learn's `random_state`.

    Raises:
        DataError: another number of items. ValueError: another split.
    """
    one_of("split", split, ("train", "test", "all"))
    if len(items) != total:
        raise DataError(
            f"{root}: {len(items)} examples; expected all {total}, since the split is drawn from "
            "the whole data set"
        )
    if split == "all":
        return list(items)
    order = np.random.RandomState(seed).permutation(total)
    num_test = int(np.ceil(test_size * total))
    chosen = order[:num_test] if split == "test" else order[num_test:]
    return [items[index] for index in chosen]


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """``ValueError`` unless ``value`` is among ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(allowed)}")
