"""Writes a data set for fast reading, once for all runs; needs the extra `samjax[tfds]`.

    python -m samjax.data.prepare --dataset chasedb1 --source CHASEDB1 --out gs://…/chasedb1/1.0.0
    python -m samjax.data.prepare --dataset chasedb1 --source CHASEDB1 --split test --out …

Any option that is not in `--help` is one of the data set's reader, such as `--observer second`;
an unknown one is answered with the list of them. `samjax.data.tfds` describes what is written. The
same command continues a run that was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from etils import epath
from tqdm import tqdm

from samjax.data.images import DataError
from samjax.data.opening import (
    SourceOptions,
    class_names_of,
    find_reader,
    names_of,
    open_source,
    settings_of,
)
from samjax.data.subsets import SegmentationDataset, is_pair, patients_of
from samjax.data.tfds import (
    Plan,
    add_split,
    as_folder,
    check_shard,
    example_serializer,
    is_bucket,
    listing,
    png_bytes,
    read_plan,
    size_of,
    write_plan,
    write_shard,
)

_SAMPLE = 8  # examples that tell how many shards there will be
_LISTED = 8  # entries of a list shown in an error


@dataclass(frozen=True, kw_only=True)
class Arguments(SourceOptions):
    """Write a data set as ArrayRecord files, which tfds and samjax.data.tfds.Prepared read.

    Any other option is one of the data set's reader, such as --observer second; an unknown one is
    answered with the list of them. The same command continues a run that was interrupted.
    """

    out: str
    """A folder or a bucket's path; it may hold other splits of the same data set."""
    shards: int | None = None
    """Number of files; None for as many as --shard-mb says."""
    shard_mb: float = 128.0
    """Size of a file in 10^6 bytes, about."""
    threads: int | None = None
    """That decode and encode; by default one a core, at most 8."""


@dataclass(frozen=True)
class Written:
    """What `write_prepared` did: of the whole split, and examples and seconds of this run."""

    examples: int
    num_bytes: int
    shards: int
    new_examples: int
    seconds: float


def write_prepared(
    dataset: SegmentationDataset,
    out: str | os.PathLike[str],
    *,
    name: str,
    split: str,
    class_names: Sequence[str],
    names: Sequence[str],
    settings: Mapping[str, Any] | None = None,
    description: str = "",
    shards: int | None = None,
    shard_mb: float = 128.0,
    threads: int | None = None,
    progress: bool = True,
) -> Written:
    """Writes a split, or what is missing of it, and adds it to the data set in ``out``.

    One run at a time may write to a folder.

    Args:
        dataset: its examples are asked for by several threads, in their order.
        out: a folder, or a bucket's path, such as `gs://…`, which etils needs `gcsfs` for.
        name: of the data set, for tfds: small letters, digits, underscores.
        split: such as "train"; a split "all" must be the only one, because tfds means all by it.
        class_names: label i + 1 is class_names[i].
        names: of the examples, in their order.
        settings: JSON-able; whatever else decides about the examples.
        description: for people, such as citation and licence.
        shards: number of files; None for as many as ``shard_mb`` says.
        shard_mb: size of a file in 10^6 bytes, about: judged by some examples.
        threads: that decode and encode; by default one a core, at most 8.
        progress: show a bar.

    Raises:
        DataError: an example cannot be used; the shards before it are complete. Or ``out`` holds
            something else, or the same split with other settings; the message names them.
        ValueError: an argument out of its range.
        OSError: writing fails; the shards before are complete.
        ImportError: tensorflow-datasets or array-record is not installed.
    """
    started = time.perf_counter()
    _check_arguments(name, split, len(dataset), names, shards, shard_mb, threads)
    folder = as_folder(out)
    plan = Plan(
        dataset=name,
        split=split,
        class_names=list(class_names),
        settings=json.loads(json.dumps(dict(settings or {}))),
        sharding={"shard_mb": shard_mb} if shards is None else {"shards": shards},
        names=list(names),
        patients=list(patients_of(dataset)),
        first_example=_sha256(dataset[0]),
    )
    encode = _Encoder(dataset, plan)
    there = listing(folder)
    begun = _begun(folder, there, plan)
    if begun is None:
        number = shards or _num_shards(encode, len(dataset), shard_mb)
        plan = replace(plan, num_shards=number)
        write_plan(folder, plan)
    else:
        plan = begun
        _clear_leftovers(folder, plan)

    missing = []
    for number in range(plan.num_shards):
        if plan.shard(number) in there:
            check_shard(folder / plan.shard(number), len(plan.examples(number)))
        else:
            missing.append(number)
    indices = list(chain.from_iterable(plan.examples(number) for number in missing))
    records = _in_parallel(encode, indices, threads or min(os.cpu_count() or 1, 8))
    bar = tqdm(
        records,
        f"{name} {split}",
        len(dataset),
        initial=len(dataset) - len(indices),
        disable=not progress,
        unit="example",
    )
    with closing(records), bar:
        counted = iter(bar)
        for number in missing:
            count = len(plan.examples(number))
            write_shard(folder / plan.shard(number), islice(counted, count))
        next(counted, None)  # only now does the bar count the last

    num_bytes = sum(size_of(folder / plan.shard(number)) for number in range(plan.num_shards))
    add_split(folder, plan, num_bytes, description)
    seconds = time.perf_counter() - started
    return Written(len(dataset), num_bytes, plan.num_shards, len(indices), seconds)


def run(arguments: Arguments, reader_args: Sequence[str] = ()) -> Written:
    """What the command does.

    Raises:
        ValueError, OSError, ImportError: with a message for people.
    """
    example_serializer()  # not after an hour's reading: is tfds installed?
    dataset = open_source(arguments, reader_args)
    reader = find_reader(arguments.dataset)
    return write_prepared(
        dataset,
        arguments.out,
        name=arguments.dataset,
        split=arguments.split,
        class_names=class_names_of(dataset) or (),
        names=names_of(dataset) or (),
        settings=settings_of(arguments, reader_args),
        description=sys.modules[reader.__module__].__doc__ or "",
        shards=arguments.shards,
        shard_mb=arguments.shard_mb,
        threads=arguments.threads,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit code 0, or 1 and one clear message."""
    arguments, reader_args = tyro.cli(
        Arguments, args=argv, prog="python -m samjax.data.prepare", return_unknown_args=True
    )
    try:
        written = run(arguments, reader_args)
    except (ValueError, OSError, ImportError) as error:
        print(f"samjax.data.prepare: error: {error}", file=sys.stderr)
        return 1
    print(
        f"{arguments.out}: {written.examples} examples of the split {arguments.split}, "
        f"{written.num_bytes / 1e6:.1f} MB in {written.shards} shards; {written.new_examples} "
        f"written now, {written.new_examples / written.seconds:.1f} images/s"
    )
    return 0


class _Encoder:
    """Example number → the bytes that tfds stores for it."""

    def __init__(self, dataset: SegmentationDataset, plan: Plan) -> None:
        self._dataset = dataset
        self._plan = plan
        self._serialize = example_serializer()

    def __call__(self, index: int) -> bytes:
        name = self._plan.names[index]
        try:
            example = self._dataset[index]
            _check_example(example, name, len(self._plan.class_names))
        except DataError as error:
            raise DataError(f"example {index} ({name}) cannot be used: {error}") from error
        return self._serialize(
            {
                "image": png_bytes(example["image"]),
                "mask": png_bytes(example["mask"]),
                "name": name,
                "patient": self._plan.patients[index],
                "index": index,
            }
        )


def _check_example(example: Mapping[str, Any], name: str, num_classes: int) -> None:
    image, mask = example["image"], example["mask"]
    if not is_pair(image, mask):
        raise DataError(
            f"image {image.dtype} {image.shape} and mask {mask.dtype} {mask.shape}; expected "
            "uint8 (h, w, 3) and uint8 (h, w)"
        )
    if mask.max() > num_classes:
        raise DataError(f"label {mask.max()} in the mask; expected 0 to {num_classes}")
    if example["name"] != name:
        raise DataError(f"its name is {example['name']!r}, which its data set did not announce")


def _sha256(example: Mapping[str, Any]) -> str:
    """Of the pixels: the same files read by other rules are other examples."""
    digest = hashlib.sha256(repr((example["image"].shape, example["mask"].shape)).encode())
    for key in ("image", "mask"):
        digest.update(example[key].tobytes())
    return digest.hexdigest()


def _in_parallel(
    encode: Callable[[int], bytes], indices: Sequence[int], threads: int
) -> Generator[bytes]:
    """The records in order, computed by threads a little ahead."""
    pool = ThreadPoolExecutor(threads)
    ahead: deque[Future[bytes]] = deque()
    try:
        for index in indices:
            ahead.append(pool.submit(encode, index))
            if len(ahead) >= 2 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _num_shards(encode: _Encoder, count: int, shard_mb: float) -> int:
    sample = np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int).tolist()
    mean = sum(len(encode(index)) for index in sample) / len(sample)
    return min(max(math.ceil(count * mean / (shard_mb * 1e6)), 1), count)


def _begun(folder: epath.Path, there: set[str], plan: Plan) -> Plan | None:
    """The plan of an earlier run for this split; ``DataError`` unless all in there fits."""
    files = sorted(name for name in there if name.startswith("samjax_") and name.endswith(".json"))
    if there and not files:
        raise DataError(
            f"{folder}: holds {', '.join(sorted(there)[:_LISTED])}; expected a new or empty "
            f"folder, or one with the prepared data set {plan.dataset}"
        )
    begun = None
    for other in (read_plan(folder / file) for file in files):
        same = other.split == plan.split
        keys = [field.name for field in fields(Plan) if field.compare]
        keys = keys if same else ["dataset", "class_names"]
        old, new = ({key: getattr(p, key) for key in keys} for p in (other, plan))
        differences = _differences(old, new)
        if not same and "all" in (other.split, plan.split):
            differences.append("split: 'all' must be the only one, because tfds means all by it")
        if differences:
            raise DataError(
                f"{folder}: its split {other.split!r} was not prepared like that; choose another "
                "folder, or delete this one:\n  " + "\n  ".join(differences)
            )
        begun = other if same else begun
    return begun


def _differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key that differs, with both values, or where two long lists begin to."""
    found = []
    for key in there | here:
        old, new = there.get(key), here.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif isinstance(old, list) and isinstance(new, list) and len(old + new) > _LISTED:
            pairs = enumerate(zip(old, new, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(old), len(new)))
            found.append(
                f"{prefix}{key}: {len(old)} there, {len(new)} now; from number {at} on "
                f"{old[at : at + 3]} there, {new[at : at + 3]} now"
            )
        else:
            found.append(f"{prefix}{key}: {old!r} there, {new!r} now")
    return found


def _clear_leftovers(folder: epath.Path, plan: Plan) -> None:
    """Removes the unfinished shard of a run that was killed."""
    if not is_bucket(folder):
        for file in Path(folder).glob(f".{plan.dataset}-{plan.split}.*.tmp.array_record-*"):
            file.unlink()


def _check_arguments(
    name: str,
    split: str,
    count: int,
    names: Sequence[str],
    shards: int | None,
    shard_mb: float,
    threads: int | None,
) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not re.fullmatch(r"\w+", split):
        raise ValueError(
            f"data set {name!r}, split {split!r}: expected small letters, digits and underscores "
            "in the name, letters, digits and underscores in the split"
        )
    if not count or len(names) != count:
        raise ValueError(f"{len(names)} names of {count} examples: expected one for each")
    if (shards is not None and not 1 <= shards <= count) or shard_mb <= 0:
        raise ValueError(
            f"shards {shards}, shard_mb {shard_mb}: expected 1 to {count}, and a size above 0"
        )
    if threads is not None and threads < 1:
        raise ValueError(f"threads {threads}: expected at least 1")


if __name__ == "__main__":
    sys.exit(main())
