"""The bridge against Meta's own `segment_anything`: its builders, its loader, its numbers."""

import dataclasses
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if find_spec("segment_anything") is None:
    pytest.skip("segment_anything is not installed", allow_module_level=True)

from convert import reference, sam_verify  # noqa: E402
from convert.reference import (  # noqa: E402
    build_reference_sam,
    import_segment_anything,
    randomise,
)
from convert.sam import convert, main, sam_model_registry, to_torch  # noqa: E402
from convert.sam_verify import compare, example_image, verify  # noqa: E402
from convert.verify import VerificationError  # noqa: E402
from samjax.models.sam import VARIANTS  # noqa: E402
from samjax.trees import flatten  # noqa: E402
from tiny_models import SAM_PADDED as TINY  # noqa: E402

SQUARE = dataclasses.replace(
    TINY, image_encoder=dataclasses.replace(TINY.image_encoder, image_size=(56, 56))
)


def as_arrays(model) -> dict[str, np.ndarray]:
    return {key: tensor.numpy() for key, tensor in model.state_dict().items()}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and np.array_equal(a[k].view(np.uint32), b[k].view(np.uint32))
        for k in a
    )


def official(variant: str):
    """The official builder's model, filled with random numbers; without its slow initialisation."""
    with torch.device("meta"):
        model = import_segment_anything().sam_model_registry[variant]()
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        tensor.uniform_(-1, 1, generator=generator)
    return model


@pytest.mark.parametrize(
    "variant",
    ["vit_b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vit_l", "vit_h"))],
)
def test_full_size_round_trip(variant: str):
    """Every tensor comes back bit for bit, and upstream loads them strictly."""
    model = official(variant)
    original = as_arrays(model)
    config, params = convert(original)
    assert config == VARIANTS[variant]()
    assert all(
        leaf.dtype == np.float32 and leaf.flags.c_contiguous for leaf in flatten(params).values()
    )
    back = to_torch(params)
    del params
    assert same_bits(back, original)
    # The model's own memory is wiped, then filled from ours.
    some = "mask_decoder.iou_token.weight"
    expected = original[some].copy()
    for tensor in model.state_dict().values():
        tensor.zero_()
    model.load_state_dict({key: torch.from_numpy(a) for key, a in back.items()}, strict=True)
    assert np.array_equal(as_arrays(model)[some], expected)
    assert same_bits(as_arrays(model), back)


def test_files_of_full_size(tmp_path: Path):
    """.pth → ours → .pth, loaded by the official builder and by our registry."""
    model = official("vit_b")
    source, back = tmp_path / "sam_vit_b.pth", tmp_path / "back.pth"
    torch.save(model.state_dict(), source)
    assert main(["--ckpt", str(source), "--variant", "vit_b"]) == 0
    converted = source.with_suffix(".safetensors")
    assert main(["--ckpt", str(converted), "--to-torch", str(back)]) == 0
    reloaded = import_segment_anything().sam_model_registry["vit_b"](checkpoint=str(back))
    assert same_bits(as_arrays(reloaded), as_arrays(model))
    for path in (source, converted):
        ours = sam_model_registry["vit_b"](checkpoint=str(path))
        assert ours.config == VARIANTS["vit_b"]()
        assert same_bits(to_torch(ours.params), as_arrays(model))


@pytest.mark.parametrize("config", [TINY, SQUARE], ids=["rectangle", "square"])
def test_reference_has_the_shapes_of_the_config(config):
    model = build_reference_sam(config)
    assert not model.training
    found, params = convert(as_arrays(model))
    assert found == config
    assert same_bits(to_torch(params), as_arrays(model))


def test_reference_is_the_official_model():
    with torch.device("meta"):
        ours = build_reference_sam(VARIANTS["vit_b"]()).state_dict()
        theirs = import_segment_anything().sam_model_registry["vit_b"]().state_dict()
    assert list(ours) == list(theirs)
    assert all(ours[key].shape == theirs[key].shape for key in ours)


def test_randomise():
    fresh, model = build_reference_sam(TINY), build_reference_sam(TINY)
    assert randomise(model, 3) is model
    for key, tensor in model.state_dict().items():
        assert len(tensor.unique()) > 1, key
    model.load_state_dict(fresh.state_dict())
    again = randomise(model, 3).state_dict()["image_encoder.pos_embed"]
    assert torch.equal(again, randomise(fresh, 3).state_dict()["image_encoder.pos_embed"])


def test_verify(capsys: pytest.CaptureFixture[str]):
    _, params = convert(as_arrays(randomise(build_reference_sam(TINY), 0)))
    stages = verify(TINY, params)
    names = [stage.name for stage in stages]
    assert names == [
        *("patch embedding", "block 0", "block 1", "block 2", "image embedding"),
        *("points: sparse prompt", "points: dense prompt"),
        *("points: low-res logits", "points: predicted IoU"),
        *("box and mask: sparse prompt", "box and mask: dense prompt"),
        *("box and mask: low-res logits", "box and mask: predicted IoU"),
    ]
    assert max(stage.relative for stage in stages) < 2e-5
    assert all(stage.deviation > 0 for stage in stages)
    said = capsys.readouterr().out
    assert all(name in said for name in names)


def test_verify_finds_the_stage_that_differs(monkeypatch: pytest.MonkeyPatch):
    _, params = convert(as_arrays(randomise(build_reference_sam(TINY), 0)))

    def slightly_wrong(params):
        weights = to_torch(params)
        weights["image_encoder.blocks.1.attn.rel_pos_h"][0] += 0.1
        return weights

    monkeypatch.setattr(sam_verify, "to_torch", slightly_wrong)
    stages = {stage.name: stage.relative for stage in compare(TINY, params, example_image(TINY))}
    assert stages["block 0"] < 1e-5
    assert stages["block 1"] > 1e-4
    assert stages["points: sparse prompt"] < 1e-5
    with pytest.raises(VerificationError, match=r"at: block 1 \(.*image embedding"):
        verify(TINY, params)


def test_verify_command(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    from PIL import Image

    source = tmp_path / "tiny.pth"
    torch.save(randomise(build_reference_sam(TINY), 0).state_dict(), source)
    picture = tmp_path / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (70, 40, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    argv = ["--ckpt", str(source), "--verify", "--image", str(picture)]
    assert main([*argv, "--out", str(tmp_path / "ours.safetensors")]) == 0
    assert "points: low-res logits" in capsys.readouterr().out

    # A converted file alone can be verified too, and then nothing is written.
    before = sorted(tmp_path.iterdir())
    assert main(["--ckpt", str(tmp_path / "ours.safetensors"), "--verify"]) == 0
    assert sorted(tmp_path.iterdir()) == before

    monkeypatch.setattr(sam_verify, "TOLERANCE", 0.0)
    assert main(argv) == 1
    assert "differs from Meta's model by more than 0" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_absent_reference_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    with pytest.raises(ImportError, match=r"pip install 'samjax\[reference\]'"):
        reference._import_reference.__wrapped__("segment_anything")


def test_absent_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'samjax\[convert\]'"):
        reference.import_torch()


def test_non_maximum_suppression():
    """Our stand-in for torchvision's kernel, against the definition."""
    import_segment_anything()
    import torchvision

    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator) * 50
    boxes = torch.cat([corners, corners + 5 + torch.rand(60, 2, generator=generator) * 30], 1)
    scores = torch.rand(60, generator=generator).round(decimals=1)  # with ties
    overlap = torchvision.ops.box_iou(boxes, boxes)
    expected: list[int] = []
    for index in sorted(range(60), key=lambda i: -scores[i].item()):
        if all(overlap[index, kept] <= 0.4 for kept in expected):
            expected.append(index)
    assert 5 < len(expected) < 50
    assert torchvision.ops.nms(boxes, scores, 0.4).tolist() == expected
    none = torchvision.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.4)
    assert none.dtype == torch.int64
    assert none.shape == (0,)
