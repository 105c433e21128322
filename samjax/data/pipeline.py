"""From a data set to batches: resize, augment, prompt, pad, batch, with Grain.

Every example of the endless stream has a number, and everything random about it comes from the
seed and that number. Hence the batch of a step is the same whatever the number of threads, worker
processes or hosts, and a run resumes at any step without stored state. Each epoch has its own
order, augmentation and prompts.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, get_args

import grain
import numpy as np
from absl import flags

from samjax.data.images import DataError
from samjax.data.prompts import as_jitter, as_modes, num_slots, sample_prompt
from samjax.data.regions import as_region
from samjax.data.subsets import SegmentationDataset, is_pair
from samjax.data.transforms import Augment, Augmentation
from samjax.frame import Fit, pad_to_frame, resize, size_in_frame
from samjax.prompt_labels import INVALID

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Loader:
    """Batches that can be gone through again and again, each time from the same first one.

    A batch is a dict of numpy arrays, b the batch size of this process and n the prompt slots:

        image          uint8 (b, h, w, 3)   RGB in the frame, zeros below and right of the picture
        mask           uint8 (b, h, w)      labels 0..k in the frame, 0 in the padding
        size           int32 (b, 2)         (h, w) of the picture in the frame, without padding;
                                            the frame's own where pictures are stretched to it
        original_size  int32 (b, 2)         (h, w) in the file
        coords         float32 (b, n, 2)    prompts: (x, y) in pixels of the frame
        labels         int32 (b, n)         prompts: 1, 0, 2, 3, -1, or -2 for no prompt
        index          int32 (b,)           position in the data set, -1 where not valid
        valid          bool (b,)            False for rows that only fill up the last batch

    Attributes:
        num_examples: length of the data set.
        num_batches: batches from `start_step` to the end; None without an end.
    """

    num_examples: int
    num_batches: int | None
    _batches: grain.IterDataset

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches; its threads or processes end with the iteration."""
        batches = iter(self._batches)
        try:
            yield from batches
        finally:
            batches.close()


def make_loader(
    dataset: SegmentationDataset,
    *,
    frame_size: tuple[int, int],
    fit: Fit = "pad",
    batch_size: int,
    seed: int = 0,
    shuffle: bool = False,
    augment: Augmentation | None = None,
    prompt_modes: str | Sequence[str] = "none",
    num_points: int = 1,
    num_negatives: int = 0,
    box_jitter: float | None = None,
    region: str = "foreground",
    box_rule: str = "sides",
    slots: int | None = None,
    num_epochs: int | None = 1,
    drop_remainder: bool = False,
    start_step: int = 0,
    threads: int | None = None,
    workers: int = 0,
    cache: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> Loader:
    """Makes the loader of a training or an evaluation set.

    Batches run on over the end of an epoch, so no example is ever left out before the last epoch.
    There the last batch is filled up with rows that are not `valid` (evaluation), or left out
    with `drop_remainder` (training). Prompts are drawn for the union of the classes.

    Args:
        dataset: see `SegmentationDataset`.
        frame_size: (h, w) of the model's input in pixels.
        fit: "pad" keeps the aspect and pads, as SAM wants it; "stretch" does not, as SAM 2 wants
            it (whose predictor stretches in floating point: pixels differ by up to 0.5).
        batch_size: rows in a batch, of all hosts together.
        seed: of order, augmentation and prompts, 0 to 2^32 - 1.
        shuffle: a new order each epoch; otherwise that of the data set.
        augment: see `Augment` and `paper_augment`, or anything of that form; None for none.
        prompt_modes, num_points, num_negatives, box_jitter, region, box_rule: see `sample_prompt`.
            Of several modes one is drawn for each example.
        slots: prompt slots of every example, if more than these modes need: a model compiled for
            as many then serves all modes.
        num_epochs: None never ends.
        drop_remainder: see above.
        start_step: number of batches to skip, without computing them.
        threads: that make batches ahead, in this process. By default half of the processor's
            cores, at most 8: decoding must not take the cores from the computation.
        workers: processes to make the batches in, instead of the threads. Worth it where many
            cores decode large images; each takes seconds to start. The script needs an
            `if __name__ == "__main__":` guard.
        cache: keep every resized example in memory, 4 bytes a pixel of it (decoding a 12-megapixel
            JPEG takes about 0.2 s). Each worker process has its own.
        process_index, process_count: this host's number and the number of hosts. Each gets
            `batch_size / process_count` rows of every batch.

    Raises:
        ValueError: an argument out of its range, an empty data set, or no whole batch in it;
            (when iterated) an augmentation that makes something else than `Augmentation` says.
        DataError: (when iterated) an example that cannot be used.
    """
    modes = as_modes(prompt_modes)
    needed = num_slots(modes, num_points, num_negatives)
    slots = needed if slots is None else slots
    if slots < needed:
        raise ValueError(f"slots {slots}: {', '.join(modes)} need {needed}")
    prompt = partial(
        sample_prompt,
        mode=modes,
        num_points=num_points,
        num_negatives=num_negatives,
        box_jitter=as_jitter(box_jitter, box_rule),
        region=as_region(region),
        box_rule=box_rule,
    )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed}: expected 0 to 2^32 - 1")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count} processes")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size}: expected a positive multiple of the {process_count} hosts"
        )
    if (
        min(frame_size) < 1
        or start_step < 0
        or workers < 0
        or (threads is not None and threads < 0)
    ):
        raise ValueError(
            f"frame_size {frame_size}, start_step {start_step}, workers {workers}, threads "
            f"{threads}: expected a positive size and no negative number"
        )
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs {num_epochs}: expected at least 1, or None for no end")
    if fit not in get_args(Fit):
        raise ValueError(f"fit {fit!r}: expected one of {', '.join(get_args(Fit))}")
    if not len(dataset):
        raise ValueError("the data set is empty")

    positions = grain.MapDataset.range(len(dataset)).seed(seed).repeat(num_epochs)
    if shuffle:
        positions = positions.map_with_index(_Shuffled(len(dataset), seed))
    examples = positions.map(_ResizedExamples(dataset, frame_size, fit, cache))
    finish = _FinishExample(frame_size, augment or Augment(), prompt, slots)
    examples = examples.random_map(finish)

    num_batches = None
    if num_epochs is not None:
        total = len(dataset) * num_epochs
        num_batches = total // batch_size if drop_remainder else -(-total // batch_size)
        if num_batches == 0:
            raise ValueError(
                f"{total} examples make no batch of {batch_size}: choose a smaller batch_size"
            )
        missing = num_batches * batch_size - total
        if missing > 0:
            blanks = grain.MapDataset.range(missing).map(_Blank(frame_size, slots))
            examples = grain.MapDataset.concatenate([examples, blanks])

    # Sliced after batching: step s is the same set of rows for any number of hosts.
    batches = examples.batch(batch_size // process_count, drop_remainder=True)
    stop = None if num_batches is None else num_batches * process_count
    batches = batches[process_index:stop:process_count][start_step:]
    stream = batches.to_iter_dataset(_read_options(threads, workers))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads absl's flags, which only absl's apps parse
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        )
    left = None if num_batches is None else max(num_batches - start_step, 0)
    return Loader(len(dataset), left, stream)


def _read_options(threads: int | None, workers: int) -> grain.ReadOptions:
    if threads is None:
        usable = (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        )
        threads = 1 if workers else min(max((usable or 1) // 2, 1), 8)
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


@lru_cache(maxsize=4)
def _epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


@dataclass(frozen=True)
class _Shuffled:
    """The position in the data set of every place in the endless stream, epoch by epoch.

    Grain's own shuffle costs 17 ms an example for 4 examples (1.3 ms for 54), because it searches
    its way through 65,536 numbers.
    """

    count: int
    seed: int

    def __call__(self, place: int, _: int) -> int:
        epoch, place_in_epoch = divmod(place, self.count)
        return int(_epoch_order(self.count, self.seed, epoch)[place_in_epoch])


class _ResizedExamples:
    """The data set with images and masks resized to fit the frame, decoded once if cached."""

    def __init__(
        self, dataset: SegmentationDataset, frame_size: tuple[int, int], fit: Fit, cache: bool
    ):
        self._dataset = dataset
        self._frame_size = frame_size
        self._fit: Fit = fit
        self._cache: dict[int, dict[str, Any]] | None = {} if cache else None
        self._locks = [threading.Lock() for _ in range(16)]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process starts with an empty cache: sending a full one costs more than decoding.
        return {
            "dataset": self._dataset,
            "frame_size": self._frame_size,
            "fit": self._fit,
            "cache": self._cache is not None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __call__(self, index: int) -> dict[str, Any]:
        if self._cache is None:
            return self._load(index)
        # Two threads must not both decode what two epochs want at the same moment.
        with self._locks[index % len(self._locks)]:
            if index not in self._cache:
                self._cache[index] = self._load(index)
            return self._cache[index]

    def _load(self, index: int) -> dict[str, Any]:
        example = self._dataset[index]
        image, mask = example["image"], example["mask"]
        if not is_pair(image, mask):
            raise DataError(
                f"example {index} ({example['name']}): image {image.dtype} {image.shape} and mask "
                f"{mask.dtype} {mask.shape}; expected uint8 (h, w, 3) and uint8 (h, w)"
            )
        size = size_in_frame(mask.shape, self._frame_size, self._fit)
        resized = {"image": resize(image, size), "mask": resize(mask, size)}
        for array in resized.values():
            # It may be cached: an augmentation that writes into it must fail, not change it.
            array.setflags(write=False)
        return {**resized, "original_size": mask.shape, "index": index}


@dataclass(frozen=True)
class _FinishExample:
    """Augments, draws the prompt, pads to the frame."""

    frame_size: tuple[int, int]
    augment: Augmentation
    prompt: Callable[..., tuple[np.ndarray, np.ndarray]]  # of a mask, `rng=` besides
    slots: int

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image, mask = self.augment(example["image"], example["mask"], rng, self.frame_size)
        if not is_pair(image, mask) or any(np.greater(mask.shape, self.frame_size)):
            raise ValueError(
                f"{self.augment} made image {image.dtype} {image.shape} and mask {mask.dtype} "
                f"{mask.shape} of example {example['index']}; expected uint8 (h, w, 3) and uint8 "
                f"(h, w) that fit into the frame {self.frame_size}"
            )
        coords, labels = self.prompt(mask > 0, rng=rng)
        blank = (0, self.slots - len(labels))
        coords = np.pad(coords, (blank, (0, 0)))
        labels = np.pad(labels, blank, constant_values=INVALID)
        return {
            "image": pad_to_frame(image, self.frame_size),
            "mask": pad_to_frame(mask, self.frame_size),
            "size": np.array(mask.shape, np.int32),
            "original_size": np.array(example["original_size"], np.int32),
            "coords": coords,
            "labels": labels,
            "index": np.int32(example["index"]),
            "valid": np.bool_(True),
        }


@dataclass(frozen=True)
class _Blank:
    """A row that only fills up a batch."""

    frame_size: tuple[int, int]
    slots: int

    def __call__(self, _: int) -> dict[str, Any]:
        return {
            "image": np.zeros((*self.frame_size, 3), np.uint8),
            "mask": np.zeros(self.frame_size, np.uint8),
            "size": np.array(self.frame_size, np.int32),
            "original_size": np.array(self.frame_size, np.int32),
            "coords": np.zeros((self.slots, 2), np.float32),
            "labels": np.full(self.slots, INVALID, np.int32),
            "index": np.int32(-1),
            "valid": np.bool_(False),
        }
