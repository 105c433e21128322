"""Adapters on disk: what is written comes back, and what is not understood is refused by name."""

import errno
import json
import math
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from samjax.peft.adapter_files import read_adapter, write_adapter, write_samed
from samjax.peft.lora import Adapter, merge
from samjax.peft.peft_files import PEFT_CONFIG, PEFT_TENSORS, write_peft
from samjax.trees import flatten, unflatten

QKV = "image_encoder/blocks/{}/attn/qkv"
WIDTH = 6


def pair(rng, features_in, rank, out):
    return {
        "a": rng.normal(size=(features_in, rank)).astype("f"),
        "b": rng.normal(size=(rank, out)).astype("f"),
    }


def samed_like(rng, rank=2, blocks=3):
    factors = {
        QKV.format(i): {block: pair(rng, WIDTH, rank, WIDTH) for block in "qv"}
        for i in range(blocks)
    }
    return unflatten(factors)


def everywhere(rng):
    """Fused and separate layers, several ranks."""
    return unflatten(
        {
            QKV.format(0): {block: pair(rng, WIDTH, 2, WIDTH) for block in "qkv"},
            QKV.format(1): {"v": pair(rng, WIDTH, 3, WIDTH)},
            QKV.format(2): {"all": pair(rng, WIDTH, 2, 3 * WIDTH)},
            "image_encoder/blocks/0/attn/proj": {"all": pair(rng, WIDTH, 2, WIDTH)},
            "image_encoder/blocks/10/mlp/lin1": {"all": pair(rng, WIDTH, 2, 9)},
            "mask_decoder/transformer/layers/1/self_attn/q_proj": {"all": pair(rng, 4, 1, 5)},
        }
    )


def base_of(rng, factors):
    """Random kernels for all layers that the factors lie on."""
    base = {}
    for path, leaf in flatten(factors).items():
        layer, block, side = path.rsplit("/", 2)
        if side == "b":
            width = leaf.shape[1] * (1 if block == "all" else 3)
            features_in = flatten(factors)[f"{layer}/{block}/a"].shape[0]
            base[f"{layer}/kernel"] = jnp.asarray(rng.normal(size=(features_in, width)), "f")
    return unflatten(base)


def assert_same(first, second):
    first, second = flatten(first), flatten(second)
    assert sorted(first) == sorted(second)
    for path, leaf in first.items():
        assert second[path].dtype == np.float32
        np.testing.assert_array_equal(second[path], leaf, err_msg=path)


def message_of(call, *arguments, **options):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - every caller looks at the message
        call(*arguments, **options)
    return str(error.value)


# Our own file


def test_own_file_round_trip(tmp_path, rng):
    path = tmp_path / "runs" / "adapter.safetensors"
    tuned = {"mask_decoder": {"iou_token": {"embedding": rng.normal(size=(1, 4)).astype("f")}}}
    adapter = Adapter(factors=everywhere(rng), scale=1 / 3, params=tuned)
    write_adapter(path, adapter, {"base": "vit_b"})
    read = read_adapter(path)
    assert read.scale == adapter.scale
    assert_same(adapter.factors, read.factors)
    assert_same(adapter.params, read.params)
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {
            "format": "samjax-adapter",
            "scale": repr(1 / 3),
            "base": "vit_b",
        }
        assert f"factors/{QKV.format(0)}/q/a" in file.keys()  # noqa: SIM118
        assert "params/mask_decoder/iou_token/embedding" in file.keys()  # noqa: SIM118
    assert os.listdir(path.parent) == ["adapter.safetensors"]


@pytest.mark.parametrize("part", ["factors", "params"])
def test_own_file_with_one_part(tmp_path, rng, part):
    trees = {"factors": samed_like(rng), "params": {"head": {"bias": np.ones(3, np.float32)}}}
    adapter = Adapter(**{"factors": {}, part: trees[part]})
    write_adapter(tmp_path / "adapter.safetensors", adapter)
    read = read_adapter(tmp_path / "adapter.safetensors")
    assert_same(adapter.factors, read.factors)
    assert_same(adapter.params, read.params)


def test_low_precision_is_stored_as_float32(tmp_path, rng):
    factors = {
        "head": {"all": {k: jnp.asarray(v, jnp.bfloat16) for k, v in pair(rng, 3, 1, 2).items()}}
    }
    write_adapter(tmp_path / "adapter.safetensors", Adapter(factors=factors))
    read = flatten(read_adapter(tmp_path / "adapter.safetensors").factors)
    for path, leaf in flatten(factors).items():
        np.testing.assert_array_equal(read[path], leaf.astype(jnp.float32))


def test_what_cannot_be_written(tmp_path, rng):
    path = tmp_path / "adapter.safetensors"
    assert "the adapter is empty" in message_of(write_adapter, path, Adapter(factors={}))
    factors = samed_like(rng)
    adapter = Adapter(factors=factors)
    assert "['scale']" in message_of(write_adapter, path, adapter, {"scale": "2"})
    del factors["image_encoder"]["blocks"]["1"]["attn"]["qkv"]["q"]["b"]
    assert f"{QKV.format(1)}/q/a: its other half" in message_of(write_adapter, path, adapter)
    broken = Adapter(factors=samed_like(rng), params={"head": {"bias": np.array([1, np.nan])}})
    message = message_of(write_adapter, path, broken)
    assert str(path) in message
    assert "NaN or infinite values in:\n  params/head/bias" in message
    assert os.listdir(tmp_path) == []


def test_own_file_that_is_not_understood(tmp_path, rng):
    path = tmp_path / "adapter.safetensors"
    tensors = {
        "factors/x/q/a": np.ones((2, 1), "f"),
        "extra": np.ones(1, "f"),
        "params/": np.ones(1),
    }
    save_file(tensors, path, metadata={"format": "samjax-adapter", "scale": "much"})
    assert message_of(read_adapter, path).splitlines() == [
        f"{path}: an adapter of samjax with contents that are not understood:",
        "  extra",
        "  params/",
        "  scale 'much' in the metadata; expected a number",
    ]
    save_file({"factors/x/q/a": np.ones((2, 1), "f")}, path, metadata={"format": "samjax-adapter"})
    assert "scale None" in message_of(read_adapter, path)
    save_file(
        {"factors/x/q/a": np.ones((2, 1), "f")},
        path,
        metadata={"format": "samjax-adapter", "scale": "1.0"},
    )
    assert f"{path}: these are no low-rank factors:\n  x/q/a" in message_of(read_adapter, path)


@pytest.mark.parametrize("write", [write_adapter, write_samed, write_peft])
def test_full_disk(tmp_path, rng, monkeypatch, write):
    """Nothing is half-written, and what lay there before is still there."""
    path = tmp_path / "adapter"
    write(path, Adapter(factors=samed_like(rng)))
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="the disk is full"):
        write(path, Adapter(factors=samed_like(rng, rank=1)))
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == files


# Files that are none


def test_files_that_are_no_adapters(tmp_path):
    path = tmp_path / "file.safetensors"
    assert message_of(read_adapter, path) == f"{path}: no such file"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert f"{path}: not a complete safetensors file" in message_of(read_adapter, path)
    save_file({}, path)
    assert f"{path}: cannot be used:\n  holds no tensors" in message_of(read_adapter, path)
    names = [f"image_encoder.blocks.{i}.norm1.bias" for i in range(30)]
    save_file({name: np.ones(2, "f") for name in names}, path)
    lines = message_of(read_adapter, path).splitlines()
    assert lines[0] == f"{path}: not an adapter of samjax, SAMed, Sam_LoRA or PEFT; it holds:"
    assert lines[1:] == [f"  {name}" for name in sorted(names)[:20]] + ["  … and 10 more"]
    torch_file = tmp_path / "lora.pth"
    torch_file.write_bytes(b"PK\x03\x04")
    assert f"{torch_file}: a PyTorch file" in message_of(read_adapter, torch_file)


def test_values_that_cannot_be_used(tmp_path, rng):
    path = tmp_path / "lora.safetensors"
    tensors = {"w_a_000": np.ones((2, 6), np.int32), "w_b_000": np.ones((6, 2), "f")}
    tensors["w_b_000"][3] = np.inf
    tensors["w_a_001"] = np.full((2, 6), np.nan, ml_dtypes.bfloat16)
    save_file(tensors, path)
    assert message_of(read_adapter, path).splitlines() == [
        f"{path}: cannot be used:",
        "  w_a_000: int32 instead of floating point",
        "  w_a_001: NaN or infinite values",
        "  w_b_000: NaN or infinite values",
    ]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_are_read(tmp_path, rng, dtype):
    path = tmp_path / "lora.safetensors"
    tensors = {
        k: rng.normal(size=s).astype(dtype)
        for k, s in (
            ("w_a_000", (2, 6)),
            ("w_b_000", (6, 2)),
            ("w_a_001", (2, 6)),
            ("w_b_001", (6, 2)),
        )
    }
    save_file(tensors, path)
    read = flatten(read_adapter(path).factors)
    np.testing.assert_array_equal(read[f"{QKV.format(0)}/v/b"], tensors["w_b_001"].astype("f").T)


# SAMed and Sam_LoRA


@pytest.mark.parametrize("rank", [2, 4, 6, 8])
def test_real_files_round_trip(shared_data, tmp_path, rank):
    source = shared_data / "sam_vit_b_lora" / f"lora_rank{rank}.safetensors"
    adapter = read_adapter(source)
    assert adapter.scale == 1
    assert adapter.params == {}
    assert len(flatten(adapter.factors)) == 48
    write_samed(tmp_path / "copy.safetensors", adapter, blocks=12)
    before, after = load_file(source), load_file(tmp_path / "copy.safetensors")
    assert sorted(before) == sorted(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].shape == tensor.shape
        assert after[name].tobytes() == tensor.tobytes()


def test_samed_layout(tmp_path, rng):
    path = tmp_path / "lora.safetensors"
    adapter = Adapter(factors=samed_like(rng, blocks=12), scale=0.25)
    write_samed(path, adapter)
    stored = load_file(path)
    assert sorted(stored) == [f"w_{side}_{i:03d}" for side in "ab" for i in range(24)]
    flat = flatten(adapter.factors)
    for i in range(24):
        layer = f"{QKV.format(i // 2)}/{'qv'[i % 2]}"
        np.testing.assert_array_equal(stored[f"w_a_{i:03d}"], flat[f"{layer}/a"].T)
        np.testing.assert_array_equal(stored[f"w_b_{i:03d}"], 0.25 * flat[f"{layer}/b"].T)
    read = read_adapter(path)
    assert read.scale == 1
    base = base_of(rng, adapter.factors)
    for one, other in zip(
        flatten(merge(base, adapter)).values(), flatten(merge(base, read)).values(), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_what_samed_cannot_express(tmp_path, rng):
    path = tmp_path / "lora.safetensors"
    factors = everywhere(rng)
    message = message_of(write_samed, path, Adapter(factors=factors, params={"x": np.ones(1)}))
    lines = message.splitlines()
    assert lines[0] == f"{path}: SAMed's layout cannot express this adapter:"
    others = [
        f"{QKV.format(0)} [k]",
        f"{QKV.format(2)} [all]",
        "image_encoder/blocks/0/attn/proj [all]",
        "image_encoder/blocks/10/mlp/lin1 [all]",
        "mask_decoder/transformer/layers/1/self_attn/q_proj [all]",
    ]
    assert sorted(lines[1:]) == sorted(
        [f"  {other}: not q or v of an encoder block" for other in others]
        + ["  x: a parameter tuned outright", "  factors on q of block 1: missing"]
    )
    adapter = Adapter(factors=samed_like(rng, blocks=3))
    assert message_of(write_samed, path, adapter, blocks=4).splitlines()[1:] == [
        "  factors on q of block 3: missing",
        "  factors on v of block 3: missing",
    ]
    assert message_of(write_samed, path, adapter, blocks=2).splitlines()[1:] == [
        "  factors on q of block 2: beyond the 2 blocks",
        "  factors on v of block 2: beyond the 2 blocks",
    ]
    assert "no factors" in message_of(write_samed, path, Adapter(factors={}))
    assert os.listdir(tmp_path) == []


def test_samed_file_that_does_not_add_up(tmp_path, rng):
    path = tmp_path / "lora.safetensors"
    write_samed(path, Adapter(factors=samed_like(rng)))
    tensors = load_file(path)
    del tensors["w_a_001"], tensors["w_b_003"]
    tensors["w_a_2"] = np.ones((2, 6), "f")
    tensors["w_a_0002"] = np.ones((2, 6), "f")
    tensors["mask_decoder.iou_token.weight"] = np.ones((1, 4), "f")
    tensors["w_b_004"] = np.ones(6, "f")
    save_file(tensors, path)
    lines = message_of(read_adapter, path).splitlines()
    assert lines[0] == f"{path}: a LoRA file of SAMed or Sam_LoRA that does not add up:"
    assert sorted(lines[1:]) == [
        "  mask_decoder.iou_token.weight: not understood",
        "  w_a_0002: not understood",
        "  w_a_001: missing",
        "  w_a_2: not understood",
        "  w_b_003: missing",
        "  w_b_004: shape (6,), expected two axes",
    ]


def test_samed_file_with_q_only_or_other_ranks(tmp_path, rng):
    path = tmp_path / "lora.safetensors"
    write_samed(path, Adapter(factors=samed_like(rng, blocks=1)))
    tensors = load_file(path)
    tensors["w_a_000"] = np.ones((3, 6), "f")
    save_file(tensors, path)
    assert f"{QKV.format(0)}/q: a (6, 3) and b (2, 6) make no product" in message_of(
        read_adapter, path
    )
    save_file({name: tensors[name] for name in ("w_a_000", "w_b_000")}, path)
    assert message_of(read_adapter, path).splitlines()[1:] == [
        "  w_a_001: missing",
        "  w_b_001: missing",
    ]


# PEFT


def peft_merge(folder, base):
    """PEFT's own rule, ``W + α/r · B A`` in torch's orientation, applied in float64."""
    config = json.loads((folder / PEFT_CONFIG).read_text())
    tensors = load_file(folder / PEFT_TENSORS)
    merged = dict(flatten(base))
    for module in config["target_modules"]:
        escaped = module.replace(".", r"\.")
        r = config["rank_pattern"].get(escaped, config["r"])
        alpha = config["alpha_pattern"].get(escaped, config["lora_alpha"])
        a = np.float64(tensors.pop(f"base_model.model.{module}.lora_A.weight"))
        b = np.float64(tensors.pop(f"base_model.model.{module}.lora_B.weight"))
        assert a.shape[0] == b.shape[1] == r
        path = module.replace(".", "/") + "/kernel"
        merged[path] = (np.float64(merged[path]).T + alpha / r * b @ a).T
    assert not tensors
    return merged


def test_peft_folder_means_the_same(tmp_path, rng):
    adapter = Adapter(factors=everywhere(rng), scale=0.75)
    base = base_of(rng, adapter.factors)
    write_peft(tmp_path, adapter, base_model="sam_vit_b")
    assert sorted(os.listdir(tmp_path)) == [PEFT_CONFIG, PEFT_TENSORS]
    expected = peft_merge(tmp_path, base)
    for path, leaf in flatten(merge(base, adapter)).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5, err_msg=path)

    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "sam_vit_b")
    assert (config["r"], config["lora_alpha"]) == (2, 1.5)
    assert config["rank_pattern"] == {
        r"image_encoder\.blocks\.0\.attn\.qkv": 6,
        r"image_encoder\.blocks\.1\.attn\.qkv": 3,
        r"mask_decoder\.transformer\.layers\.1\.self_attn\.q_proj": 1,
    }


@pytest.mark.parametrize("scale", [1.0, 0.75, 1 / 3, 0.0])
def test_peft_folder_round_trip(tmp_path, rng, scale):
    adapter = Adapter(factors=everywhere(rng), scale=scale)
    write_peft(tmp_path, adapter)
    for path in (tmp_path, tmp_path / PEFT_TENSORS):
        read = read_adapter(path)
        assert math.isclose(read.scale, scale)
        assert_same(adapter.factors, read.factors)


def test_fused_pair_of_another_writer(tmp_path, rng):
    """Without our note on its make-up, a pair on qkv is one on all its columns."""
    adapter = Adapter(factors=everywhere(rng), scale=0.75)
    write_peft(tmp_path, adapter)
    save_file(load_file(tmp_path / PEFT_TENSORS), tmp_path / PEFT_TENSORS)
    read = read_adapter(tmp_path)
    assert list(read.factors["image_encoder"]["blocks"]["0"]["attn"]["qkv"]) == ["all"]
    base = base_of(rng, adapter.factors)
    expected = flatten(merge(base, adapter))
    for path, leaf in flatten(merge(base, read)).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5, err_msg=path)


def write_foreign(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / PEFT_TENSORS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, **config}
    (folder / PEFT_CONFIG).write_text(json.dumps(config))
    return folder


def foreign(rng, ranks):
    tensors = {}
    for module, rank in ranks.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = rng.normal(size=(rank, 5)).astype("f")
        tensors[f"{prefix}.lora_B.weight"] = rng.normal(size=(7, rank)).astype("f")
    return tensors


def test_scales_that_differ_are_folded(tmp_path, rng):
    tensors = foreign(rng, {"enc.0.proj": 2, "enc.10.proj": 2, "enc.0.lin": 4})
    write_foreign(
        tmp_path,
        tensors,
        rank_pattern={"lin": 4},
        alpha_pattern={r"enc\.0\.proj": 6, "enc.1.lin": 9},
    )
    read = read_adapter(tmp_path)
    assert read.scale == 1
    flat = flatten(read.factors)
    for module, scale in (("enc.0.proj", 3), ("enc.10.proj", 4), ("enc.0.lin", 2)):
        path = module.replace(".", "/") + "/all"
        b = tensors[f"base_model.model.{module}.lora_B.weight"].T
        a = tensors[f"base_model.model.{module}.lora_A.weight"].T
        np.testing.assert_allclose(flat[f"{path}/b"], scale * b, rtol=1e-6)
        np.testing.assert_array_equal(flat[f"{path}/a"], a)


def test_rank_stabilised_scale(tmp_path, rng):
    tensors = foreign(rng, {"proj": 4})
    write_foreign(tmp_path, tensors, r=4, use_rslora=True)
    read = read_adapter(tmp_path)
    assert read.scale == 8 / math.sqrt(4)
    b = tensors["base_model.model.proj.lora_B.weight"].T
    np.testing.assert_array_equal(read.factors["proj"]["all"]["b"], b)


def test_settings_without_effect_are_accepted(tmp_path, rng):
    """All that PEFT 0.21 writes for a plain adapter."""
    settings = {
        "alora_invocation_tokens": None,
        "auto_mapping": {"base_model_class": "Sam", "parent_library": "segment_anything"},
        "base_model_name_or_path": "x",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_bias": False,
        "lora_dropout": 0.1,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "target_modules": ["proj"],
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }
    write_foreign(tmp_path, foreign(rng, {"proj": 2}), **settings)
    assert read_adapter(tmp_path).scale == 4


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ({"use_dora": True}, "use_dora = true: not supported"),
        ({"bias": "lora_only"}, 'bias = "lora_only": not supported'),
        ({"lora_bias": True}, "lora_bias = true: not supported"),
        ({"modules_to_save": ["head"]}, 'modules_to_save = ["head"]: not supported'),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = true: not supported"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights = "pissa": not supported'),
        ({"layer_replication": [[0, 4]]}, "layer_replication = [[0, 4]]: not supported"),
        ({"invented": {"x": 1}}, 'invented = {"x": 1}: not supported'),
        ({"r": None}, "r = null: expected a number"),
        ({"lora_alpha": "8"}, 'lora_alpha = "8": expected a number'),
        ({"rank_pattern": {"proj": 0}}, "proj = 0: expected a number"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern '(': not a regular expression"),
    ],
)
def test_settings_that_are_refused(tmp_path, rng, setting, line):
    write_foreign(tmp_path, foreign(rng, {"proj": 2}), **setting)
    message = message_of(read_adapter, tmp_path)
    assert message.startswith(f"{tmp_path / PEFT_CONFIG}: a PEFT config that cannot be used:\n  ")
    assert line in message


def test_all_refused_settings_are_named_at_once(tmp_path, rng):
    write_foreign(tmp_path, foreign(rng, {"proj": 2}), use_dora=True, bias="all", r=-1)
    assert len(message_of(read_adapter, tmp_path).splitlines()) == 4


def test_peft_tensors_that_do_not_add_up(tmp_path, rng):
    tensors = foreign(rng, {"a": 2, "b": 3, "c": 2})
    del tensors["base_model.model.c.lora_A.weight"]
    tensors["base_model.model.conv.lora_A.weight"] = np.ones((2, 5, 3, 3), "f")
    tensors["base_model.model.a.lora_magnitude_vector.weight"] = np.ones(7, "f")
    tensors["a.lora_A.default.weight"] = np.ones((2, 5), "f")
    write_foreign(tmp_path, tensors)
    lines = message_of(read_adapter, tmp_path).splitlines()
    assert lines[0] == f"{tmp_path / PEFT_TENSORS}: a PEFT adapter that does not add up:"
    assert sorted(lines[1:]) == [
        "  a.lora_A.default.weight: not understood",
        "  b: rank 3 in lora_A, 3 in lora_B, 2 in adapter_config.json",
        "  base_model.model.a.lora_magnitude_vector.weight: not understood",
        "  base_model.model.c.lora_A.weight: missing",
        "  base_model.model.conv.lora_A.weight: shape (2, 5, 3, 3), "
        "expected two axes (a dense layer)",
    ]


def test_note_on_the_make_up_is_checked(tmp_path, rng):
    write_peft(tmp_path, Adapter(factors=samed_like(rng, blocks=1)))
    tensors = load_file(tmp_path / PEFT_TENSORS)
    module = QKV.format(0).replace("/", ".")

    def error(note):
        save_file(tensors, tmp_path / PEFT_TENSORS, metadata={"samjax_blocks": note})
        return message_of(read_adapter, tmp_path)

    assert "outside the block 'k'" in error(json.dumps({module: [["k", 2], ["v", 2]]}))
    assert "rank 4, but 2 in its metadata" in error(json.dumps({module: [["q", 2]]}))
    assert "unknown block 'x'" in error(json.dumps({module: [["x", 4]]}))
    assert "the metadata samjax_blocks are damaged" in error("{")


def test_peft_folder_that_is_not_complete(tmp_path, rng):
    folder = write_foreign(tmp_path / "adapter", foreign(rng, {"proj": 2}))
    (folder / PEFT_CONFIG).write_text('{"peft_type": "IA3"}')
    assert "expected peft_type 'LORA', found 'IA3'" in message_of(read_adapter, folder)
    (folder / PEFT_CONFIG).write_text("[]")
    assert "expected peft_type 'LORA'" in message_of(read_adapter, folder)
    (folder / PEFT_CONFIG).write_text("{")
    assert f"{folder / PEFT_CONFIG}: not a JSON file" in message_of(read_adapter, folder)
    (folder / PEFT_CONFIG).unlink()
    assert f"{folder / PEFT_TENSORS}: a PEFT adapter needs {PEFT_CONFIG} beside it" in message_of(
        read_adapter, folder / PEFT_TENSORS
    )
    (folder / PEFT_TENSORS).unlink()
    assert message_of(read_adapter, folder) == f"{folder}: a folder without {PEFT_TENSORS}"
    (folder / "adapter_model.bin").touch()
    assert "safe_serialization=True" in message_of(read_adapter, folder)


def test_what_peft_cannot_express(tmp_path, rng):
    adapter = Adapter(factors=samed_like(rng), params={"head": {"bias": np.ones(1, "f")}})
    assert "  head/bias: a parameter tuned outright" in message_of(write_peft, tmp_path, adapter)
    assert "no factors" in message_of(write_peft, tmp_path, Adapter(factors={}))
    factors = {"qkv": {"q": pair(rng, 6, 2, 6), "v": pair(rng, 6, 2, 5)}}
    message = message_of(write_peft, tmp_path, Adapter(factors=factors))
    assert "the factors on qkv are not of one layer:\n  q: 6 x 6\n  v: 6 x 5" in message
    assert os.listdir(tmp_path) == []
