"""Files are written whole or not at all."""

import contextlib
import errno
import os
import resource
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from samjax.atomic import atomic_write


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file of this process may grow beyond `size` bytes: a stand-in for a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_writes(tmp_path: Path):
    target = tmp_path / "new" / "folder" / "file.json"
    with atomic_write(target) as temporary:
        assert temporary.parent == target.parent
        assert temporary.suffix == target.suffix
        assert not target.exists()
        temporary.write_text("{}")
    assert target.read_text() == "{}"
    assert os.listdir(target.parent) == ["file.json"]


def test_permissions_are_those_of_any_other_file(tmp_path: Path):
    plain, target = tmp_path / "plain", tmp_path / "target"
    plain.write_text("")
    with atomic_write(target) as temporary:
        temporary.write_text("")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    target.chmod(0o640)
    with atomic_write(target) as temporary:
        temporary.write_text("again")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.parametrize("older", [True, False])
def test_an_exception_leaves_everything_as_it_was(tmp_path: Path, older: bool):
    target = tmp_path / "file"
    if older:
        target.write_text("older")

    def write_half():
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise KeyError("not about files")

    with pytest.raises(KeyError, match="not about files"):
        write_half()
    assert [p.name for p in tmp_path.iterdir()] == (["file"] if older else [])
    assert not older or target.read_text() == "older"


def python_write(path: Path):
    path.write_bytes(bytes(100_000))


def safetensors_write(path: Path):
    save_file({"a": np.zeros(25_000, np.float32)}, path)


@pytest.mark.parametrize("write", [python_write, safetensors_write])
def test_file_too_large(tmp_path: Path, write):
    target = tmp_path / "file.safetensors"
    target.write_text("older")

    def attempt():
        with file_size_limit(50_000), atomic_write(target) as temporary:
            write(temporary)

    with pytest.raises(OSError, match="nothing was written") as caught:
        attempt()
    assert caught.value.errno == errno.EFBIG
    assert str(target) in str(caught.value)
    assert target.read_text() == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["file.safetensors"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_disk_full_while_writing(tmp_path: Path):
    target = tmp_path / "file"

    def attempt():
        with atomic_write(target), open("/dev/full", "w") as full:
            full.write("x")
            full.flush()

    with pytest.raises(OSError, match="the disk is full") as caught:
        attempt()
    assert caught.value.errno == errno.ENOSPC
    assert str(target) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_disk_full_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Some file systems say so only when the data is flushed."""
    target = tmp_path / "file"
    target.write_text("older")

    def full(descriptor: int):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)

    def attempt():
        with atomic_write(target) as temporary:
            temporary.write_text("new")

    with pytest.raises(OSError, match="the disk is full"):
        attempt()
    assert target.read_text() == "older"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_target_is_a_folder(tmp_path: Path):
    with pytest.raises(IsADirectoryError, match="folder of that name"), atomic_write(tmp_path):
        pass


def test_parent_is_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "below"
    with pytest.raises(OSError, match=f"cannot write {target}"), atomic_write(target):
        pass


def test_a_source_that_cannot_be_read_is_not_blamed_on_the_target(tmp_path: Path):
    source, target = tmp_path / "absent", tmp_path / "target"

    def attempt():
        with atomic_write(target) as temporary:
            temporary.write_bytes(source.read_bytes())

    with pytest.raises(FileNotFoundError) as caught:
        attempt()
    assert caught.value.filename == str(source)
    assert "cannot write" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
