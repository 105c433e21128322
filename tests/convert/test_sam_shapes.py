"""A SAM checkpoint is recognised from its shapes, and anything else is named."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from convert import bridge
from convert.sam import LEAVES, NAMES, convert
from convert.sam_shapes import describe, infer_config, strip_wrapper, variant_name
from convert.torch_io import CheckpointError
from samjax.models.functional import abstract_params
from samjax.models.sam import VARIANTS, SamConfig, vit_b, vit_xs
from samjax.trees import flatten


def their_shapes(config: SamConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """{upstream's key: shape} of a model, without its weights."""
    abstract = abstract_params(config)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items()}
    return {
        route.key: jax.ShapeDtypeStruct([shapes[path][a] for a in route.inverse_axes], np.float32)
        for path, route in bridge.routes(abstract, NAMES, LEAVES).items()
    }


def manifest(shared_data: Path, name: str) -> dict[str, jax.ShapeDtypeStruct]:
    """{key: shape} of the official model."""
    text = (shared_data / "state_dict_manifests" / f"{name}.json").read_text("utf-8")
    tensors = json.loads(text)["tensors"]
    return {key: jax.ShapeDtypeStruct(shape, np.float32) for key, (shape, _) in tensors.items()}


@pytest.mark.parametrize(
    "variant",
    ["vit_b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit_l", "vit_h"))],
)
def test_official_models(shared_data: Path, variant: str):
    """Ours has exactly the official tensors, and is recognised from them."""
    official = manifest(shared_data, f"sam_{variant}")
    config = infer_config(official)
    assert config == VARIANTS[variant]()
    assert variant_name(config) == variant
    assert their_shapes(config) == official


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mobile_sam_vit_t", "MobileSAM"),
        ("sam2_hiera_tiny", "SAM 2"),
        ("sam2.1_hiera_large", "SAM 2"),
    ],
)
def test_other_official_models_are_named(shared_data: Path, name: str, what: str):
    with pytest.raises(CheckpointError, match=rf"not a SAM \(v1\).*looks like {what}"):
        infer_config(manifest(shared_data, name))


def replace_vit(config: SamConfig, **changes) -> SamConfig:
    return dataclasses.replace(
        config, image_encoder=dataclasses.replace(config.image_encoder, **changes)
    )


SMALL = replace_vit(vit_xs(), depth=3, global_blocks=(1,))


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(vit_b((512, 512)), num_multimask=8),  # SAMed on Synapse
        dataclasses.replace(vit_b((224, 224)), num_multimask=1),  # the grid is the window
        replace_vit(SMALL, image_size=(96, 96)),  # the grid is smaller than the window
        replace_vit(SMALL, image_size=(128, 192)),  # one side of the grid is the window
        replace_vit(SMALL, global_blocks=()),
        replace_vit(SMALL, patch_size=8, mlp_ratio=3.3, heads=6, global_blocks=(0, 2)),
        dataclasses.replace(SMALL, num_multimask=0, decoder_depth=1, iou_head_depth=2),
        dataclasses.replace(SMALL, decoder_depth=3, iou_head_depth=5, mask_channels=24),
    ],
    ids=describe,
)
def test_any_size_is_recognised(config: SamConfig):
    found = infer_config(their_shapes(config))
    assert dataclasses.replace(found, image_encoder=config.image_encoder) == config
    ours, theirs = found.image_encoder, config.image_encoder
    hidden = int(theirs.width * theirs.mlp_ratio)
    assert int(ours.width * ours.mlp_ratio) == hidden
    assert dataclasses.replace(ours, mlp_ratio=theirs.mlp_ratio) == theirs


def test_all_global_blocks():
    """Without a windowed block the window cannot be seen, and does not matter."""
    config = replace_vit(SMALL, global_blocks=(0, 1, 2))
    found = infer_config(their_shapes(config)).image_encoder
    assert found.global_blocks == (0, 1, 2)
    assert found.grid == (16, 16)


def test_tiny(tiny_config: SamConfig, tiny_state_dict):
    assert infer_config(tiny_state_dict) == tiny_config
    assert variant_name(tiny_config) == "custom"
    assert describe(tiny_config) == (
        "custom (width 24, depth 3, heads 2), image 48 x 80, 5 mask tokens"
    )


def test_any_one_missing_tensor_is_named(tiny_config: SamConfig, tiny_state_dict):
    """One tensor less never changes what is recognised, so the bridge can name it."""
    patches = "image_encoder.patch_embed.proj.weight"  # alone shows the patch size, here 8
    for key in tiny_state_dict:
        rest = {name: array for name, array in tiny_state_dict.items() if name != key}
        assert key == patches or infer_config(rest) == tiny_config, key
        if key in (patches, "image_encoder.pos_embed", "mask_decoder.mask_tokens.weight"):
            with pytest.raises(bridge.BridgeError) as caught:
                convert(rest)
            assert key in caught.value.missing


def test_any_one_misshaped_tensor_is_named(tiny_config: SamConfig, tiny_state_dict):
    for key, array in tiny_state_dict.items():
        if key == "image_encoder.patch_embed.proj.weight":
            continue
        wrong = {**tiny_state_dict, key: np.zeros([n + 1 for n in array.shape], np.float32)}
        assert infer_config(wrong) == tiny_config, key
        if key in ("image_encoder.pos_embed", "image_encoder.blocks.1.attn.rel_pos_h"):
            with pytest.raises(bridge.BridgeError) as caught:
                convert(wrong)
            assert list(caught.value.misshaped) == [key]
            assert not caught.value.missing
            assert not caught.value.unexpected


def test_stray_layers_are_left_over(tiny_config: SamConfig, tiny_state_dict):
    stray = {
        "image_encoder.blocks.3.norm1.weight": np.zeros(24, np.float32),
        "mask_decoder.transformer.layers.7.norm1.bias": np.zeros(32, np.float32),
        "mask_decoder.output_hypernetworks_mlps.5.layers.0.bias": np.zeros(32, np.float32),
    }
    with pytest.raises(bridge.BridgeError) as caught:
        convert({**tiny_state_dict, **stray})
    assert caught.value.unexpected.keys() == stray.keys()
    assert not caught.value.missing


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (["vision_encoder.layers.0.attn.qkv.weight"], "looks like Hugging Face"),
        (["w_a_000", "w_b_000"], "a LoRA adapter.*--adapter"),
        (["image_encoder.blocks.0.norm1.weight", "mask_decoder.hf_token.weight"], "HQ-SAM"),
        (["conv1.weight", "fc.bias"], "none of its tensors is SAM's .*conv1.weight, fc.bias"),
        (["image_encoder.blocks.0.norm1.weight"], r"holds no prompt_encoder\.\* and no mask_dec"),
    ],
)
def test_other_models(keys: list[str], complaint: str):
    with pytest.raises(CheckpointError, match=complaint):
        infer_config({key: np.zeros(3, np.float32) for key in keys})


def test_wrapper(tiny_state_dict):
    wrapped = {f"sam.model.{key}": array for key, array in tiny_state_dict.items()}
    prefix, unwrapped = strip_wrapper(wrapped)
    assert prefix == "sam.model."
    assert unwrapped.keys() == tiny_state_dict.keys()
    assert strip_wrapper(tiny_state_dict)[0] == ""
    assert strip_wrapper({**wrapped, "teacher.x": np.zeros(1)})[0] == ""


def test_round_trip(tiny_config: SamConfig, tiny_params, tiny_state_dict):
    config, params = convert(tiny_state_dict)
    assert config == tiny_config
    before, after = flatten(tiny_params), flatten(params)
    assert before.keys() == after.keys()
    assert all(before[path].tobytes() == after[path].tobytes() for path in before)
