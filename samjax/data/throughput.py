"""How fast a loader is, and how long a loop waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np


class Throughput:
    """The same batches, and the time that it took to get and to use them.

        watch = Throughput(loader)
        for batch in watch:
            train(batch)
        watch.images_per_second, watch.waiting

    Time spent in the loop's body counts as work only as far as the body waits for it: with JAX,
    block on a step's result before the next batch is asked for, or the device computes while the
    clock says "waiting".

    Attributes:
        batches: number of batches since the start or the last `restart`.
        images: number of valid rows in them.
        seconds: wall time, from asking for the first of these batches to asking for the next one.
        waiting_seconds: the part of it in which the loop had no batch.
    """

    def __init__(
        self,
        loader: Iterable[dict[str, np.ndarray]],
        *,
        skip: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """`skip`: batches at the start that are not counted: threads start, steps are compiled."""
        if skip < 0:
            raise ValueError(f"skip {skip}: expected at least 0")
        self._loader = loader
        self._skip = skip
        self._clock = clock
        self.restart()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the loader's batches."""
        asked = self._clock()
        for number, batch in enumerate(self._loader):
            got = self._clock()
            yield batch
            used, asked_before = self._clock(), asked
            asked = used
            if number >= self._skip:
                self.batches += 1
                self.images += int(np.count_nonzero(batch["valid"]))
                self.waiting_seconds += got - asked_before
                self.seconds += used - asked_before

    def restart(self) -> None:
        """Counts from zero again, as after a line in the log."""
        self.batches, self.images = 0, 0
        self.seconds, self.waiting_seconds = 0.0, 0.0

    @property
    def images_per_second(self) -> float:
        """Of the loader and the loop's body together; 0 before the first batch is counted."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def waiting(self) -> float:
        """Share of the time, 0..1, in which the loop waited for the next batch."""
        return self.waiting_seconds / self.seconds if self.seconds else 0.0


def measure(
    loader: Iterable[dict[str, np.ndarray]],
    batches: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Images per second of a loader whose batches nobody uses, over `batches` after the first.

    Measure many: while the first one is handed out, the loader makes some ahead.

    Raises:
        ValueError: the loader ends before a second batch.
    """
    iterator = iter(loader)
    next(iterator, None)
    start, images = clock(), 0
    for batch in islice(iterator, batches):
        images += int(np.count_nonzero(batch["valid"]))
    seconds = clock() - start
    if not images:
        raise ValueError("nothing to measure: the first batch, which is not counted, is the last")
    return images / seconds
