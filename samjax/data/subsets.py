"""What a data set is to the pipeline, and parts of one: subsets, splits, few shots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from samjax.atomic import atomic_write
from samjax.data.images import DataError

Found = TypeVar("Found")


class SegmentationDataset(Protocol):
    """What the pipeline reads from: anything with a length and examples by index.

    An example is `{"image": uint8 (h, w, 3) RGB, "mask": uint8 (h, w), "name": str}`; the mask is
    a label map with 0 for the background and 1..k for the classes. A data set that knows its
    patients has a list `patients` with one for each example.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def is_pair(image: np.ndarray, mask: np.ndarray) -> bool:
    """Whether two arrays are an example's: uint8 (h, w, 3) and uint8 (h, w), not empty."""
    uint8 = image.dtype == mask.dtype == np.uint8
    return uint8 and mask.ndim == 2 and mask.size > 0 and image.shape == (*mask.shape, 3)


def in_threads(
    function: Callable[[int], Found], count: int, title: str, *, threads: int = 4, progress: bool
) -> list[Found]:
    """The answers for the numbers up to ``count``, in order, with a progress bar."""
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(function, range(count))
        return list(tqdm(found, title, count, disable=not progress))


def patients_of(dataset: SegmentationDataset) -> tuple[str, ...]:
    """The patient of each example; where the data set knows none, each is one's own."""
    known = getattr(dataset, "patients", None)
    return tuple(str(i) for i in range(len(dataset))) if known is None else tuple(known)


class Subset:
    """Some examples of a data set, in the given order."""

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = tuple(int(index) for index in indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return self.dataset[self.indices[index]]

    @property
    def num_classes(self) -> int:
        """Classes beside the background; 1 where the data set does not say."""
        return getattr(self.dataset, "num_classes", 1)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Label i + 1 is the i-th of these; None where the data set does not say."""
        return getattr(self.dataset, "class_names", None)

    @property
    def names(self) -> tuple[str, ...] | None:
        """Name of each example; None where the data set does not say."""
        known = getattr(self.dataset, "names", None)
        return None if known is None else tuple(known[index] for index in self.indices)

    @property
    def patients(self) -> tuple[str, ...]:
        """Patient of each example."""
        known = patients_of(self.dataset)
        return tuple(known[index] for index in self.indices)


def split(dataset: SegmentationDataset, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Splits a data set at random into a training and a validation part.

    The parts are disjoint and depend on length, fraction, seed and patients only. All examples of
    a patient go to one side, where the data set knows its patients; the fraction is then one of
    patients.

    Args:
        dataset: examples of at least two patients.
        fraction: that becomes validation, between 0 and 1; at least one goes to each side.
        seed: of the draw.

    Returns:
        (training, validation)

    Raises:
        ValueError: `fraction` outside (0, 1), or fewer than two examples or patients.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"validation fraction {fraction}: expected between 0 and 1, both excluded")
    if len(dataset) < 2:
        raise ValueError(f"a split needs at least 2 examples, the data set has {len(dataset)}")
    of_example = patients_of(dataset)
    patients = list(dict.fromkeys(of_example))
    count = len(patients)
    if count < 2:
        raise ValueError(f"a split needs at least 2 patients, all examples are of {patients[0]}")
    held_out = min(max(round(count * fraction), 1), count - 1)
    order = np.random.default_rng(seed).permutation(count).tolist()
    away = {patients[index] for index in order[:held_out]}
    sides = ([], [])
    for index, patient in enumerate(of_example):
        sides[patient in away].append(index)
    return Subset(dataset, sides[0]), Subset(dataset, sides[1])


def few_shot(dataset: SegmentationDataset, count: int, seed: int = 0) -> Subset:
    """``count`` examples drawn at random, nested: those of 50 are among those of 100.

    Raises ``ValueError`` unless there are so many.
    """
    if not 1 <= count <= len(dataset):
        raise ValueError(f"{count} examples: expected 1 to {len(dataset)}, which the data set has")
    order = np.random.default_rng(seed).permutation(len(dataset))
    return Subset(dataset, sorted(order[:count].tolist()))


def without_bad(
    dataset: SegmentationDataset, list_file: str | Path, *, threads: int = 4, progress: bool = True
) -> Subset:
    """Reads every example once and leaves out those that cannot be used.

    Args:
        list_file: gets a line for each example that was left out: its number, a tab, and why. It
            is written, empty, where all can be used.

    Raises:
        DataError: none can be used.
    """

    def problem(index: int) -> str | None:
        try:
            dataset[index]
        except DataError as error:
            return " ".join(str(error).split())
        return None

    problems = in_threads(problem, len(dataset), "checking", threads=threads, progress=progress)
    with atomic_write(list_file) as temporary:
        lines = [f"{index}\t{why}\n" for index, why in enumerate(problems) if why]
        temporary.write_text("".join(lines), "utf-8")
    good = [index for index, why in enumerate(problems) if not why]
    if not good:
        raise DataError(f"none of {len(dataset)} examples can be used; the reasons: {list_file}")
    return Subset(dataset, good)
