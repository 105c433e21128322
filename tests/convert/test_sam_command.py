"""`python -m convert.sam`: what it writes, what it says, and that an error writes nothing."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from convert.sam import load, main, sam_model_registry  # noqa: E402
from samjax.models.weights import load_weights  # noqa: E402
from samjax.trees import flatten  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def ckpt(tmp_path: Path, tiny_state_dict: dict[str, np.ndarray]) -> Path:
    """The tiny model as a PyTorch file, in a folder of its own."""
    path = tmp_path / "tiny.pth"
    torch.save({key: torch.from_numpy(array) for key, array in tiny_state_dict.items()}, path)
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fails(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What the command says on stderr when it fails; checks the exit code."""
    assert main([str(argument) for argument in argv]) == 1
    said = capsys.readouterr().err
    assert said.startswith("convert.sam: error: ")
    assert "Traceback" not in said
    return said


def test_there_and_back(ckpt: Path, tiny_config, tiny_params, tiny_state_dict, capsys):
    assert main(["--ckpt", str(ckpt)]) == 0
    said = capsys.readouterr().out
    converted = ckpt.with_suffix(".safetensors")
    count = sum(array.size for array in tiny_state_dict.values())
    info = load(ckpt).metadata
    for expected in (
        "custom (width 24, depth 3, heads 2), image 48 x 80, 5 mask tokens",
        f"tensors        {len(tiny_state_dict)}",
        f"parameters     {count:,}",
        f"sha256         {info['sha256']}",
        f"written to     {converted}",
    ):
        assert expected in said
    assert files(ckpt.parent) == ["tiny.pth", "tiny.safetensors"]

    config, params = load_weights(converted)
    assert config == tiny_config
    ours, expected = flatten(params), flatten(tiny_params)
    assert ours.keys() == expected.keys()
    assert all(np.asarray(ours[p]).tobytes() == expected[p].tobytes() for p in expected)
    with safe_open(converted, framework="np") as stream:
        metadata = stream.metadata()
    assert json.loads(metadata.pop("config"))
    assert metadata.pop("family") == "sam"
    assert metadata == {"variant": "custom", "sha256": info["sha256"], "source": "tiny.pth"}

    back = ckpt.parent / "back.pth"
    assert main(["--ckpt", str(converted), "--to-torch", str(back)]) == 0
    loaded = torch.load(back, weights_only=True)
    assert loaded.keys() == tiny_state_dict.keys()
    for key, array in tiny_state_dict.items():
        assert loaded[key].numpy().tobytes() == array.tobytes()


def test_out(ckpt: Path):
    target = ckpt.parent / "new" / "model.safetensors"
    assert main(["--ckpt", str(ckpt), "--out", str(target)]) == 0
    assert files(ckpt.parent) == ["new", "tiny.pth"]
    assert files(target.parent) == ["model.safetensors"]


def test_safetensors_in_upstream_layout(tmp_path: Path, tiny_state_dict):
    """Recognised as a checkpoint to convert, not as a converted file."""
    source, target = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    save_file(tiny_state_dict, source, metadata={"format": "pt"})
    assert main(["--ckpt", str(source), "--out", str(target)]) == 0
    assert load(target).config == load(source).config


def test_training_checkpoint_is_described(tmp_path: Path, tiny_state_dict, capsys):
    path = tmp_path / "epoch_3.pth"
    wrapped = {f"module.sam.{k}": torch.from_numpy(a).half() for k, a in tiny_state_dict.items()}
    torch.save({"model": wrapped, "epoch": 3}, path)
    assert main(["--ckpt", str(path)]) == 0
    said = capsys.readouterr().out
    assert "found under    'model'" in said
    assert "prefix         'module.sam.' taken off every key" in said
    assert f"stored as      {len(wrapped)} float16 (zip)" in said


def test_all_mismatches_at_once(ckpt: Path, tiny_state_dict, capsys):
    broken = {key: torch.from_numpy(array) for key, array in tiny_state_dict.items()}
    del broken["image_encoder.blocks.1.attn.qkv.bias"]
    broken["image_encoder.head.weight"] = torch.ones(2, 3)
    broken["mask_decoder.iou_token.weight"] = torch.ones(1, 31)
    torch.save(broken, ckpt)
    said = fails(capsys, "--ckpt", ckpt)
    assert f"{ckpt} does not fit the model: 1 missing, 1 left over, 1 of another shape" in said
    assert "missing      image_encoder.blocks.1.attn.qkv.bias (72,)" in said
    assert "left over    image_encoder.head.weight (2, 3)" in said
    assert "mask_decoder.iou_token.weight: expected (1, 32), found (1, 31)" in said
    assert files(ckpt.parent) == ["tiny.pth"]


def test_variant(ckpt: Path, capsys):
    said = fails(capsys, "--ckpt", ckpt, "--variant", "vit_b")
    assert f"{ckpt}: expected vit_b, recognised custom (width 24, depth 3, heads 2)" in said
    said = fails(capsys, "--ckpt", ckpt, "--variant", "vit_z")
    assert "no variant 'vit_z'; there are vit_b, vit_l, vit_h" in said
    assert files(ckpt.parent) == ["tiny.pth"]


def test_other_models(tmp_path: Path, capsys):
    path = tmp_path / "sam2.pt"
    torch.save({"model": {"image_encoder.trunk.pos_embed": torch.ones(1)}}, path)
    assert f"{path}: not a SAM (v1) checkpoint: it looks like SAM 2" in fails(
        capsys, "--ckpt", path
    )
    torch.save({"conv.weight": torch.ones(1)}, path)
    assert "none of its tensors is SAM's" in fails(capsys, "--ckpt", path)
    assert files(tmp_path) == ["sam2.pt"]


def test_real_checkpoint_of_another_model(shared_data: Path, tmp_path: Path, capsys):
    path = shared_data / "torch_checkpoint_lwnet" / "wnet_drive_model_checkpoint.pth"
    said = fails(capsys, "--ckpt", path, "--out", tmp_path / "x.safetensors")
    assert f"{path}: not a SAM (v1) checkpoint" in said
    assert files(tmp_path) == []


def test_outputs_that_make_no_sense(ckpt: Path, capsys):
    converted = ckpt.with_suffix(".safetensors")
    assert main(["--ckpt", str(ckpt)]) == 0
    for argv, complaint in [
        (["--ckpt", converted], "is converted already; give --to-torch"),
        (["--ckpt", converted, "--out", converted], "would overwrite the checkpoint itself"),
        (["--ckpt", ckpt, "--to-torch", ckpt], "would overwrite the checkpoint itself"),
        (["--ckpt", ckpt, "--to-torch", "a", "--out", "b"], "exclude each other"),
        (["--ckpt", ckpt, "--adapter", "a"], "name the file with --out or --to-torch"),
        (["--ckpt", ckpt.parent / "absent.pth"], "absent.pth: cannot be read: No such file"),
    ]:
        assert complaint in fails(capsys, *argv)
    assert files(ckpt.parent) == ["tiny.pth", "tiny.safetensors"]


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file of this process may grow beyond `size` bytes: a stand-in for a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("option", ["--out", "--to-torch"])
@pytest.mark.parametrize("older", [True, False])
def test_disk_full(ckpt: Path, capsys, option: str, older: bool):
    target = ckpt.parent / "target.safetensors"
    if older:
        target.write_text("older")
    with file_size_limit(100_000):
        said = fails(capsys, "--ckpt", ckpt, option, target)
    assert f"cannot write {target}: the file exceeds the largest size allowed here" in said
    assert "nothing was written" in said
    assert files(ckpt.parent) == (["target.safetensors"] if older else []) + ["tiny.pth"]
    assert not older or target.read_text() == "older"


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def test_as_a_command(tmp_path: Path):
    """The exit code and stderr of a process of its own."""
    path = tmp_path / "evil.pth"
    torch.save({"model": {"w": torch.ones(1)}, "extra": Evil(tmp_path / "proof")}, path)
    done = subprocess.run(
        [sys.executable, "-m", "convert.sam", "--ckpt", str(path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"{path}: refused. Opening this file would call 'posix.mkdir'" in done.stderr
    assert files(tmp_path) == ["evil.pth"]


def test_adapter_is_merged(ckpt: Path, tiny_params, tiny_state_dict, capsys):
    from samjax.peft.adapter_files import write_adapter
    from samjax.peft.lora import Adapter, LoraConfig, init_factors, merge

    factors = init_factors(tiny_params, LoraConfig(rank=2), jax.random.key(0))
    factors = jax.tree.map(lambda leaf: leaf + 1.0, factors)
    adapter = Adapter(factors=factors, scale=0.5)
    folder = ckpt.parent
    write_adapter(folder / "adapter.safetensors", adapter)
    argv = ["--ckpt", str(ckpt), "--adapter", str(folder / "adapter.safetensors")]
    assert main([*argv, "--to-torch", str(folder / "merged.pth")]) == 0
    assert "merged         " in capsys.readouterr().out
    merged = torch.load(folder / "merged.pth", weights_only=True)
    key = "image_encoder.blocks.0.attn.qkv.weight"
    assert [k for k in merged if not np.array_equal(merged[k], tiny_state_dict[k])] == [
        f"image_encoder.blocks.{index}.attn.qkv.weight" for index in range(3)
    ]
    expected = merge(tiny_params, adapter)["image_encoder"]["blocks"]["0"]["attn"]["qkv"]["kernel"]
    assert np.array_equal(merged[key].numpy(), np.asarray(expected).T)
    assert np.array_equal(merged[key][24:48], tiny_state_dict[key][24:48])  # k is not adapted

    target = folder / "merged.safetensors"
    assert main([*argv, "--out", str(target)]) == 0
    assert load(target).metadata["adapter"] == "adapter.safetensors"


def test_adapter_that_is_none(ckpt: Path, capsys):
    argv = ["--ckpt", ckpt, "--to-torch", ckpt.parent / "x.pth", "--adapter", ckpt]
    assert str(ckpt) in fails(capsys, *argv)
    assert files(ckpt.parent) == ["tiny.pth"]


def test_registry_refuses_another_variant(ckpt: Path):
    assert set(sam_model_registry) == {"default", "vit_h", "vit_l", "vit_b"}
    with pytest.raises(ValueError, match="expected vit_l, recognised custom"):
        sam_model_registry["vit_l"](checkpoint=ckpt)
    assert main(["--ckpt", str(ckpt)]) == 0
    with pytest.raises(ValueError, match="expected vit_h, recognised custom"):
        sam_model_registry["default"](checkpoint=str(ckpt.with_suffix(".safetensors")))
