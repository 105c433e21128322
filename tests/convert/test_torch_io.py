"""Every kind of checkpoint file is read; nothing in one is ever run."""

import argparse
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from convert.torch_io import CheckpointError, read_checkpoint, write_torch  # noqa: E402

WEIGHTS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
    "a.bias": torch.tensor([1.5, -2.25]),
}


def same(arrays: dict[str, np.ndarray], expected=WEIGHTS) -> bool:
    return arrays.keys() == expected.keys() and all(
        np.array_equal(arrays[name], expected[name].float().numpy()) for name in arrays
    )


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def save_bare(path):
    torch.save(WEIGHTS, path)


def save_legacy(path):
    torch.save({"model": WEIGHTS}, path, _use_new_zipfile_serialization=False)


def save_training(path):
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 7,
        "model_state_dict": {f"module.{name}": tensor for name, tensor in WEIGHTS.items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": {"base_lrs": [0.1], "last_epoch": 3},
        "loss": torch.tensor(0.5),
        "metrics": {"dice": torch.tensor(0.5)},
        "rng": {"cpu": torch.get_rng_state()},
        "best": np.float64(0.25),
        "history": np.arange(3.0),
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
    }
    torch.save(content, path)


def save_compiled(path):
    torch.save(
        {"state_dict": {f"_orig_mod.module.{n}": t for n, t in WEIGHTS.items()}, "x": None}, path
    )


def save_safetensors(path):
    save_file(WEIGHTS, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("save", "container", "key", "prefix"),
    [
        (save_bare, "zip", "", ""),
        (save_legacy, "legacy pickle", "model", ""),
        (save_training, "zip", "model_state_dict", "module."),
        (save_compiled, "zip", "state_dict", "_orig_mod.module."),
        (save_safetensors, "safetensors", "", ""),
    ],
)
def test_forms(tmp_path: Path, save, container: str, key: str, prefix: str):
    path = tmp_path / "checkpoint.bin"  # a name that says nothing
    save(path)
    arrays, info = read_checkpoint(path)
    assert same(arrays)
    assert (info.container, info.key, info.prefix) == (container, key, prefix)
    assert info.dtypes == {"float32": 2}
    assert len(info.sha256) == 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("container", ["pth", "safetensors"])
def test_dtypes(tmp_path: Path, dtype, container: str):
    stored = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    path = tmp_path / f"x.{container}"
    torch.save(stored, path) if container == "pth" else save_file(stored, path)
    arrays, info = read_checkpoint(path)
    assert same(arrays, stored)
    assert all(array.dtype == np.float32 for array in arrays.values())
    assert info.dtypes == {str(dtype).removeprefix("torch."): 2}


def test_views_and_parameters(tmp_path: Path):
    """Tensors that share storage, are strided, or are parameters."""
    base = torch.randn(5, 4)
    stored = {"t": base.T, "row": base[1], "p": torch.nn.Parameter(base[::2])}
    torch.save(stored, tmp_path / "x.pth")
    arrays, _ = read_checkpoint(tmp_path / "x.pth")
    for name, tensor in stored.items():
        assert np.array_equal(arrays[name], tensor.detach().numpy())
        assert arrays[name].flags.c_contiguous


def test_real_legacy_training_checkpoint(shared_data: Path):
    path = shared_data / "torch_checkpoint_lwnet" / "wnet_drive_model_checkpoint.pth"
    arrays, info = read_checkpoint(path)
    assert (info.container, info.key) == ("legacy pickle", "model_state_dict")
    assert len(arrays) == 240
    assert sum(array.size for array in arrays.values()) == 69_572
    assert info.dtypes == {"float32": 206, "int64": 34}


@pytest.mark.parametrize("name", ["sam2_hiera_tiny", "sam2_hiera_small", "sam2.1_hiera_small"])
def test_real_half_precision_files(shared_data: Path, name: str):
    folder = shared_data / "sam2_prompt_encoder_weights"
    arrays, info = read_checkpoint(folder / f"{name}.sam_prompt_encoder.fp16.pt")
    assert set(info.dtypes) == {"float16"}
    assert all(array.dtype == np.float32 for array in arrays.values())
    key = "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
    assert arrays[key].shape == (2, 128)


def test_several_state_dicts(tmp_path: Path):
    other = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    torch.save({"model": other, "ema": {"shadow": WEIGHTS}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"'model' \(2 tensors\), 'ema.shadow' \(2 tensors\)"):
        read_checkpoint(tmp_path / "x.pth")
    arrays, info = read_checkpoint(tmp_path / "x.pth", key="ema.shadow")
    assert same(arrays)
    assert info.key == "ema.shadow"
    with pytest.raises(CheckpointError, match=r"no state dict under 'teacher'.*model, ema"):
        read_checkpoint(tmp_path / "x.pth", key="teacher")


@pytest.mark.parametrize(
    "options",
    [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}],
    ids=["zip", "legacy", "protocol 4"],
)
def test_malicious_checkpoint_is_refused(tmp_path: Path, options):
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    torch.save({"model": WEIGHTS, "extra": Evil(proof)}, path, **options)
    with pytest.raises(
        CheckpointError, match=r"evil\.pth: refused.*'posix\.mkdir'.*Nothing was run"
    ):
        read_checkpoint(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("protocol", "complaint"),
    [(0, "neither"), (2, r"refused.*posix\.mkdir"), (5, "refused.*posix")],
)
def test_malicious_plain_pickle_is_refused(tmp_path: Path, protocol: int, complaint: str):
    path, proof = tmp_path / "evil.pkl", tmp_path / "proof"
    path.write_bytes(pickle.dumps(Evil(proof), protocol=protocol))
    with pytest.raises(CheckpointError, match=rf"evil\.pkl: {complaint}"):
        read_checkpoint(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    "name", ["numpy.core.multiarray.scalar", "argparse.Namespace", "numpy.dtype"]
)
def test_stand_ins_are_inert(tmp_path: Path, name: str):
    """The few other names that are let through build nothing, whatever they are given."""
    module, _, function = name.rpartition(".")
    # x = function("os"); its state becomes {"__class__": "boom"}
    body = b"\x80\x02}X\x01\x00\x00\x00xc%b\n%b\nX\x02\x00\x00\x00os\x85R" % (
        module.encode(),
        function.encode(),
    )
    body += b"}X\x09\x00\x00\x00__class__X\x04\x00\x00\x00booms" + b"bs."
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", body)
        archive.writestr("x/version", "3\n")
    with pytest.raises(CheckpointError, match=r"holds no state dict .*x \(" + function):
        read_checkpoint(tmp_path / "x.pth")


def test_whole_model_is_refused(tmp_path: Path):
    torch.save(torch.nn.Linear(2, 3), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"'torch\.nn\.modules\.linear\.Linear'.*state_dict"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("save", [save_bare, save_legacy, save_safetensors])
def test_truncated(tmp_path: Path, save):
    whole, path = tmp_path / "whole", tmp_path / "broken.pth"
    save(whole)
    content = whole.read_bytes()
    for length in range(1, len(content), 7 if save is save_legacy else 29):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"broken\.pth: .*(truncated|neither)"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "the file is empty"),
        (b"\n<!DOCTYPE html><html>404", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git-LFS pointer"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"hello", "neither a PyTorch checkpoint nor"),
        (bytes(100), "neither a PyTorch checkpoint nor"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, complaint: str):
    path = tmp_path / "sam_vit_b.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"sam_vit_b\.pth: .*{complaint}"):
        read_checkpoint(path)


def test_other_archives(tmp_path: Path):
    for member, complaint in [("x/constants.pkl", "TorchScript"), ("weights.npy", "not one that")]:
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
            archive.writestr(member, b"")
        with pytest.raises(CheckpointError, match=complaint):
            read_checkpoint(tmp_path / "x.pth")


def test_absent_file_and_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"absent\.pth: cannot be read: No such file"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1, 2], "holds no state dict .* but a list"),
        ({"epoch": 3}, r"a dict of epoch \(int\)"),
        ({}, "holds no state dict"),
        ({"w": torch.tensor([1.0, float("nan")]), "b": torch.ones(1)}, "1 of 2 tensors: w"),
        ({"w": torch.tensor([float("inf")]).half()}, "NaN or infinite values .*: w"),
        ({"w": torch.tensor([1e300], dtype=torch.float64)}, "infinite values .*: w"),
        ({"w": torch.eye(3).to_sparse(), "b": torch.ones(1)}, "'w' is sparse"),
        ({"w": torch.ones(2, dtype=torch.complex64), "b": torch.ones(1)}, "'w' is complex"),
        ({"w": torch.ones(2, device="meta")}, "'w' is without data"),
    ],
)
def test_unusable_content(tmp_path: Path, content, complaint: str):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"x\.pth: .*{complaint}"):
        read_checkpoint(tmp_path / "x.pth")


def test_write_torch(tmp_path: Path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.zeros(0, np.float32)}
    write_torch(tmp_path / "x.pth", arrays)
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)
    assert list(loaded) == ["a", "b"]
    for name, tensor in loaded.items():
        assert tensor.is_contiguous()
        assert np.array_equal(tensor.numpy(), arrays[name])
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
