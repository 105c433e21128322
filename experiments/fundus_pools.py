"""SAM2LoRA's two pools of fundus data sets: where each lies, what it is split into, all as one.

As in the released code (sayanmndl21/SAM2LoRA, ``dataloader``): five sets of vessels and six of
optic discs, each pool trained on jointly and tested set by set.  IDRiD has a reader there, and is
in no pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from samjax.data import SegmentationDataset, Subset
from samjax.data.datasets import READERS
from samjax.data.datasets.base import Pictures, wrong_tree
from samjax.data.layouts import fundus, fundus_disc
from samjax.data.opening import class_names_of
from samjax.data.subsets import patients_of


class Opened(NamedTuple):
    """A data set's parts, and what is to be said of them in a record."""

    train: SegmentationDataset
    test: SegmentationDataset
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FundusSet:
    """A data set that SAM2LoRA's code reads, with its split."""

    title: str  # in the tables
    reader: str
    folders: tuple[str, ...]  # below --data; the first is that of the released code
    write: Callable[[Path], object]  # phantoms in its layout
    joins: tuple[str, str] | None = None
    """The reader's argument that joins two observers, and the files of the second."""
    targeted: bool = False  # whether it has disc and cup

    def root(self, data: Path, alone: bool) -> Path:
        """Its folder below ``data``, or ``data`` itself where it is the only set.

        Raises ``DataError`` with the expected tree if there is none.
        """
        for folder in self.folders:
            if (data / folder).is_dir():
                return data / folder
        if alone:
            return data
        tree = import_module(f"samjax.data.datasets.{self.reader}").TREE
        raise wrong_tree(data, f"folder {' or '.join(self.folders)} of {self.title}", tree)

    def open(self, data: Path, target: str, *, alone: bool = False) -> Opened:
        """Its parts, labelled by both observers wherever there are two, as SAM2LoRA labels them.

        Raises ``DataError`` for another tree, or missing files.
        """
        root = self.root(data, alone)
        parts: list[Pictures] = []
        notes: list[str] = []
        for split in ("train", "test"):
            options: dict[str, Any] = {"target": target} if self.targeted else {}
            if self.joins is not None:
                argument, second = self.joins
                there = any(root.glob(second))
                options[argument] = "either" if there else "first"
                if not there:
                    notes.append(f"{self.title}: one observer, there is no {second}")
            found = READERS[self.reader](root, split, **options)
            found.check()
            assert isinstance(found, Pictures)
            parts.append(found)
        train, test = parts
        return Opened(train, test, tuple(dict.fromkeys(notes)))


_first = partial(partial, full=False)  # of sets whose split is the authors', three pictures do

SETS = {
    "chasedb1": FundusSet(
        title="CHASEDB1",
        reader="chasedb1",
        folders=("CHASEDB1/CHASEDB1", "CHASEDB1", "chase_db1"),
        write=fundus.write_chasedb1,
        joins=("observer", "**/Image_*_2ndHO.png"),
    ),
    "drive": FundusSet(
        title="DRIVE",
        reader="drive",
        folders=("DRIVE",),
        write=_first(fundus.write_drive, test_labels=True),
        joins=("observer", "test/2nd_manual/*"),
    ),
    "fives": FundusSet(
        title="FIVES", reader="fives", folders=("FIVES",), write=_first(fundus.write_fives)
    ),
    "hrf": FundusSet(title="HRF", reader="hrf", folders=("HRF",), write=fundus.write_hrf),
    "stare": FundusSet(
        title="STARE",
        reader="stare",
        folders=("STARE",),
        write=fundus.write_stare,
        joins=("observer", "labels-vk/*"),
    ),
    "drishti_gs": FundusSet(
        title="DRISHTI-GS",
        reader="drishti_gs",
        folders=("DRISHTI-GS",),
        write=_first(fundus_disc.write_drishti_gs),
        targeted=True,
    ),
    "g1020": FundusSet(
        title="G1020",
        reader="g1020",
        folders=("G1020",),
        write=fundus_disc.write_g1020,
        targeted=True,
    ),
    "grape": FundusSet(
        title="GRAPE",
        reader="grape",
        folders=("GRAPE",),
        write=fundus_disc.write_grape,
        targeted=True,
    ),
    "origa": FundusSet(
        title="ORIGA",
        reader="origa",
        folders=("ORIGA",),
        write=fundus_disc.write_origa,
        targeted=True,
    ),
    "papila": FundusSet(
        title="PAPILA",
        reader="papila",
        folders=("PapilaDB", "PAPILA"),
        write=fundus_disc.write_papila,
        joins=("expert", "ExpertsSegmentations/Contours/*_exp2.txt"),
        targeted=True,
    ),
    "refuge2": FundusSet(
        title="REFUGE2",
        reader="refuge2",
        folders=("REFUGE2",),
        write=_first(fundus_disc.write_refuge2),
        targeted=True,
    ),
    "idrid": FundusSet(
        title="IDRiD",
        reader="idrid",
        folders=("IDRID/Segmentation", "IDRID", "IDRiD", "idrid_optic_disc"),
        write=_first(fundus_disc.write_idrid),
    ),
}
_DISCS = ("drishti_gs", "g1020", "grape", "origa", "papila", "refuge2")
POOLS = {"vessel": ("chasedb1", "drive", "fives", "hrf", "stare"), "disc": _DISCS, "cup": _DISCS}
BESIDE = {"disc": ("idrid",)}  # of these classes, but in no pool: only where they are named


def chosen_sets(pool: str, sets: Sequence[str]) -> tuple[str, ...]:
    """The sets of a pool that are among ``sets``, all of the pool if that is empty.

    Raises ``ValueError`` for a pool or a set that there is not.
    """
    if pool not in POOLS:
        raise ValueError(f"pool {pool!r}: expected one of {', '.join(POOLS)}")
    if unknown := [name for name in sets if name not in SETS]:
        raise ValueError(f"data set {unknown[0]!r}: expected some of {', '.join(SETS)}")
    if not sets:
        return POOLS[pool]
    return tuple(name for name in (*POOLS[pool], *BESIDE.get(pool, ())) if name in sets)


class Joined:
    """Several data sets of the same classes as one, each example named "SET/name".

    parts: the sets by title. Patients of different sets are different ones.
    Raises ``ValueError`` if there is none, or if the classes differ.
    """

    def __init__(self, parts: Mapping[str, SegmentationDataset]) -> None:
        self.parts = dict(parts)
        classes = {title: class_names_of(part) for title, part in self.parts.items()}
        if len(set(classes.values())) != 1:
            raise ValueError(f"data sets of one and the same classes are joined, got {classes}")
        (self.class_names,) = set(classes.values())
        self._places = [(title, i) for title, part in self.parts.items() for i in range(len(part))]
        known = {title: patients_of(part) for title, part in self.parts.items()}
        self.patients = tuple(f"{title}/{known[title][place]}" for title, place in self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        title, place = self._places[index]
        example = self.parts[title][place]
        return {**example, "name": f"{title}/{example['name']}", "patient": self.patients[index]}

    @property
    def num_classes(self) -> int:
        """Classes beside the background."""
        return len(self.class_names or ("foreground",))


def joined(parts: Mapping[str, SegmentationDataset]) -> SegmentationDataset:
    """``Joined``, or the only one as it is."""
    return Joined(parts) if len(parts) != 1 else next(iter(parts.values()))


def first_of(dataset: SegmentationDataset, count: int | None) -> SegmentationDataset:
    """The first so many examples, or all for None."""
    if count is None or count >= len(dataset):
        return dataset
    return Subset(dataset, range(count))
