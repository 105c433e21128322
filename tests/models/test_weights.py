"""Weights on disk, and models moved to another frame size."""

import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from samjax.models import functional
from samjax.models.weights import (
    WeightsError,
    load_tensors,
    load_weights,
    resize_params,
    save_tensors,
    save_weights,
)
from samjax.trees import flatten
from tiny_models import SAM as TINY
from tiny_models import random_params


@pytest.fixture(scope="module")
def params():
    return random_params(TINY)


@pytest.fixture
def file(tmp_path, params):
    path = tmp_path / "tiny.safetensors"
    save_weights(path, TINY, params)
    return path


def rewrite(path, change, **metadata):
    """Changes the tensors of a weights file; the config stays, unless ``metadata`` replaces it."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"config": json.dumps(TINY.to_dict()), **metadata})


def test_round_trip_is_exact(tmp_path, params):
    path = tmp_path / "new" / "tiny.safetensors"
    save_weights(path, TINY, params, metadata={"sha256": "0123"})
    config, loaded = load_weights(path)
    assert config == TINY
    expected, loaded = flatten(params), flatten(loaded)
    assert sorted(loaded) == sorted(expected)
    for name, leaf in expected.items():
        assert loaded[name].dtype == jnp.float32
        np.testing.assert_array_equal(loaded[name], leaf, err_msg=name)
    assert load_tensors(path)[1]["sha256"] == "0123"
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny.safetensors"]


def test_loaded_weights_bind(file):
    config, params = load_weights(file)
    functional.bind(config, params)


def test_missing_file(tmp_path):
    with pytest.raises(WeightsError, match=r"absent\.safetensors: no such file"):
        load_weights(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("length", [0, 5, 100, 5000, -1])
def test_truncated_file(file, length):
    content = file.read_bytes()
    file.write_bytes(content[:length])
    with pytest.raises(WeightsError, match=r"tiny\.safetensors: not a complete safetensors file"):
        load_weights(file)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_torch_file_is_sent_to_the_converter(tmp_path, suffix):
    path = tmp_path / f"sam_vit_b{suffix}"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(WeightsError, match=rf"python -m convert --ckpt .*sam_vit_b\{suffix}"):
        load_weights(path)


def test_another_projects_safetensors(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"image_encoder.pos_embed": np.zeros((1, 2), np.float32)}, path)
    with pytest.raises(WeightsError, match=r"other\.safetensors: no samjax model config"):
        load_weights(path)


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"image_encoder": {"size": 3}}'])
def test_damaged_config(file, config):
    rewrite(file, lambda tensors: None, config=config)
    with pytest.raises(
        WeightsError, match=r"tiny\.safetensors: the model config .* cannot be used"
    ):
        load_weights(file)


def test_everything_that_does_not_fit_is_named(file):
    def change(tensors):
        del tensors["image_encoder/pos_embed"]
        tensors["image_encoder/extra"] = np.zeros(3, np.float32)
        tensors["image_encoder/blocks/0/attn/rel_pos_h"] = np.zeros((4, 8), np.float32)
        tensors["image_encoder/blocks/0/norm1/bias"][3] = np.nan
        tensors["image_encoder/blocks/0/norm1/scale"][0] = np.inf
        name = "image_encoder/blocks/1/norm1/bias"
        tensors[name] = tensors[name].astype(np.float16)

    rewrite(file, change)
    with pytest.raises(WeightsError, match="does not fit its config") as error:
        load_weights(file)
    assert str(error.value).splitlines()[1:] == [
        "  image_encoder/blocks/0/attn/rel_pos_h: expected (3, 8), found (4, 8)",
        "  image_encoder/blocks/0/norm1/bias: holds NaN or infinite values",
        "  image_encoder/blocks/0/norm1/scale: holds NaN or infinite values",
        "  image_encoder/blocks/1/norm1/bias: expected float32, found float16",
        "  missing: image_encoder/pos_embed",
        "  unknown: image_encoder/extra",
    ]


def test_failed_write_leaves_the_old_file(file, params, monkeypatch):
    before = file.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"tiny\.safetensors: the disk is full"):
        save_weights(file, TINY, params)
    assert file.read_bytes() == before
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]


def test_save_tensors_writes_views_as_they_look(tmp_path):
    """safetensors stores an array's memory; a transposed view must not come back scrambled."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_tensors(tmp_path / "view.safetensors", {"a": {"b": array.T}}, {})
    tensors, _ = load_tensors(tmp_path / "view.safetensors")
    np.testing.assert_array_equal(tensors["a/b"], array.T)


@pytest.mark.parametrize("size", [(48, 80), (80, 112), (32, 48), (96, 96)])
def test_resize_equals_torch(params, size):
    """SAMed's ``load_from``: both kinds of tables by ``F.interpolate``, bilinear."""
    torch = pytest.importorskip("torch")
    config, resized = resize_params(TINY, params, size)
    grid = size[0] // 16, size[1] // 16
    assert config.image_size == size
    before, after = flatten(params), flatten(resized)

    def interpolate(table, target):
        table = torch.from_numpy(np.array(table))
        return torch.nn.functional.interpolate(table, target, mode="bilinear").numpy()

    expected = {
        "image_encoder/pos_embed": interpolate(
            before["image_encoder/pos_embed"].transpose(0, 3, 1, 2), grid
        ).transpose(0, 2, 3, 1)
    }
    for axis, side in (("h", grid[0]), ("w", grid[1])):
        name = f"image_encoder/blocks/1/attn/rel_pos_{axis}"
        expected[name] = interpolate(before[name][None, None], (2 * side - 1, 8))[0, 0]
    for name, leaf in before.items():
        if name in expected:
            np.testing.assert_allclose(after[name], expected[name], atol=2e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(after[name], leaf, err_msg=name)
    shapes = flatten(functional.abstract_params(config))
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in shapes.items()}


def test_resize_to_the_same_size_is_the_identity(params):
    config, resized = resize_params(TINY, params, (48, 80))
    assert config == TINY
    assert resized is params


def test_resize_refuses_a_size_that_does_not_divide(params):
    with pytest.raises(ValueError, match=r"\(50, 80\) is not a multiple of patch_size 16"):
        resize_params(TINY, params, (50, 80))
