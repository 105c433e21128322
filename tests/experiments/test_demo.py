"""The demo and the script behind its checkpoint, in a few steps; and the checkpoint itself."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

from convert import sam, torch_io
from experiments import base_checkpoint, demo
from samjax.models.sam import vit_xs


def test_the_base_checkpoint_is_small_and_loads_into_meta_s_code():
    torch = pytest.importorskip("torch")
    from convert.reference import build_reference_sam

    assert demo.BASE.stat().st_size < 4_000_000
    loaded = sam.load(demo.BASE)
    assert loaded.config == vit_xs()
    state_dict = torch.load(demo.BASE, weights_only=True)
    build_reference_sam(loaded.config).load_state_dict(state_dict, strict=True)


@pytest.mark.slow
def test_the_demo_goes_the_whole_way(tmp_path, capsys):
    old = tmp_path / "data" / "test" / "images" / "of_an_earlier_run.png"
    old.parent.mkdir(parents=True)
    old.touch()
    (tmp_path / "metrics.json").write_text("{}")
    arguments = ["--out", str(tmp_path), "--steps", "2", "--batch-size", "4", "--no-progress"]
    assert demo.main(arguments) == 0
    assert not old.exists()
    printed = capsys.readouterr().out
    assert "vit_xs" in printed
    assert "Dice before" in printed
    after = json.loads((tmp_path / "metrics.json").read_text())["after"]["none"]
    assert after["dice"][0]["n"] == 12
    tuned, _ = torch_io.read_checkpoint(tmp_path / "merged.pth")
    base, _ = torch_io.read_checkpoint(demo.BASE)
    assert tuned.keys() == base.keys()
    for name in ("adapter.safetensors", "merged.safetensors", "overlays.png", "curve.png"):
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.slow
def test_the_base_checkpoint_s_script_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(base_checkpoint, "VALIDATION", 4)
    out = tmp_path / "base.pth"
    arguments = ["--out", str(out), "--steps", "2", "--phantoms", "8", "--batch-size", "2"]
    assert base_checkpoint.main(arguments) == 0
    assert sam.load(out).config == vit_xs()
    assert (
        "disc, none" in json.loads(out.with_suffix(".json").read_text())["dice_on_unseen_phantoms"]
    )


def test_a_missing_checkpoint_is_one_message(tmp_path, capsys):
    assert demo.main(["--ckpt", str(tmp_path / "none.pth"), "--out", str(tmp_path)]) == 1
    assert "none.pth" in capsys.readouterr().err
