"""The cache of an encoder's outputs: where it is kept, what it refuses, and never half of it."""

import errno
import json
import os
import shutil
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.training.features import MARKER, FeatureCache, FeatureError, bytes_per_example

COUNT, BYTES = 11, 2 * 3 * 4 + 5 * 2


class Outputs(NamedTuple):
    fine: jax.Array  # float32 (b, 2, 3)
    others: tuple[jax.Array]  # bfloat16 (b, 5)


@jax.jit
def encode(batch):
    image = batch["image"].astype(jnp.float32)
    fine = image[:, :6].reshape(-1, 2, 3) / 7
    return Outputs(fine, (jnp.sqrt(image[:, :5]).astype(jnp.bfloat16),))


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, (COUNT, 8)).astype(np.uint8)


def batches_of(images, order=None, size=4):
    """Batches of one size; the last is filled up with rows that are not valid."""
    order = np.arange(len(images)) if order is None else order
    for start in range(0, len(order), size):
        index = np.full(size, -1, np.int32)
        index[: len(order[start : start + size])] = order[start : start + size]
        valid = index >= 0
        image = np.where(valid[:, None], images[index], 0)
        yield {"image": image, "index": index, "valid": valid}


def expected(images, indices):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[indices], encode({"image": images}))


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert type(a) is np.ndarray
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def never(batch):
    if isinstance(batch["image"], jax.core.Tracer):
        return encode(batch)
    raise AssertionError("encoded again")


def in_folder(images, folder, encode=encode, **more):
    settings = {"fingerprint": "vit_b", "progress": False, "folder": folder, **more}
    return FeatureCache(encode, batches_of(images), len(images), **settings)


def test_memory_and_disk_give_what_the_encoder_gives(rng, images, tmp_path):
    caches = [
        FeatureCache(encode, batches_of(images), COUNT, progress=False),
        in_folder(images, tmp_path / "new" / "folder"),
        in_folder(images, tmp_path / "new" / "folder", never),
    ]
    for indices in (np.arange(COUNT), rng.permutation(COUNT)[:6], np.array([3, 3]), np.array([10])):
        for cache in caches:
            assert_same(cache[indices], expected(images, indices))
    for cache in caches:
        assert len(cache) == COUNT
        assert cache.bytes_per_example == BYTES
    assert cache[np.arange(2)].others[0].dtype == jnp.bfloat16
    assert bytes_per_example(encode, next(batches_of(images))) == BYTES


def test_the_files(images, tmp_path):
    in_folder(images, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [MARKER, "leaf0.npy", "leaf1.npy"]
    assert np.load(tmp_path / "leaf1.npy").dtype == np.uint16
    assert json.loads((tmp_path / MARKER).read_text("utf-8")) == {
        "fingerprint": "vit_b",
        "count": COUNT,
        "leaves": [["fine", [2, 3], "float32"], ["others/0", [5], "bfloat16"]],
    }


def test_the_order_does_not_matter_and_nothing_is_encoded_twice(rng, images):
    order = np.concatenate([rng.permutation(COUNT), rng.permutation(COUNT)])
    calls = []

    def counting(batch):
        if not isinstance(batch["image"], jax.core.Tracer):
            calls.append(batch["index"])
        return encode(batch)

    cache = FeatureCache(counting, batches_of(images, order, 3), COUNT, progress=False)
    assert_same(cache[np.arange(COUNT)], expected(images, np.arange(COUNT)))
    assert len(calls) == 4
    order = np.array([0, 0, 1, 1, *range(2, COUNT)])
    cache = FeatureCache(encode, batches_of(images, order, 3), COUNT, progress=False)
    assert_same(cache[np.arange(COUNT)], expected(images, np.arange(COUNT)))


def test_rows_that_fill_up_a_batch_are_zeros(images, tmp_path):
    for folder in (None, tmp_path):
        found = in_folder(images, folder)[np.array([4, -1])]
        assert_same(jax.tree.map(lambda a: a[:1], found), expected(images, np.array([4])))
        assert all((leaf[1] == 0).all() for leaf in jax.tree.leaves(found))


def test_an_unfinished_cache_is_encoded_anew(images, tmp_path):
    in_folder(images, tmp_path)
    (tmp_path / MARKER).unlink()
    (tmp_path / "leaf0.npy").write_bytes(b"half")
    other = images[::-1].copy()
    assert_same(in_folder(other, tmp_path)[np.arange(COUNT)], expected(other, np.arange(COUNT)))


def test_what_fails_leaves_nothing(images, tmp_path):
    calls = []

    def breaks(batch):
        calls.append(batch)
        if len(calls) > 3:  # a tracing or two, and the first batch
            raise RuntimeError("out of memory")
        return encode(batch)

    with pytest.raises(RuntimeError, match="out of memory"):
        in_folder(images, tmp_path, breaks)
    assert os.listdir(tmp_path) == []
    assert_same(in_folder(images, tmp_path)[np.arange(2)], expected(images, np.arange(2)))


def test_another_cache_is_refused(images, tmp_path):
    in_folder(images, tmp_path)
    with pytest.raises(FeatureError, match=r"fingerprint 'vit_b', expected 'vit_l'"):
        in_folder(images, tmp_path, fingerprint="vit_l")
    with pytest.raises(FeatureError, match="count 11, expected 10"):
        in_folder(images[:10], tmp_path)
    with pytest.raises(FeatureError, match=r"leaves .*bfloat16.*expected \[\['', \[6\], 'float32'"):
        in_folder(images, tmp_path, jax.jit(lambda batch: batch["image"][:, :6] / 7.0))
    assert_same(in_folder(images, tmp_path, never)[np.arange(2)], expected(images, np.arange(2)))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_marker(images, tmp_path, content):
    in_folder(images, tmp_path)
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(FeatureError, match=rf"{MARKER} is damaged: delete it"):
        in_folder(images, tmp_path)


def test_a_damaged_file(images, tmp_path):
    in_folder(images, tmp_path)
    file = tmp_path / "leaf0.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FeatureError, match=r"leaf0.npy is damaged .*delete .*complete.json"):
        in_folder(images, tmp_path)
    np.save(file, np.zeros(3))
    with pytest.raises(FeatureError, match=r"leaf0.npy is damaged \(\(3,\) float64, expected"):
        in_folder(images, tmp_path)
    file.unlink()
    with pytest.raises(FeatureError, match=r"leaf0.npy is damaged .*No such file"):
        in_folder(images, tmp_path)


def test_examples_that_never_come_are_named(images, tmp_path):
    batches = list(batches_of(images, np.array([0, 2, 9])))
    with pytest.raises(FeatureError, match=r"8 of 11 examples never came: 1, 3, 4, 5, 6, …$"):
        FeatureCache(encode, batches, COUNT, progress=False)
    batches = batches_of(images, np.delete(np.arange(COUNT), 7))
    with pytest.raises(FeatureError, match=r"1 of 11 examples never came: 7$"):
        FeatureCache(encode, batches, COUNT, folder=tmp_path, fingerprint="x", progress=False)
    assert os.listdir(tmp_path) == []


def test_too_little_space(images, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=BYTES * COUNT - 1))
    with pytest.raises(OSError, match=r"need 374 bytes, .* has 373 free") as caught:
        in_folder(images, tmp_path, never)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be reserved here")
def test_a_quota(images, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match=r"cannot reserve 264 bytes for .*leaf0.npy: Disk quota"):
        in_folder(images, tmp_path, never)
    assert os.listdir(tmp_path) == []


def test_bad_input(images):
    def make(encode=encode, batches=None, count=COUNT, **more):
        batches = batches_of(images) if batches is None else batches
        return FeatureCache(encode, batches, count, progress=False, **more)

    with pytest.raises(ValueError, match="count is 0"):
        make(count=0)
    with pytest.raises(ValueError, match="needs a fingerprint"):
        make(folder="somewhere")
    with pytest.raises(FeatureError, match="no batches, but 11 examples"):
        make(batches=[])
    with pytest.raises(FeatureError, match="a batch holds image, expected index and valid too"):
        make(batches=[{"image": images}])
    with pytest.raises(FeatureError, match="holds example 10, expected 0 to 9"):
        make(count=10, batches=list(batches_of(images, np.array([10]))))
    with pytest.raises(FeatureError, match=r"output 'mean' has shape \(\), expected 4 rows"):
        make(lambda batch: {"mean": batch["image"].sum()})
    wider = [*batches_of(images[:4]), *batches_of(np.tile(images, 2))]
    with pytest.raises(FeatureError, match=r"became uint8 \(4, 16\), expected uint8 \(4, 8\)"):
        make(lambda batch: jnp.asarray(batch["image"]), wider)
    cache = make()
    with pytest.raises(IndexError, match="no example 11, -2: the cache holds 11"):
        cache[np.array([0, 11, -1, -2])]
    for wrong in (np.array(3), np.array([0.5]), np.array([True])):
        with pytest.raises(IndexError, match=r"expected integers \(n,\)"):
            cache[wrong]


def test_the_bar(images, capsys):
    FeatureCache(encode, batches_of(images), COUNT)
    written = capsys.readouterr().err
    assert "encoding: 100%" in written
    assert "images/s" in written
