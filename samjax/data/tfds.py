"""Data sets as ArrayRecord files in the layout of TensorFlow Datasets, without TensorFlow.

A folder, on a disk or in a bucket, holds for the data set `eyes` and its split `train`

    eyes-train.array_record-00000-of-00003 …   the examples: PNGs of image and mask, name, patient
    samjax_train.json                          what they are: settings, classes, names, patients
    features.json, metadata.json               for tfds
    dataset_info.json                          for tfds: the splits that are complete

`tfds.builder_from_directory(folder).as_data_source("train")` reads it, and so does `Prepared`.
`tfds.data_source("eyes", data_dir=…)` finds it where the folder is `…/eyes/1.0.0`.

`samjax.data.prepare` writes it, with the parts in here. tfds's own `download_and_prepare` begins
anew after an interruption; this goes on with the shards that are missing, because a shard is there
only when it is complete: on a disk by renaming a finished file, in a bucket by uploading a finished
file (an object appears when its upload ends, and one that fails is removed).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from samjax import __version__
from samjax.atomic import atomic_write
from samjax.data.images import DECODE_ERRORS, DataError

VERSION = "1.0.0"
_RECORDS = "group_size:1"  # one record a chunk: random access reads no more than it needs
_PNG_LEVEL = 3  # Pillow's own, 6, takes 2.4 times as long for 11 % less of a fundus photograph


@dataclass(frozen=True)
class Plan:
    """What the shards of a split hold; a run continues another only where these are the same.

    Attributes:
        dataset, split: names for tfds.
        class_names: label i + 1 is class_names[i].
        settings: whatever else decides about the examples.
        sharding: what was asked for, {"shards": number} or {"shard_mb": size}.
        names, patients: of each example.
        first_example: sha256 of its pixels.
        num_shards: number of files.
        samjax: the version that wrote it.
    """

    dataset: str
    split: str
    class_names: list[str]
    settings: dict[str, Any]
    sharding: dict[str, Any]
    names: list[str]
    patients: list[str]
    first_example: str
    num_shards: int = field(default=0, compare=False)
    samjax: str = field(default=__version__, compare=False)

    @property
    def file(self) -> str:
        """Where it is stored in the folder."""
        return f"samjax_{self.split}.json"

    def shard(self, number: int) -> str:
        """File name, as tfds expects it."""
        return f"{self.dataset}-{self.split}.array_record-{number:05d}-of-{self.num_shards:05d}"

    def examples(self, number: int) -> range:
        """Which examples a shard holds; they lie in their order, shard after shard."""
        count = len(self.names)
        return range(number * count // self.num_shards, (number + 1) * count // self.num_shards)


class Prepared:
    """A prepared split as a `SegmentationDataset`; it reads a bucket in place.

    Args:
        path: the folder or a bucket's path.
        split: one of its splits.

    Raises:
        DataError: there is no such split, or it is not complete.
        ImportError: tensorflow-datasets or array-record is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], split: str = "train") -> None:
        _tfds()
        self.folder = as_folder(path)
        self.split = split
        file = self.folder / f"samjax_{split}.json"
        if not file.exists():
            there = ", ".join(sorted(listing(self.folder))[:8]) or "nothing"
            raise DataError(f"{self.folder}: no prepared split {split!r}; found {there}")
        self._plan = read_plan(file)
        info = self.folder / "dataset_info.json"
        complete = json.loads(info.read_bytes())["splits"] if info.exists() else []
        if split not in [known["name"] for known in complete]:
            raise DataError(f"{self.folder}: the split {split!r} is not complete; prepare it again")
        self._start()

    def _start(self) -> None:
        self._records: Any = None
        self._lock = threading.Lock()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Label i + 1 is the class class_names[i]."""
        return tuple(self._plan.class_names)

    @property
    def num_classes(self) -> int:
        """Number of classes beside the background."""
        return len(self._plan.class_names)

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each example."""
        return tuple(self._plan.names)

    @property
    def patients(self) -> tuple[str, ...]:
        """Patient of each example."""
        return tuple(self._plan.patients)

    def __len__(self) -> int:
        return len(self._plan.names)

    def check(self) -> None:
        """Looks whether every file is there; raises ``DataError`` with all that are missing."""
        there = listing(self.folder)
        wanted = [self._plan.shard(number) for number in range(self._plan.num_shards)]
        if missing := [name for name in wanted if name not in there]:
            raise DataError(f"{self.folder}: missing {', '.join(missing)}")

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Image uint8 (h, w, 3) RGB, mask uint8 (h, w) labels, name, patient.

        Raises:
            DataError: it cannot be read. IndexError: there is none.
        """
        index = range(len(self))[index]
        records = self._open()
        try:
            record = records[index]
            image, mask = (
                np.array(Image.open(io.BytesIO(record[key]))) for key in ("image", "mask")
            )
        except (RuntimeError, *DECODE_ERRORS) as error:
            shards = range(self._plan.num_shards)
            shard = next(n for n in shards if index in self._plan.examples(n))
            raise DataError(
                f"{self.folder / self._plan.shard(shard)}: example {index} "
                f"({self._plan.names[index]}) cannot be read ({error})"
            ) from error
        return {
            "image": image,
            "mask": mask,
            "name": record["name"].decode(),
            "patient": record["patient"].decode(),
        }

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the files itself.
        return {k: v for k, v in self.__dict__.items() if k not in ("_records", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _open(self) -> Any:
        with self._lock:
            if self._records is None:
                tfds = _tfds()
                # Pillow decodes: tfds would take OpenCV where it finds it.
                decoders = {key: tfds.decode.SkipDecoding() for key in ("image", "mask")}
                builder = tfds.builder_from_directory(os.fspath(self.folder))
                self._records = builder.as_data_source(self.split, decoders=decoders)
            return self._records


def example_features() -> Any:
    """tfds's description of an example."""
    features = _tfds().features
    return features.FeaturesDict(
        {
            "image": features.Image(shape=(None, None, 3), encoding_format="png"),
            "mask": features.Image(shape=(None, None, 1), encoding_format="png"),
            "name": features.Text(),
            "patient": features.Text(),
            "index": np.int64,
        }
    )


def example_serializer() -> Callable[[dict[str, Any]], bytes]:
    """What makes of a dict of `example_features` the bytes that tfds stores.

    tfds's own makes other bytes of it in every process, by the order of a protobuf's map.
    """
    features = example_features()
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    serializer = ExampleSerializer(features.get_serialized_info())

    def serialize(example: dict[str, Any]) -> bytes:
        proto = serializer.get_tf_example(features.encode_example(example))
        return proto.SerializeToString(deterministic=True)

    return serialize


def png_bytes(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 (h, w) or (h, w, 3); tfds would call TensorFlow to encode an array."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def write_shard(path: epath.Path, records: Iterable[bytes]) -> None:
    """Writes a shard, completely or not at all; ``OSError`` if that fails."""
    with whole_file(path) as file:
        writer = _array_record().ArrayRecordWriter(os.fspath(file), _RECORDS)
        try:
            for record in records:
                writer.write(record)
        finally:
            try:
                writer.close()
            except RuntimeError as error:  # how it tells of a full disk
                raise OSError(f"cannot write {path}: {error}") from error


def check_shard(path: epath.Path, length: int) -> None:
    """``DataError`` if a file on a disk does not have so many examples; cut off, it has 0."""
    if is_bucket(path):
        return
    reader = _array_record().ArrayRecordReader(os.fspath(path))
    found = reader.num_records()
    with contextlib.suppress(RuntimeError):  # it tells on closing what is wrong with the file
        reader.close()
    if found != length:
        raise DataError(f"{path}: {found} examples, expected {length}; delete it and run again")


def add_split(folder: epath.Path, plan: Plan, num_bytes: int, description: str) -> None:
    """Adds a split whose shards are all there to what tfds reads; ``dataset_info.json`` last.

    Args:
        num_bytes: size of all its shards.
        description: of the data set.
    """
    core = _tfds().core
    info = core.DatasetInfo(
        builder=core.DatasetIdentity(
            name=plan.dataset,
            version=core.Version(VERSION),
            data_dir=os.fspath(folder),
            module_name=__name__,
        ),
        description=description,
        features=example_features(),
        disable_shuffling=True,
        metadata=core.MetadataDict(class_names=plan.class_names),
    )
    info.set_file_format("array_record")
    splits = {}
    if (folder / "dataset_info.json").exists():
        splits = dict(_tfds().builder_from_directory(os.fspath(folder)).info.splits)
    lengths = [len(plan.examples(number)) for number in range(plan.num_shards)]
    splits[plan.split] = core.SplitInfo(plan.split, lengths, num_bytes)
    info.set_splits(core.SplitDict(splits.values()))
    with tempfile.TemporaryDirectory() as temporary:
        info.write_to_directory(temporary)
        names = sorted(os.listdir(temporary), key=lambda name: name == "dataset_info.json")
        for name in names:
            with whole_file(folder / name) as file:
                shutil.copyfile(os.path.join(temporary, name), file)


@contextlib.contextmanager
def whole_file(path: epath.Path) -> Iterator[Path]:
    """Yields a file on a disk to write; when the block ends well, ``path`` is there with it."""
    if not is_bucket(path):
        with atomic_write(path) as file:
            yield file
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, path.name)
        yield file
        try:
            with file.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 2**22)
            sent, size = size_of(path), file.stat().st_size
            if sent != size:
                raise OSError(f"{path}: {sent} bytes arrived of {size}")
        except BaseException:
            with contextlib.suppress(OSError):  # closing has published what was sent
                path.unlink(missing_ok=True)
            raise


def write_plan(folder: epath.Path, plan: Plan) -> None:
    """Stores a plan, for the runs that continue this one."""
    with whole_file(folder / plan.file) as file:
        file.write_text(json.dumps(asdict(plan), indent=1, ensure_ascii=False), "utf-8")


def read_plan(file: epath.Path) -> Plan:
    """A stored plan; ``DataError`` if the file is none."""
    try:
        return Plan(**json.loads(file.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{file}: not written by samjax.data.prepare ({error})") from error


def as_folder(path: str | os.PathLike[str]) -> epath.Path:
    """A bucket's path as it is, any other made absolute."""
    folder = epath.Path(path)
    return folder if is_bucket(folder) else epath.Path(Path(path).expanduser().absolute())


def is_bucket(path: epath.Path) -> bool:
    """Whether a path is not on a disk."""
    return "://" in os.fspath(path)


def listing(folder: epath.Path) -> set[str]:
    """Names in a folder but hidden ones, none where it does not exist; ``DataError`` for a file."""
    if not folder.is_dir():
        if folder.exists():
            raise DataError(f"{folder}: a file; expected a folder")
        return set()
    return {file.name for file in folder.iterdir() if not file.name.startswith(".")}


def size_of(path: epath.Path) -> int:
    """Bytes of a file."""
    # etils asks for the owner's name too, which a container's user may not have.
    return path.stat().length if is_bucket(path) else os.stat(path).st_size


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise _missing(error) from error
    return tensorflow_datasets


def _array_record() -> Any:
    try:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise _missing(error) from error
    return array_record_module


def _missing(error: ImportError) -> ImportError:
    return ImportError(f"prepared data sets need {error.name}: pip install 'samjax[tfds]'")
