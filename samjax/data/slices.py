"""Slices of volumes as examples: which ones, how they become pictures."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from samjax.data.datasets.base import Scans
from samjax.data.images import DataError
from samjax.data.intensity import Intensity
from samjax.data.subsets import in_threads
from samjax.data.volumes import through_plane_axis

Take = Literal["all", "foreground", "largest", "middle", "random"]
Crop = tuple[tuple[int, int], tuple[int, int]]
_FEW = 20  # cases whose labels are read without a progress bar


class Place(NamedTuple):
    """Where an example comes from."""

    case: int  # position in the scans
    slice: int  # along the axis
    modality: tuple[int, ...]  # one, or three for R, G and B


class Slices:
    """A `SegmentationDataset` of the slices of volumes.

    A picture's rows and columns are the two voxel axes beside the slice axis. Grey values come
    from the whole volume, by the data set's intensity rule, as 0..255.

    Examples are in order of case, slice, modality; `places` says where each comes from, so that
    predictions can be stacked again.

    Args:
        scans: the volumes.
        take: "all" slices; those with any "foreground"; of each case the "largest" (most
            foreground voxels: SAMSEG's max-slice) or the "middle" one of those with foreground (of
            all where it has none); or `count` of those with foreground at "random" (of all where
            it has none).
        every: of what is taken, only every so-many-th slice of a case, from the first.
        count: for "random", slices a case.
        seed: for "random".
        axis: voxel axis across the slices; None for the data set's, or where that says nothing
            each volume's own (`through_plane_axis`).
        modality: the name of one; "each" makes an example of every one; three names joined by a
            comma become red, green and blue.
        intensity: units to grey values; None for the data set's rule.
        crop: ((first, end), (first, end)) voxels of the two axes beside the slice axis.
        rows: whether the first or the second of these two axes runs down the picture. "second" is
            how SAMed and everyone who reads NIfTI by [z, y, x] sees it, "first" SAMSEG.
        keep: volumes kept in memory, in grey values of 8 bits. The pipeline's own cache holds the
            slices after that; without one, a shuffled order decodes a volume for every slice.
        progress: a bar while labels are read, which all but `take="all"` needs.

    Raises:
        ValueError: an argument out of its range.
        DataError: no slice is left; labels that cannot be read.
    """

    def __init__(
        self,
        scans: Scans,
        *,
        take: Take = "all",
        every: int = 1,
        count: int = 1,
        seed: int = 0,
        axis: int | None = None,
        modality: str = "each",
        intensity: Intensity | None = None,
        crop: Crop | None = None,
        rows: Literal["first", "second"] = "second",
        keep: int = 4,
        progress: bool = True,
    ) -> None:
        if take not in get_args(Take) or rows not in ("first", "second"):
            raise ValueError(
                f"take {take!r}, rows {rows!r}: expected one of {', '.join(get_args(Take))}, and "
                "first or second"
            )
        if every < 1 or count < 1 or keep < 1 or axis not in (None, 0, 1, 2):
            raise ValueError(
                f"every {every}, count {count}, keep {keep}, axis {axis}: expected at least 1, "
                "and an axis 0, 1 or 2"
            )
        self.scans = scans
        self.intensity = intensity or scans.intensity
        self.crop = crop
        self.rows = rows
        self.axis = scans.axis if axis is None else axis
        self._keep = keep
        self._start()
        channels = _channels(modality, scans.modalities)
        self._channels = len(channels)
        choose = _Chooser(take, every, count, seed)
        chosen = self._choose(choose, progress)
        self.places = tuple(
            Place(case, number, channel)
            for case, numbers in enumerate(chosen)
            for number in numbers
            for channel in channels
        )
        if not self.places:
            raise DataError(f"{scans.root}: no slice is left of {len(scans)} cases by {take!r}")

    def __len__(self) -> int:
        return len(self.places)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Label i + 1 is the class class_names[i]."""
        return self.scans.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes beside the background."""
        return self.scans.num_classes

    @property
    def patients(self) -> tuple[str, ...]:
        """Patient of each slice."""
        of_case = self.scans.patients
        return tuple(of_case[place.case] for place in self.places)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each slice: the case's, the slice's number, the modality where there are more."""
        return tuple(self._name(place) for place in self.places)

    def spacing_of(self, case: int) -> tuple[float, float, float]:
        """Of a volume in mm: between its slices, then along rows and columns of a picture."""
        volume = self.scans.volume(case)
        axis = through_plane_axis(volume) if self.axis is None else self.axis
        first, second = (volume.spacing[other] for other in range(3) if other != axis)
        beside = (first, second) if self.rows == "first" else (second, first)
        return (volume.spacing[axis], *beside)

    def check(self) -> None:
        """Looks whether every file is there; raises ``DataError`` with all that are missing."""
        self.scans.check()

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Image uint8 (h, w, 3), mask uint8 (h, w) labels, name, patient.

        Raises:
            DataError: a file cannot be used.
        """
        place = self.places[index]
        arrays = self._arrays(place.case, place.modality)
        *grey, mask = (self._picture(array, place) for array in arrays)
        return {
            "image": np.stack(grey if len(grey) == 3 else grey * 3, axis=-1),
            "mask": np.ascontiguousarray(mask),
            "name": self._name(place),
            "patient": self.scans.patients[place.case],
        }

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes start without volumes: sending them costs more than reading.
        return {k: v for k, v in self.__dict__.items() if k not in ("_kept", "_lock", "_reading")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._kept: OrderedDict[tuple, tuple[np.ndarray, ...]] = OrderedDict()
        self._lock = threading.Lock()
        self._reading = [threading.Lock() for _ in range(16)]

    def _name(self, place: Place) -> str:
        name = f"{self.scans.cases[place.case].name}_slice{place.slice:03d}"
        if self._channels == 1:
            return name
        return f"{name}_{self.scans.modalities[place.modality[0]]}"

    def _picture(self, volume: np.ndarray, place: Place) -> np.ndarray:
        """A slice (h, w) of a volume (t, first, second)."""
        if not 0 <= place.slice < len(volume):
            name = self.scans.cases[place.case].name
            raise DataError(f"{name}: slice {place.slice} of {len(volume)}")
        picture = volume[place.slice]
        if self.crop is not None:
            (top, bottom), (left, right) = self.crop
            if bottom > picture.shape[0] or right > picture.shape[1]:
                name = self.scans.cases[place.case].name
                raise DataError(f"{name}: slices of {picture.shape} voxels; crop {self.crop}")
            picture = picture[top:bottom, left:right]
        return picture if self.rows == "first" else picture.T

    def _arrays(self, case: int, modalities: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        """Grey values of the modalities, then labels; uint8 (t, first, second)."""
        key = (case, modalities)
        # Threads that want slices of one volume at the same moment must not all decode it.
        with self._reading[hash(key) % len(self._reading)]:
            with self._lock:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key]
            arrays = self._read(case, modalities)
            with self._lock:
                self._kept[key] = arrays
                while len(self._kept) > self._keep * self._channels:
                    self._kept.popitem(last=False)
        return arrays

    def _read(self, case: int, modalities: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        volumes = self.scans.volumes(case, modalities)
        axis = through_plane_axis(volumes[0]) if self.axis is None else self.axis
        arrays = []
        for modality, volume in zip(modalities, volumes, strict=True):
            try:
                grey = self.intensity(volume.array)
            except DataError as error:
                file = self.scans.cases[case].images[modality]
                raise DataError(f"{file}: {error}") from error
            arrays.append(np.rint(np.clip(grey, 0, 1) * 255).astype(np.uint8))
        arrays.append(self.scans.label(case, volumes[0]))
        return tuple(np.ascontiguousarray(np.moveaxis(array, axis, 0)) for array in arrays)

    def _choose(self, choose: _Chooser, progress: bool) -> list[list[int]]:
        """The slices of each case."""

        def slices_of(case: int) -> list[int]:
            if choose.take == "all" and self.axis is not None:
                return choose(case, np.ones(self.scans.shape_of(case)[self.axis], np.int64))
            axis = self.axis
            if axis is None:
                axis = through_plane_axis(self.scans.volume(case))
            beside = tuple(other for other in range(3) if other != axis)
            return choose(case, np.count_nonzero(self.scans.label(case), axis=beside))

        shown = progress and choose.take != "all" and len(self.scans) > _FEW
        return in_threads(slices_of, len(self.scans), "labels", progress=shown)


class _Chooser(NamedTuple):
    take: Take
    every: int
    count: int
    seed: int

    def __call__(self, case: int, foreground: np.ndarray) -> list[int]:
        """Slices of a case by the number of foreground voxels (t,) of each."""
        everywhere = np.arange(len(foreground))
        filled = np.flatnonzero(foreground)
        candidates = filled if len(filled) else everywhere
        chosen: Callable[[], np.ndarray] = {
            "all": lambda: everywhere,
            "foreground": lambda: filled,
            "largest": lambda: np.array([int(foreground.argmax())]) if len(filled) else filled,
            "middle": lambda: candidates[[len(candidates) // 2]],
            "random": lambda: np.sort(
                np.random.default_rng((self.seed, case)).permutation(candidates)[: self.count]
            ),
        }[self.take]
        return chosen()[:: self.every].tolist()


def _channels(modality: str, names: tuple[str, ...]) -> list[tuple[int, ...]]:
    """What becomes the channels of the examples of one slice."""
    wanted = names if modality == "each" else tuple(modality.split(","))
    unknown = [name for name in wanted if name not in names]
    if unknown or (modality != "each" and len(wanted) not in (1, 3)):
        raise ValueError(
            f"modality {modality!r}: expected each, one of {', '.join(names)}, or three of them "
            "for red, green and blue"
        )
    indices = [names.index(name) for name in wanted]
    return [tuple(indices)] if modality != "each" and len(wanted) == 3 else [(i,) for i in indices]
