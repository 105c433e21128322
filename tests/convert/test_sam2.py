"""SAM 2's tables, shapes and command, without PyTorch where that can be."""

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

import tiny_models
from convert import bridge
from convert.__main__ import main as main_any
from convert.families import family_of
from convert.sam import main as main_sam
from convert.sam2 import FAMILY, LEAVES, NAMES, convert, main, to_torch
from convert.sam2_shapes import describe, infer_config, strip_wrapper, variant_name
from convert.torch_io import CheckpointError, read_checkpoint
from samjax.models.functional import abstract_params
from samjax.models.sam2_config import VARIANTS, Sam2Config, sam2
from samjax.models.weights import load_weights, save_weights
from samjax.trees import flatten

PUBLISHED = {
    "tiny": 38.9,
    "small": 46.0,
    "base_plus": 80.8,
    "large": 224.4,
}  # millions, of the README


class Shape:
    """Stands for a tensor: all that the shapes need."""

    def __init__(self, shape):
        self.shape = tuple(shape)


@pytest.fixture(scope="module")
def state_dict():
    return to_torch(tiny_models.random_params(tiny_models.SAM2))


@pytest.mark.parametrize("name", VARIANTS)
def test_official_models(name, shared_data):
    """Each of the eight: keys and shapes of the official code, and the published size."""
    path = shared_data / "state_dict_manifests" / f"{name}.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    manifest = json.loads(path.read_text("utf-8"))
    expected = {key: tuple(shape) for key, (shape, _) in manifest["tensors"].items()}
    config = sam2(*VARIANTS[name])
    found = {
        route.key: tuple(
            np.array(flatten(abstract_params(config))[ours].shape)[list(route.inverse_axes)]
        )
        for ours, route in bridge.routes(abstract_params(config), NAMES, LEAVES).items()
    }
    assert found == expected
    count = sum(int(np.prod(shape)) for shape in found.values())
    assert count == manifest["n_params"]
    published = PUBLISHED[name.split("hiera_")[1]]
    assert count / 1e6 == pytest.approx(published, abs=0.1)
    shapes = {key: Shape(shape) for key, shape in expected.items()}
    assert infer_config(shapes) == config
    assert variant_name(config) == name
    assert describe(config) == f"{name}, image 1024 x 1024, 4 mask tokens"


@pytest.mark.parametrize("config", [tiny_models.SAM2, tiny_models.SAM2_0], ids=["2.1", "2.0"])
def test_round_trip(config: Sam2Config):
    params = tiny_models.random_params(config)
    there = to_torch(params)
    _, back = convert(there, config)
    before, after = flatten(params), flatten(back)
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(before[path], after[path], err_msg=path)


def test_everything_wrong_at_once(state_dict):
    broken = dict(state_dict)
    del broken["no_mem_embed"]
    broken["colour"] = np.zeros(3, np.float32)
    broken["no_obj_ptr"] = np.zeros((2, 64), np.float32)
    with pytest.raises(bridge.BridgeError) as error:
        convert(broken, tiny_models.SAM2)
    for key in ("no_mem_embed", "colour", "no_obj_ptr"):
        assert key in str(error.value)


def official_shapes(shared_data, name="sam2.1_hiera_tiny"):
    path = shared_data / "state_dict_manifests" / f"{name}.json"
    tensors = json.loads(path.read_text("utf-8"))["tensors"]
    return {key: Shape(shape) for key, (shape, _) in tensors.items()}


def test_any_one_missing_tensor_is_recognised(shared_data):
    shapes = official_shapes(shared_data)
    config = sam2("hiera_tiny")
    for key in [*shapes][:: 1 if os.environ.get("SAMJAX_EVERY_SIZE") else 7]:
        rest = {name: shape for name, shape in shapes.items() if name != key}
        assert infer_config(rest) == config, key


def test_a_wrapper_is_taken_off(shared_data):
    shapes = official_shapes(shared_data)
    wrapped = {f"model.sam.{key}": shape for key, shape in shapes.items()}
    prefix, rest = strip_wrapper(wrapped)
    assert (prefix, rest) == ("model.sam.", shapes)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (
            ["image_encoder.blocks.0.norm1.weight"],
            r"SAM \(v1\); convert it by: python -m convert.sam$",
        ),
        (["vision_encoder.backbone.x"], "Hugging Face"),
        (["w_a_000", "w_b_000"], "LoRA adapter"),
        (["fc.weight"], "none of its tensors"),
        (["image_encoder.trunk.blocks.0.norm1.weight"], "only a part"),
    ],
)
def test_other_files(keys, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        infer_config({key: Shape((4,)) for key in keys})


def test_a_trunk_of_nobodys(state_dict):
    with pytest.raises(CheckpointError, match=r"width 24 with stages \(1, 2, 3, 1\)"):
        convert(state_dict)


def test_each_command_names_the_other(tmp_path, capsys, state_dict):
    pytest.importorskip("torch")
    second = tmp_path / "second.safetensors"
    save_file(state_dict, second)
    assert main_sam(["--ckpt", str(second), "--out", str(tmp_path / "out.safetensors")]) == 1
    said = capsys.readouterr().err
    assert str(second) in said
    assert "python -m convert.sam2" in said
    from convert.sam import to_torch as sam_to_torch

    first = tmp_path / "first.safetensors"
    save_file(sam_to_torch(tiny_models.random_params(tiny_models.SAM)), first)
    assert main(["--ckpt", str(first), "--out", str(tmp_path / "out.safetensors")]) == 1
    said = capsys.readouterr().err
    assert str(first) in said
    assert "python -m convert.sam\n" in said
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_weights_files_keep_families_apart(tmp_path, capsys):
    path = tmp_path / "tiny.safetensors"
    save_weights(path, tiny_models.SAM2, tiny_models.random_params(tiny_models.SAM2))
    config, _ = load_weights(path)
    assert config == tiny_models.SAM2
    assert main_sam(["--ckpt", str(path), "--to-torch", str(tmp_path / "x.pth")]) == 1
    assert "family 'sam2'" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.safetensors"]
    assert FAMILY.key == "model"


@pytest.mark.parametrize("config", [tiny_models.SAM, tiny_models.SAM2], ids=["sam", "sam2"])
def test_the_command_for_both_families(config, tmp_path, capsys):
    """`python -m convert` tells the family from the file, converted or PyTorch's."""
    pytest.importorskip("torch")
    ours, torch_file = tmp_path / "ours.safetensors", tmp_path / "theirs.pt"
    params = tiny_models.random_params(config)
    save_weights(ours, config, params)
    assert main_any(["--ckpt", str(ours), "--to-torch", str(torch_file)]) == 0
    arrays, info = read_checkpoint(torch_file)
    family = family_of(config)
    assert info.key == (family.key or "")
    assert arrays.keys() == family.to_torch(params).keys()

    code = main_any(["--ckpt", str(torch_file), "--out", str(tmp_path / "again.safetensors")])
    if family is FAMILY:  # this trunk is none of Meta's, whose windows are known
        assert code == 1
        said = capsys.readouterr().err
        assert said.startswith(f"convert: error: {torch_file}: a trunk of width 24")
    else:
        assert code == 0
        _, again = load_weights(tmp_path / "again.safetensors")
        for path, leaf in flatten(again).items():
            np.testing.assert_array_equal(leaf, flatten(params)[path])
