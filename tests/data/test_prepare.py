"""Prepared data sets: tfds itself and `Prepared` give back what the reader gives, bit for bit."""

import io
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path

import grain
import numpy as np
import pytest
from etils.epath.testing import mock_epath
from PIL import Image

from samjax.data import Subset, make_loader
from samjax.data.datasets import READERS, chasedb1
from samjax.data.datasets.base import Case, Pictures
from samjax.data.images import DataError, read_mask
from samjax.data.prepare import main, write_prepared
from samjax.data.tfds import Prepared

tfds = pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")


@pytest.fixture(autouse=True)
def no_tensorflow():
    before = "tensorflow" in sys.modules
    yield
    assert before or "tensorflow" not in sys.modules


def labels(case, size):
    return read_mask(case.labels[0], (1, 2))


def tiny(root, split="train", *, names: tuple[str, str] = ("disc", "cup")) -> Pictures:
    files = sorted((Path(root) / split).glob("*_image.png"))
    return Pictures(
        dataset="tiny",
        root=Path(root),
        split=split,
        cases=tuple(
            Case(f.name[:-10], (f,), (f.with_name(f.name.replace("image", "mask")),), f.name[0])
            for f in files
        ),
        class_names=names,
        read_label=labels,
    )


@pytest.fixture
def source(tmp_path, rng, monkeypatch) -> Path:
    """Seven pictures for training, three for a test; none as large as another."""
    monkeypatch.setitem(READERS, "tiny", tiny)
    for split, count in (("train", 7), ("test", 3)):
        (tmp_path / "source" / split).mkdir(parents=True)
        for i in range(count):
            size = (20 + i, 31)
            image, mask = rng.integers(0, 256, (*size, 3), np.uint8), rng.integers(0, 3, size)
            stem = tmp_path / "source" / split / f"{'abc'[i // 3]}{i}é"
            Image.fromarray(image).save(f"{stem}_image.png")
            Image.fromarray(mask.astype(np.uint8)).save(f"{stem}_mask.png")
    return tmp_path / "source"


def prepare(source, out, *more: str) -> int:
    options = ["--dataset", "tiny", "--source", str(source), "--out", str(out), "--threads", "2"]
    return main([*options, *more])


def assert_same(found, expected) -> None:
    assert len(found) == len(expected)
    for i in range(len(expected)):
        assert found[i].keys() == expected[i].keys()
        for key, value in expected[i].items():
            np.testing.assert_array_equal(found[i][key], value, strict=key in ("image", "mask"))


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_tfds_reads_it(source, tmp_path, capsys):
    out = tmp_path / "all" / "tiny" / "1.0.0"
    assert prepare(source, out, "--shards", "3") == 0
    assert "7 examples of the split train" in capsys.readouterr().out
    builder = tfds.builder_from_directory(out)
    split = builder.info.splits["train"]
    assert (split.shard_lengths, split.num_examples) == ([2, 2, 3], 7)
    assert split.num_bytes == sum(file.stat().st_size for file in out.glob("tiny-train*"))
    assert builder.info.metadata["class_names"] == ["disc", "cup"]
    assert str(builder.info.description).startswith("Prepared data sets")  # the reader's module
    expected = tiny(source)
    by_name = tfds.data_source("tiny", split="train", data_dir=tmp_path / "all")
    for records in (builder.as_data_source("train"), by_name):
        assert len(records) == 7
        for i, record in enumerate(records):
            np.testing.assert_array_equal(record["image"], expected[i]["image"], strict=True)
            np.testing.assert_array_equal(record["mask"][..., 0], expected[i]["mask"], strict=True)
            assert record["name"].decode() == expected[i]["name"]
            assert (record["patient"].decode(), record["index"]) == (expected[i]["patient"], i)
    assert len(builder.as_data_source("train[:3]")) == 3


def test_it_is_the_readers_data_set(source, tmp_path):
    assert prepare(source, tmp_path / "out", "--shards", "3", "--names", "inner", "outer") == 0
    direct, prepared = tiny(source), Prepared(tmp_path / "out")
    prepared.check()
    assert_same(prepared, direct)
    assert (prepared.names, prepared.patients) == (direct.names, direct.patients)
    assert (prepared.class_names, prepared.num_classes) == (("inner", "outer"), 2)
    assert prepared[0]["image"].flags.writeable
    assert prepared[-1]["name"] == "c6é"
    with pytest.raises(IndexError):
        prepared[7]
    assert_same(pickle.loads(pickle.dumps(prepared)), direct)  # with open files
    assert_same(grain.MapDataset.source(prepared), direct)
    batches = [
        list(make_loader(d, frame_size=(16, 24), batch_size=3, seed=1, shuffle=True, threads=2))
        for d in (direct, prepared)
    ]
    assert len(batches[0]) == 3
    for ours, theirs in zip(*batches, strict=True):
        for key, array in theirs.items():
            np.testing.assert_array_equal(ours[key], array)


def test_an_interrupted_run_continues(source, tmp_path, capsys):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert prepare(source, whole, "--shards", "4") == 0
    bad = source / "train" / "b5é_image.png"
    stored = bad.read_bytes()
    bad.write_bytes(stored[:-40])
    assert prepare(source, out, "--shards", "4") == 1
    error = capsys.readouterr().err
    assert "example 5 (b5é) cannot be used" in error
    assert str(bad) in error
    shards = sorted(file.name for file in out.glob("tiny*"))
    assert shards == [f"tiny-train.array_record-{i:05d}-of-00004" for i in range(3)]
    assert sorted(file.name for file in out.iterdir()) == ["samjax_train.json", *shards]
    with pytest.raises(DataError, match="the split 'train' is not complete"):
        Prepared(out)

    bad.write_bytes(stored)
    (out / ".tiny-train.abcdefgh.tmp.array_record-00003-of-00004").write_bytes(b"of a killed run")
    times = {name: (out / name).stat().st_mtime_ns for name in shards}
    capsys.readouterr()
    assert prepare(source, out, "--shards", "4") == 0
    assert "in 4 shards; 2 written now" in capsys.readouterr().out
    assert {name: (out / name).stat().st_mtime_ns for name in shards} == times
    assert contents(out) == contents(whole)


def test_another_process_would_write_the_same_bytes(source, tmp_path):
    """A protobuf's map has another order in each, unless it is told to sort."""
    from array_record.python.array_record_module import ArrayRecordReader
    from tensorflow_datasets.proto import tf_example_pb2

    assert prepare(source, tmp_path / "out", "--shards", "1") == 0
    reader = ArrayRecordReader(str(next((tmp_path / "out").glob("tiny-train*"))))
    for record in reader.read_all():
        example = tf_example_pb2.Example.FromString(record)
        assert example.SerializeToString(deterministic=True) == record
        assert len(example.features.feature) == 5
    reader.close()


def test_a_shard_that_is_cut_off(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(source, out, "--shards", "2") == 0
    shard = out / "tiny-train.array_record-00001-of-00002"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"00001-of-00002: example 4 \(b4é\) cannot be read \(Corr"):
        Prepared(out)[4]
    assert prepare(source, out, "--shards", "2") == 1
    assert f"{shard}: 0 examples, expected 4; delete it" in capsys.readouterr().err
    shard.unlink()
    with pytest.raises(DataError, match=r"missing tiny-train.array_record-00001-of-00002"):
        Prepared(out).check()
    with pytest.raises(DataError, match="example 4"):
        Prepared(out)[4]
    assert prepare(source, out, "--shards", "2") == 0
    assert_same(Prepared(out), tiny(source))


def test_two_splits_in_one_folder(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(source, out) == 0
    assert prepare(source, out, "--split", "test", "--shards", "3") == 0
    assert_same(Prepared(out), tiny(source))
    assert_same(Prepared(out, "test"), tiny(source, "test"))
    splits = tfds.builder_from_directory(out).info.splits
    assert {name: split.shard_lengths for name, split in splits.items()} == {
        "train": [7],
        "test": [1, 1, 1],
    }
    with pytest.raises(DataError, match=r"no prepared split 'val'; found dataset_info.json, "):
        Prepared(out, "val")
    with pytest.raises(DataError, match="no prepared split 'train'; found nothing"):
        Prepared(tmp_path / "nowhere")
    (source / "test").rename(source / "all")
    assert prepare(source, out, "--split", "all") == 1
    assert "tfds means all by it" in capsys.readouterr().err


def test_other_settings_are_refused(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare(source, out, "--shards", "2") == 0
    before = contents(out)

    def refused(*more: str) -> list[str]:
        capsys.readouterr()
        assert prepare(source, out, *more) == 1
        assert contents(out) == before
        return capsys.readouterr().err.splitlines()[1:]

    assert refused("--shards", "3") == ["  sharding.shards: 2 there, 3 now"]
    assert refused("--shards", "2", "--names", "disc", "rim") == [
        "  class_names: ['disc', 'cup'] there, ['disc', 'rim'] now",
        "  settings.reader.names: ['disc', 'cup'] there, ['disc', 'rim'] now",
    ]
    assert refused("--split", "test", "--names", "disc", "rim") == [
        "  class_names: ['disc', 'cup'] there, ['disc', 'rim'] now"
    ]
    Image.new("RGB", (31, 20)).save(source / "train" / "a0é_image.png")
    (difference,) = refused("--shards", "2")
    assert difference.startswith("  first_example: ")
    for kind in ("image", "mask"):
        (source / "train" / f"c6é_{kind}.png").unlink()
    assert refused("--shards", "2")[0] == (
        "  names: 7 there, 6 now; from number 6 on ['c6é'] there, [] now"
    )


def test_errors_of_the_command(source, tmp_path, capsys, monkeypatch):
    def error(*options: str, out: Path = tmp_path / "out") -> str:
        assert main(["--out", str(out), *options]) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    given = ["--dataset", "tiny", "--source", str(source)]
    assert "data set 'huge': expected one of " in error("--dataset", "huge", "--source", ".")
    assert "nowhere: no such folder" in error("--dataset", "tiny", "--source", "nowhere")
    assert "--colour red: unknown; the options of tiny are" in error(*given, "--colour", "red")
    assert "shards 8, shard_mb 128.0: expected 1 to 7" in error(*given, "--shards", "8")
    assert "threads 0: expected at least 1" in error(*given, "--threads", "0")
    other = source / "train"
    assert "train: holds a0é_image.png, " in error(*given, out=other)
    assert "b3é_image.png: a file; expected a folder" in error(*given, out=other / "b3é_image.png")
    with pytest.raises(SystemExit, match="2"):
        main(given)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert "tensorflow_datasets: pip install 'samjax[tfds]'" in error(*given)


def test_examples_are_checked(source, tmp_path):
    def write(classes: int, names: tuple[str, ...]) -> None:
        write_prepared(
            tiny(source),
            tmp_path / "out",
            name="tiny",
            split="train",
            class_names=("a", "b")[:classes],
            names=names,
            shards=1,
            progress=False,
        )

    names = tiny(source).names
    with pytest.raises(
        DataError, match=r"example 0 \(a0é\) .* label 2 in the mask; expected 0 to 1"
    ):
        write(1, names)
    (tmp_path / "out" / "samjax_train.json").unlink()
    with pytest.raises(DataError, match=r"example 6 \(d\) cannot be used: its name is 'c6é'"):
        write(2, (*names[:6], "d"))
    with pytest.raises(ValueError, match="6 names of 7 examples"):
        write(2, names[1:])


def test_size_of_a_shard(source, tmp_path):
    assert prepare(source, tmp_path, "--split", "train") == 1  # the source lies there
    assert prepare(source, tmp_path / "out", "--shard-mb", "0.007") == 0
    assert len(list(tmp_path.glob("out/tiny-train*"))) == 3  # of 16.8 kB
    assert_same(Prepared(tmp_path / "out"), tiny(source))


@contextmanager
def bucket(folder, **more):
    """`gs://` is a folder for etils; for all else, a path that does not exist."""

    def there(original, path, *args, **kwargs):
        return original(str(path).replace("gs://", f"{folder}/"), *args, **kwargs)

    used = ("exists", "isdir", "listdir", "makedirs", "open", "remove", "stat")
    with mock_epath(**{**dict.fromkeys(used, there), **more}):
        yield


class Lost(io.FileIO):
    def write(self, data, /):
        super().write(data[:10])
        raise OSError("connection lost")


def test_a_bucket(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert prepare(source, "local", "--shards", "3") == 0
    assert prepare(source, "local", "--split", "test") == 0
    objects = tmp_path / "gs" / "b" / "tiny"
    objects.mkdir(parents=True)

    def failing(original, path, mode):
        path = str(path).replace("gs://", f"{tmp_path / 'gs'}/")
        return Lost(path, "w") if "00001-of" in path and mode == "wb" else original(path, mode)

    with bucket(tmp_path / "gs", open=failing):
        assert prepare(source, "gs://b/tiny", "--shards", "3") == 1
    assert "connection lost" in capsys.readouterr().err
    assert sorted(contents(objects)) == [
        "samjax_train.json",
        "tiny-train.array_record-00000-of-00003",
    ]
    with bucket(tmp_path / "gs"):
        assert prepare(source, "gs://b/tiny", "--shards", "3") == 0
        assert "5 written now" in capsys.readouterr().out
        assert prepare(source, "gs://b/tiny", "--split", "test") == 0
        prepared = Prepared("gs://b/tiny", "test")
        prepared.check()
    assert str(prepared.folder) == "gs://b/tiny"
    assert contents(objects) == contents(tmp_path / "local")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gs", "local", "source"]
    assert_same(Prepared(objects), tiny(source))


def test_photographs(shared_data, tmp_path):
    """Of CHASEDB1, as JPEGs."""
    direct = Subset(chasedb1(shared_data / "chase_db1", "test"), (0, 3, 7))
    written = write_prepared(
        direct,
        tmp_path,
        name="chasedb1",
        split="test",
        class_names=("vessel",),
        names=[direct[i]["name"] for i in range(3)],
        shards=2,
        progress=False,
    )
    assert (written.examples, written.new_examples, written.shards) == (3, 3, 2)
    assert written.num_bytes == sum(file.stat().st_size for file in tmp_path.glob("chasedb1-*"))
    assert_same(Prepared(tmp_path, "test"), direct)
    records = tfds.builder_from_directory(tmp_path).as_data_source("test")
    np.testing.assert_array_equal(records[2]["image"], direct[2]["image"], strict=True)
