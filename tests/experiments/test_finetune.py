"""The fine-tuning command, end to end on phantoms, and its answers to bad input."""

from __future__ import annotations

import json
import re
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

import tiny_models
from experiments import finetune
from experiments import segmentation as seg
from experiments.objectives import SingleMask
from samjax import SAM2ImagePredictor, SamModel
from samjax.data import FolderDataset, make_loader
from samjax.data.layouts.volumes import write_msd
from samjax.models.functional import bind
from samjax.models.ops import resize_bilinear_numpy
from samjax.models.weights import load_tensors, load_weights
from samjax.peft.adapter_files import read_adapter
from samjax.peft.lora import merge
from samjax.training.checkpoint import Preemption
from samjax.trees import flatten

ARRAYS = ("image", "size", "coords", "labels")


def command(folder, checkpoint, out, *more: str) -> list[str]:
    return [
        "--images", str(folder / "images"), "--masks", str(folder / "masks"),
        "--ckpt", str(checkpoint), "--out", str(out), "--steps", "4", "--batch-size", "4",
        "--validate-every", "2", "--no-progress", *more,
    ]  # fmt: skip


def history(out) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())["history"]


@pytest.mark.parametrize("method", ["lora", "decoder", "full", "galore+decoder"])
def test_a_run_leaves_all_its_results(phantom_folder, tiny_checkpoint, tmp_path, method, capsys):
    pytest.importorskip("torch")
    out = tmp_path / method
    modes = ["none", "points", "box"] if method == "lora" else ["box"]
    arguments = command(phantom_folder, tiny_checkpoint, out, "--method", method)
    assert finetune.main([*arguments, "--prompt", *modes]) == 0
    printed = capsys.readouterr().out
    assert all(mode in printed for mode in modes)
    content = json.loads((out / "metrics.json").read_text())
    assert [entry["step"] for entry in content["history"] if "loss" in entry] == [1, 2, 3, 4]
    assert list(content["after"]) == modes
    assert any((out / "tensorboard").iterdir())
    for picture in ("curve.png", "overlays.png"):
        with Image.open(out / picture) as opened:
            assert opened.size[0] > 300

    _, base = load_weights(tiny_checkpoint)
    _, merged = load_weights(out / "merged.safetensors")
    again = merge(base, read_adapter(out / "adapter.safetensors"))
    for path, leaf in flatten(merged).items():
        np.testing.assert_allclose(leaf, flatten(again)[path], atol=1e-7, err_msg=path)


def test_the_merged_pth_loads_into_meta_s_code(phantom_folder, tiny_checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    from convert.reference import build_reference_sam

    assert finetune.main(command(phantom_folder, tiny_checkpoint, tmp_path)) == 0
    config, _ = load_weights(tmp_path / "merged.safetensors")
    upstream = build_reference_sam(config)
    upstream.load_state_dict(torch.load(tmp_path / "merged.pth", weights_only=True), strict=True)


def test_sam2_is_tuned_and_goes_back_to_meta_s_code(phantom_folder, sam2_checkpoint, tmp_path):
    torch = pytest.importorskip("torch")
    from convert.reference import build_reference_sam2

    out = tmp_path / "sam2"
    arguments = command(phantom_folder, sam2_checkpoint, out, "--rank", "2", "--lr", "1e-2")
    assert finetune.main([*arguments, "--prompt", "box", "none"]) == 0
    losses = [entry["loss"] for entry in history(out) if "loss" in entry]
    assert losses[-1] < losses[0]
    config, merged = load_weights(out / "merged.safetensors")
    assert config == tiny_models.SAM2
    _, base = load_weights(sam2_checkpoint)
    before, after = flatten(base), flatten(merged)
    changed = [path for path in before if not np.array_equal(before[path], after[path])]
    blocks = sum(config.image_encoder.stages)
    assert sum("trunk/blocks" in path for path in changed) == blocks
    assert all(path.endswith(("/attn/qkv/kernel", "_proj/kernel")) for path in changed)
    upstream = build_reference_sam2(config)
    state = torch.load(out / "merged.pt", weights_only=True)["model"]
    upstream.load_state_dict(state, strict=True)


def test_sam2_is_scored_as_its_predictor_segments(sam2_checkpoint, phantom_folder):
    """Images that are no squares, stretched to the frame; a box as the prompt."""
    model = SamModel.load(sam2_checkpoint)
    dataset = FolderDataset(phantom_folder / "images", phantom_folder / "masks")
    size = model.config.image_size
    batches = make_loader(
        dataset,
        frame_size=size,
        fit=model.config.fit,
        batch_size=4,
        prompt_modes="box",
        box_jitter=0.0,
    )

    @jax.jit
    def segment(batch):
        prediction = bind(model.config, model.params)(*(batch[name] for name in ARRAYS))
        return SingleMask().logits(model.config, prediction, train=False)

    predictor = SAM2ImagePredictor(model)
    for batch in batches:
        scored = segment({name: batch[name] for name in ARRAYS})
        for row, index in enumerate(batch["index"]):
            image = dataset[int(index)]["image"]
            predictor.set_image(image)
            box = (batch["coords"][row, :2] * np.array(image.shape[1::-1]) / size[::-1]).ravel()
            _, _, low_res = predictor.predict(box=box, multimask_output=False)
            expected = resize_bilinear_numpy(low_res[0], size)
            # The loader's pixels are rounded, the predictor's are not.
            assert np.std(scored[row] - expected) < 0.02 * np.std(expected)


def test_a_seed_fixes_the_curve_even_of_a_run_that_was_interrupted(
    phantom_folder, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    def arguments(name, seed, *more):
        fixed = ("--seed", seed, "--dropout", "0.1", "--prompt", "points", "--no-torch-export")
        return command(phantom_folder, tiny_checkpoint, tmp_path / name, *fixed, *more)

    for name, seed in (("a", "5"), ("c", "6")):
        assert finetune.main(arguments(name, seed)) == 0
    assert history(tmp_path / "a") != history(tmp_path / "c")

    with monkeypatch.context() as at_step_3:
        at_step_3.setattr(Preemption, "requested", lambda self, step: step == 3)
        assert finetune.main(arguments("b", "5")) == 143
    assert f"{tmp_path}/b/checkpoints/3; continue with --resume" in capsys.readouterr().err
    assert not (tmp_path / "b/metrics.json").exists()

    assert finetune.main(arguments("b", "5")) == 1
    assert "holds a run, at step 3: continue it with --resume" in capsys.readouterr().err
    assert finetune.main(arguments("b", "5", "--resume", "--lr", "0.5")) == 1
    assert "lr: 0.001 then, 0.5 now" in capsys.readouterr().err

    assert finetune.main(arguments("b", "5", "--resume")) == 0
    assert "continuing after step 3" in capsys.readouterr().out
    assert history(tmp_path / "b") == history(tmp_path / "a")
    for name in ("merged.safetensors", "adapter.safetensors"):
        (one, _), (other, _) = (load_tensors(tmp_path / run / name) for run in "ab")
        assert sorted(one) == sorted(other)
        assert all(np.array_equal(one[path], other[path]) for path in one)


def test_cached_embeddings_change_nothing(phantom_folder, tiny_checkpoint, tmp_path, capsys):
    """Up to rounding: the encoder runs in another program."""
    more = ("--method", "decoder", "--augment", "none", "--no-torch-export", "--prompt", "points")
    curves = []
    for kind in ("no", "disk"):
        arguments = command(phantom_folder, tiny_checkpoint, tmp_path / kind, *more)
        assert finetune.main([*arguments, "--cache-embeddings", kind]) == 0
        curves.append([entry["loss"] for entry in history(tmp_path / kind) if "loss" in entry])
    np.testing.assert_allclose(curves[0], curves[1], rtol=1e-5)
    assert (tmp_path / "disk/embeddings_0/complete.json").exists()

    arguments = command(phantom_folder, tiny_checkpoint, tmp_path / "bad", "--no-torch-export")
    assert finetune.main([*arguments, "--augment", "none", "--cache-embeddings", "ram"]) == 1
    assert "--method lora trains the image encoder" in capsys.readouterr().err
    assert finetune.main([*arguments, "--method", "decoder", "--cache-embeddings", "ram"]) == 1
    assert "needs --augment none, not light" in capsys.readouterr().err


def test_a_loss_that_becomes_nan_stops_the_run(
    phantom_folder, tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    """With the step, the batch's files and the last good checkpoint."""
    real = seg.batch_loss

    def broken(tuning, trainable, frozen, batch, key):
        loss = real(tuning, trainable, frozen, batch, key)
        # They start at zero, and the second or third step takes them over the bar.
        moved = [abs(leaf).max() for path, leaf in flatten(trainable).items() if path[-2:] == "/b"]
        return jax.numpy.where(jax.numpy.stack(moved).max() > 7e-4, jax.numpy.nan, loss)

    monkeypatch.setattr(seg, "batch_loss", broken)
    arguments = command(phantom_folder, tiny_checkpoint, tmp_path, "--no-torch-export")
    assert finetune.main([*arguments, "--checkpoint-every", "1", "--lr", "0.01"]) == 1
    message = capsys.readouterr().err
    found = re.search(
        r"step (\d): the loss became nan; the batch held (.*); the last good", message
    )
    assert found, message
    assert message.rstrip().endswith(f"checkpoint is {tmp_path}/checkpoints/{int(found[1]) - 1}")
    batch = found[2].split(", ")
    assert len(batch) == 4
    assert set(batch) <= {path.stem for path in (phantom_folder / "images").iterdir()}


def test_several_classes_from_scratch_at_another_size(two_class_folder, tiny_checkpoint, tmp_path):
    more = ("--classes", "1", "2", "--method", "full", "--image-size", "80", "--accumulate", "2")
    arguments = command(two_class_folder, tiny_checkpoint, tmp_path, *more, "--no-torch-export")
    assert finetune.main(arguments) == 0
    config, _ = load_weights(tmp_path / "merged.safetensors")
    assert config.image_size == (80, 80)
    assert config.mask_tokens == 3
    after = json.loads((tmp_path / "metrics.json").read_text())["after"]["none"]
    assert len(after["dice"]) == 2


def _remove_masks(folder):
    for path in (folder / "masks").iterdir():
        path.unlink()


def _read(path):
    with Image.open(path) as opened:
        return np.array(opened)


def _resize_a_mask(folder):
    path = sorted((folder / "masks").iterdir())[0]
    Image.fromarray(_read(path)[:12, :10]).save(path)


def _unknown_value(folder):
    path = sorted((folder / "masks").iterdir())[0]
    values = _read(path)
    values[0, 0] = 77
    Image.fromarray(values).save(path)


def _truncate_an_image(folder):
    path = sorted((folder / "images").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-500])


def _nan_in_an_image(folder):
    path = sorted((folder / "images").iterdir())[0]
    values = np.full(_read(path).shape[:2], np.nan, np.float32)
    path.unlink()
    Image.fromarray(values).save(path.with_suffix(".tif"))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_remove_masks, "masks"),
        (_resize_a_mask, "colour_0000"),
        (_unknown_value, "77"),
        (_truncate_an_image, "colour_0000"),
        (_nan_in_an_image, "colour_0000.tif"),
    ],
)
def test_bad_data_stops_the_run_with_one_message(
    phantom_folder, tiny_checkpoint, tmp_path, capsys, spoil, expected
):
    shutil.copytree(phantom_folder, tmp_path / "data")
    spoil(tmp_path / "data")
    out = tmp_path / "out"
    arguments = command(tmp_path / "data", tiny_checkpoint, out, "--no-torch-export")
    assert finetune.main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("experiments.finetune: error: ")
    assert expected in message
    assert "Traceback" not in message
    assert not (out / "merged.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--rank", "999"), "rank 999 exceeds"),
        (("--accumulate", "3"), "no multiple of --accumulate 3"),
        (("--val-images", "somewhere"), "--val-masks"),
        (("--ckpt", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--image-size", "65"), "65"),
        (("--variant", "sam2.1_hiera_tiny"), "expected sam2.1_hiera_tiny, recognised custom"),
        (("--variant", "vit_z"), "no variant 'vit_z'; there are vit_b"),
    ],
)
def test_bad_settings_are_named(phantom_folder, tiny_checkpoint, tmp_path, capsys, more, expected):
    arguments = command(phantom_folder, tiny_checkpoint, tmp_path, "--no-torch-export", *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        code = finetune.main(arguments)
    assert code == 1
    assert expected in capsys.readouterr().err


def test_a_data_set_is_known_by_name(tmp_path):
    """Parted by patient; its own options, and those of its slices, reach it."""
    pytest.importorskip("nibabel")
    write_msd(tmp_path, cases=(1, 3, 4, 7, 8))
    arguments = finetune.Arguments(
        dataset="msd",
        source=tmp_path,
        test_split="test",
        take="middle",
        reader=("class_names=Anterior,Posterior",),
        variant="vit_xs",
        method="full",
        out=tmp_path / "out",
    )
    arguments.check()
    train, val, test = finetune.load_data(arguments)
    assert (len(train), len(val), len(test)) == (4, 1, 1)
    assert not set(train.patients) & set(val.patients)
    assert train.num_classes == 2
    assert train[0]["mask"].max() == 2
    assert test[0]["patient"] == "hippocampus_002"


def cluster(coordinator, processes, process):
    values = {"coordinator": coordinator, "processes": processes, "process": process}
    return tuple(part for name, value in values.items() for part in (f"--mesh.{name}", f"{value}"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--mesh.fsdp", "3"), "fsdp 3 x tensor 1 = 3 devices, but there are 1"),
        (("--mesh.process", "0"), "--mesh.processes and --mesh.process go with --mesh.coordinator"),
        (("--mesh.coordinator", "host:1"), "needs --mesh.processes and --mesh.process"),
        (cluster("host", 2, 0), "--mesh.coordinator host: expected HOST:PORT or auto"),
        (cluster("host:1", 2, 2), "--mesh.process 2: expected 0 to 1"),
        (("--dataset", "msd"), "give --images and --masks, or --dataset and --source"),
        (("--batch-size", "6", "--accumulate", "4"), "--batch-size 6 is no multiple of"),
        (("--resume", "--checkpoint-every", "0"), "--resume needs checkpoints"),
    ],
)
def test_settings_that_cannot_be_met(
    phantom_folder, tiny_checkpoint, tmp_path, capsys, more, message
):
    arguments = command(phantom_folder, tiny_checkpoint, tmp_path / "out", *more)
    assert finetune.main([*arguments, "--no-torch-export"]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
