"""The labelled sets of slices and pictures that MedSAGa and SAMora share: which part is for what.

Each is found in a folder of its own below ``--data``, or is ``--data`` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.scoring import Score, score_as_samed, score_pictures, score_volumes
from experiments.trial import Test
from samjax.data import SegmentationDataset, Slices, split
from samjax.data.datasets import READERS, msd
from samjax.data.datasets.base import Scans
from samjax.data.datasets.promise12 import HSAM_TEST, HSAM_TRAIN
from samjax.data.intensity import Window
from samjax.data.layouts import volumes, xray

Sides = tuple[SegmentationDataset, SegmentationDataset]  # to train on, to test on
IN_VOLUMES: Mapping[str, Score] = {"": score_volumes, "(SAMed's rule)": score_as_samed}


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """A data set with its parts for training and for testing."""

    title: str  # in the tables
    folder: str
    sides: Callable[[Path], Sides]
    write: Callable[..., object]  # phantoms in its layout
    scores: Mapping[str, Score]

    def open(self, data: Path) -> tuple[SegmentationDataset, Test]:
        """Its training set and its test set; ``DataError`` for another tree, with the expected."""
        train, test = self.sides(self.root(data))
        return train, Test(name=self.title, dataset=test, scores=self.scores)

    def root(self, data: Path) -> Path:
        """Where it lies."""
        return data / self.folder if (data / self.folder).is_dir() else data


def _scans(reader: str, part: str, root: Path) -> Scans:
    return _checked(READERS[reader](root, part))


def _synapse(root: Path) -> Sides:
    if (root / "train_npz").is_dir() or (root / "test_vol_h5").is_dir():  # as SAMed prepared it
        return (
            _checked(READERS["synapse_samed"](root, "train")),
            Slices(_scans("synapse_samed", "test", root)),
        )
    return Slices(_scans("synapse", "train", root)), Slices(_scans("synapse", "test", root))


def _brats2020(root: Path) -> Sides:
    """FLAIR by MedSAGa's fixed window, slices with tumour; a fifth of the patients for tests."""
    scans = _scans("brats2020", "train", root)
    window = Window(-1506, 1727)
    slices = Slices(scans, take="foreground", modality="flair", intensity=window)
    return split(slices, 0.2, seed=0)


def _chestxray8(root: Path) -> Sides:
    train, test = (_checked(READERS["chestxray8"](root, part)) for part in ("train", "test"))
    return train, test


def labelled_msd(root: Path) -> Scans:
    """The labelled scans of a task of the Decathlon; of the hippocampus, if no file tells."""
    told = (root / "dataset.json").exists()
    found = msd(root, class_names=None if told else ("anterior", "posterior"))
    found.check()
    return found


def _msd(root: Path) -> Sides:
    """All slices, a fifth of the patients for tests."""
    return split(Slices(labelled_msd(root)), 0.2, seed=0)


def _la2018(root: Path) -> Sides:
    """H-SAM's: the slices with atrium of 4 scans, and 20 scans."""
    train = Slices(_scans("la2018", "hsam4", root), take="foreground")
    return train, Slices(_scans("la2018", "test", root))


def _promise12(root: Path) -> Sides:
    """H-SAM's: the slices with prostate of 3 scans, and 10 scans."""
    train = Slices(_scans("promise12", "hsam3", root), take="foreground")
    return train, Slices(_scans("promise12", "hsam3_test", root))


_OF_HSAM = [int(name.removeprefix("Case")) for name in (*HSAM_TRAIN, *HSAM_TEST)]


def _checked(found: Any) -> Any:
    found.check()
    return found


SETS = {
    "synapse": LabelledSet(
        title="Synapse",
        folder="Synapse",
        sides=_synapse,
        write=volumes.write_synapse_samed,
        scores=IN_VOLUMES,
    ),
    "brats2020": LabelledSet(
        title="BraTS 2020",
        folder="BraTS2020",
        sides=_brats2020,
        write=volumes.write_brats2020,
        scores=IN_VOLUMES,
    ),
    "chestxray8": LabelledSet(
        title="ChestX-ray8",
        folder="ChestX-ray8",
        sides=_chestxray8,
        write=xray.write_chestxray8,
        scores={"": score_pictures},
    ),
    "msd": LabelledSet(
        title="MSD hippocampus",
        folder="Task04_Hippocampus",
        sides=_msd,
        write=volumes.write_msd,
        scores=IN_VOLUMES,
    ),
    "la2018": LabelledSet(
        title="LA",
        folder="LA2018",
        sides=_la2018,
        write=volumes.write_la2018,
        scores=IN_VOLUMES,
    ),
    "promise12": LabelledSet(
        title="PROMISE12",
        folder="PROMISE12",
        sides=_promise12,
        write=partial(volumes.write_promise12, cases=_OF_HSAM),
        scores=IN_VOLUMES,
    ),
}


def check_names(arguments: object, *options: str) -> None:
    """Raises ``ValueError`` if one of these options names something that is none of ``SETS``."""
    for option in options:
        if unknown := [name for name in getattr(arguments, option) if name not in SETS]:
            shown, known = option.replace("_", "-"), ", ".join(SETS)
            raise ValueError(f"--{shown} {' '.join(unknown)}: expected some of {known}")
