"""Learning without labels: what SAMora's first stage trains by what, and runs that go on."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convert import mae as mae_files
from convert import simclr as simclr_files
from experiments import pretraining, samora, samora_stage1
from experiments.baselines import grown
from experiments.pretraining import SOURCES, Task
from experiments.record import read_records
from experiments.samora_stage1 import Cpt, Teacher, encode, expert, official, teacher_of
from experiments.training import Preempted
from experiments.trial import Trial
from samjax.data import DataError
from samjax.data import unlabelled as views
from samjax.models.denoiser import DenoiserConfig
from samjax.models.functional import bind, init_params
from samjax.models.hl_attention import install_experts
from samjax.models.mae import random_keep, vit_tiny
from samjax.models.ops import normalise_pixels
from samjax.models.projector import ProjectorConfig
from samjax.models.sk_resnet import SkResNetConfig
from samjax.models.weights import load_tensors, save_tensors
from samjax.training import loop
from samjax.training.checkpoint import CheckpointError, Preemption
from samjax.training.loop import TrainingError
from samjax.training.sharding import make_mesh
from samjax.trees import flatten, unflatten

SMALL = (24, 20, 3)  # voxels of a phantom
RESNET = SkResNetConfig(
    blocks=(1,), width_multiplier=1, channels=8, sk_min_channels=8, head_layers=2, head_channels=64
)
MAE = vit_tiny((96, 96))  # another size than the runs', which have 64


def shaken(tree, scale=0.1):
    """Noise on every parameter: where something starts at zero, no gradient passes."""
    rng = np.random.default_rng(0)
    return unflatten(
        {
            path: leaf + jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)
            for path, leaf in flatten(tree).items()
        }
    )


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Files of both teachers."""
    folder = tmp_path_factory.mktemp("teachers")
    resnet = dict(flatten(init_params(RESNET, 3)))
    files = {name: str(folder / f"{name}.safetensors") for name in ("simclr", "mae")}
    simclr_files.save(files["simclr"], RESNET, unflatten(resnet), {"variant": "own"})
    mae_files.save(files["mae"], MAE, shaken(init_params(MAE, 3)), {"variant": "tiny"})
    return files


def given(out, **options):
    short = {"image_size": 64, "seed": 0, "progress": False}
    return samora.Arguments(smoke=True, out=out, **{**short, **options})


def untrained(out, teachers, **options):
    """Options by which the experts learn from the teachers as they are in the files."""
    return given(out, cpt=Cpt(use=False), **teachers, **options)


# Teachers.


def test_teachers_start_from_files_or_from_scratch(teachers, tmp_path):
    for name, own in (("simclr", simclr_files), ("mae", mae_files)):
        found = official(given(tmp_path, **teachers), name)
        stored = flatten(own.load(teachers[name]).params)
        assert stored.keys() == flatten(found.params).keys()
        assert all(np.array_equal(leaf, stored[p]) for p, leaf in flatten(found.params).items())
        assert found.config.image_size == (64, 64)
        assert found.origin.startswith(f"{name}.safetensors (")
        scratch = official(given(tmp_path), name)
        assert scratch.origin == "scratch"
        assert not np.array_equal(*(jax.tree.leaves(t.params)[0] for t in (found, scratch)))
    # On real data the size of a fresh teacher is the paper's, unless a small one is asked for.
    real = given(tmp_path, data=tmp_path, image_size=224)
    real = dataclasses.replace(real, smoke=False)
    assert samora_stage1._from_scratch(real, "mae", 224).depth == 24
    assert samora_stage1._from_scratch(real, "simclr", 224).feature_channels == 4096
    small = dataclasses.replace(real, teachers="small")
    assert samora_stage1._from_scratch(small, "mae", 224).depth == 2
    assert samora_stage1._from_scratch(small, "simclr", 224).feature_channels == 1024


def test_tasks_of_teachers_start_from_those(teachers, tmp_path):
    options = given(tmp_path, **teachers, batch_size=4)
    for name, origin in (("simclr", "simclr.safetensors (own)"), ("mae", "mae.safetensors (tiny)")):
        task = getattr(samora_stage1, name)(options, 20)
        assert task.notes == (f"teacher started from {origin}",)
        assert not task.frozen
        file = tmp_path / f"{name}.safetensors"
        task.write(file, jax.tree.map(np.asarray, task.trainable))
        (first, _), (again, about) = (load_tensors(f) for f in (teachers[name], file))
        assert first.keys() == again.keys()
        assert all(np.array_equal(first[path], again[path]) for path in first)
        assert about["variant"] == "cpt"
    assert samora_stage1.simclr(options, 20).rate(2) == pytest.approx(0.1 * 0.3 * 4 / 256)
    assert samora_stage1.mae(options, 20).rate(2) == pytest.approx(0.1 * 1.5e-4 * 4 / 256)


def test_bad_teachers_are_named(teachers, tmp_path):
    with pytest.raises(ValueError, match=r"mae\.safetensors: a model of family 'mae'; expected"):
        official(given(tmp_path, simclr=teachers["mae"]), "simclr")
    fine = dataclasses.replace(MAE, patch_size=8)
    mae_files.save(tmp_path / "fine.safetensors", fine, init_params(fine), {"variant": "fine"})
    with pytest.raises(ValueError, match=r"fine\.safetensors: patches of 8 pixels; expected SAM's"):
        official(given(tmp_path, mae=str(tmp_path / "fine.safetensors")), "mae")


def test_an_expert_without_its_teacher_is_an_error(teachers, tmp_path):
    with pytest.raises(ValueError, match=r"--cpt\.no-use without --mae FILE: the teacher would be"):
        teacher_of(given(tmp_path, cpt=Cpt(use=False)), "mae")
    assert teacher_of(untrained(tmp_path, teachers), "mae").origin == "mae.safetensors (tiny)"
    message = r"stage1_simclr/teacher\.safetensors: no such file; .* --only stage1_simclr, or take"
    with pytest.raises(CheckpointError, match=message):
        teacher_of(given(tmp_path, **teachers), "simclr")
    # The one that was trained comes before the official one, each seed's its own.
    options = given(tmp_path, **teachers, seeds=(0, 5), seed=5)
    file = tmp_path / "stage1_simclr_seed5" / samora_stage1.TEACHER
    file.parent.mkdir()
    other = init_params(RESNET, 9)
    simclr_files.save(file, RESNET, other, {"variant": "cpt"})
    found = teacher_of(options, "simclr")
    assert found.origin == "teacher.safetensors (cpt)"
    assert np.array_equal(jax.tree.leaves(found.params)[0], jax.tree.leaves(other)[0])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=f"{file}: not a complete safetensors file"):
        teacher_of(options, "simclr")


# Experts.


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def expected_loss(name, project, teacher: Teacher, batch, key):
    """Each picture's loss, in NumPy, from its parts."""
    if name == "pixel":
        p = np.asarray(project(batch["noisy"]), np.float64).reshape(2, -1)
        y = np.asarray(batch["image"], np.float64).reshape(2, -1) / 255  # clean, 0 to 1
        dice = 1 - (2 * (p * y).sum(1) + 1e-5) / ((p + y).sum(1) + 1e-5)
        return 0.9 * dice + 0.1 * ((p - y) ** 2).mean(1)
    module = bind(teacher.config, teacher.params)
    if name == "image":  # each view by what the teacher makes of it
        parts = [
            (unit(project(view)) - unit(jax.jit(module.features)(view))) ** 2
            for view in (batch["view1"], batch["view2"])
        ]
        return np.mean([part.mean(1) for part in parts], axis=0)
    keep = np.asarray(random_keep(key, 2, 16, 0.75)[0])
    assert keep.shape == (2, 4)
    seen = np.asarray(jax.jit(module.encode)(batch["image"], jnp.asarray(keep)))[:, 1:]
    tokens = np.asarray(project(batch["image"]))  # (2, 4, 4, c)
    errors = [
        [
            ((unit(tokens[i, place // 4, place % 4]) - unit(seen[i, j])) ** 2).mean()
            for j, place in enumerate(keep[i])
        ]
        for i in range(2)
    ]
    shifted = [
        [
            ((unit(tokens[i, place // 4, place % 4]) - unit(seen[i, j - 1])) ** 2).mean()
            for j, place in enumerate(keep[i])
        ]
        for i in range(2)
    ]
    found, off = np.mean(errors, axis=1), np.mean(shifted, axis=1)
    assert (abs(off / found - 1) > 5e-3).all(), "another order would be told from this one"
    return found


HEADS = {
    "image": ProjectorConfig(features_in=32, hidden=32, features_out=32, pool=True),
    "patch": ProjectorConfig(features_in=32, hidden=32, features_out=64),
    "pixel": DenoiserConfig(features=32, widths=(16, 8, 8, 8, 8)),
}


@pytest.mark.parametrize("name", ["image", "patch", "pixel"])
def test_an_expert_learns_by_its_loss(teachers, tmp_path, monkeypatch, rng, name):
    """And whatever is trained gets a gradient, once no factor is zero."""
    monkeypatch.setattr(loop, "make_step", lambda loss, *_, **__: loss)
    options = untrained(tmp_path, teachers)
    task = expert(options, 40, name=name, rank=3, base="sam")
    trainable, key = shaken(task.trainable), jax.random.key(7)
    shape = (len(task.arrays), 2, 64, 64, 3)
    pictures = jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))
    batch = dict(zip(task.arrays, pictures, strict=True))
    loss = task.step(task.optimizer, None)

    @jax.jit
    def differentiate(trainable):
        def mean(trainable):
            each = loss(trainable, task.frozen, batch, key)
            return each.mean(), each

        return jax.grad(mean, has_aux=True)(trainable)

    gradient, found = differentiate(trainable)
    config, student = samora_stage1.student_of(options, "sam")

    @jax.jit
    def project(images):
        tokens, embedding = encode(options, config, student, trainable, images)
        head = bind(HEADS[name], trainable["head"])
        return head(tokens if name == "patch" else embedding)

    teacher = None if name == "pixel" else teacher_of(options, samora_stage1._TEACHER_OF[name])
    expected = expected_loss(name, project, teacher, batch, key)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert [path for path, leaf in flatten(gradient).items() if not leaf.any()] == []
    assert gradient["gain"].shape == (2,)
    assert gradient["gain"].all()
    assert {path.rsplit("/", 2)[1] for path in flatten(task.trainable["factors"])} == {"q", "v"}
    assert (task.trainable["gain"] == 1).all()
    assert task.draw is {"image": views.of_samora, "patch": views.plain, "pixel": views.noisy}[name]


@pytest.mark.parametrize("base", ["sam", "sam2"])
def test_the_second_stage_sees_the_expert_that_was_trained(tmp_path, rng, base):
    """A block with a sum of one expert is a block with its factors beside qkv."""
    options = given(tmp_path)
    config, params = samora_stage1.student_of(options, base)
    task = expert(options, 40, name="pixel", rank=3, base=base)
    blocks = task.trainable["gain"].shape[0]
    trainable = {
        "factors": shaken(task.trainable["factors"]),
        "gain": jnp.asarray(rng.uniform(0.5, 2, blocks), jnp.float32),
    }
    images = jnp.asarray(rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))
    fields = {"experts": ("pixel",), "fusion": "sum", "expert_rank": 3}
    own = samora.config_of(config, base, fields)
    file = tmp_path / samora_stage1.EXPERT
    task.write(file, {**trainable, "head": {}})
    factors, gains = samora_stage1.read_expert(file, "pixel", samora_stage1.base_of(params))
    tree = install_experts(grown(own, params, 0), {"pixel": factors}, {"pixel": gains})

    @jax.jit
    def both(trainable, tree):
        first = encode(options, config, params, trainable, images)[1]
        encoder = bind(own, tree).image_encoder
        if base == "sam":
            return first, encoder(normalise_pixels(own, images, None))
        return first, encoder.neck(encoder.trunk(normalise_pixels(own, images, None)))[2]

    first, second = both(trainable, tree)
    assert first.shape == (2, 4, 4, config.image_encoder.out_channels)
    assert np.abs(first - second).max() < 1e-5 * np.std(second)
    off, _ = both({**trainable, "gain": jnp.zeros(blocks)}, tree)
    assert np.abs(off - second).max() > 0.01 * np.std(second)


def test_experts_of_another_name_or_base_are_refused(tmp_path):
    options = given(tmp_path)
    _, params = samora_stage1.student_of(options, "sam")
    task = expert(options, 40, name="pixel", rank=3, base="sam")
    file, base = tmp_path / "expert.safetensors", samora_stage1.base_of(params)
    with pytest.raises(CheckpointError, match=f"{file}: no such file; train the experts first"):
        samora_stage1.read_expert(file, "pixel", base)
    task.write(file, task.trainable)
    factors, gains = samora_stage1.read_expert(file, "pixel", base)
    for path, leaf in flatten(task.trainable["factors"]).items():
        np.testing.assert_array_equal(flatten(factors)[path], leaf)
    assert gains == [1, 1]
    with pytest.raises(ValueError, match=f"{file}: of the expert 'pixel'; expected 'image'"):
        samora_stage1.read_expert(file, "image", base)
    other = samora_stage1.base_of(init_params(samora_stage1.student_of(options, "sam")[0], 1))
    with pytest.raises(ValueError, match=f"{file}: trained on another base model, or at another"):
        samora_stage1.read_expert(file, "pixel", other)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{file}: not a complete safetensors file"):
        samora_stage1.read_expert(file, "pixel", base)


# Data.


def test_sources_are_read_without_labels(tmp_path):
    found = {}
    for name, source in SOURCES.items():
        source.write(tmp_path / source.folder, shape=SMALL)
        if name != "msd":  # whose reader wants them
            for file in tmp_path.rglob("*"):
                labels = file.parent.name.startswith("labels") or "segmentation" in file.name
                if file.is_file() and labels:
                    file.unlink()
        parts = source.slices(tmp_path)
        alone = source.slices(tmp_path / source.folder)  # --data may be the folder itself
        assert {k: len(v) for k, v in parts.items()} == {k: len(v) for k, v in alone.items()}
        found |= parts
    assert set(found) == {"amos22_ct", "amos22_mri", "lits", "kits19", "msd"}
    for part in found.values():
        image = part[0]["image"]
        assert len(part) >= 3
        assert image.dtype == np.uint8
        assert image.shape[2] == 3
    gone = next(tmp_path.rglob("labelsTr/hippocampus_*.nii.gz"))
    gone.unlink()
    with pytest.raises(DataError, match=gone.name):
        SOURCES["msd"].slices(tmp_path)


def test_unknown_sources_are_named():
    with pytest.raises(ValueError, match="--unlabelled acdc: expected some of amos22, lits"):
        pretraining.chosen(("lits", "acdc"))
    with pytest.raises(ValueError, match="--unlabelled without a name: expected"):
        pretraining.chosen(())


# Runs.


def tiny_task(steps, broken_after=None, offset=-0.5):
    """A mean grey value, learned in noise of each step's key."""

    def loss(trainable, frozen, batch, key):
        image = batch["image"].astype(jnp.float32).mean((1, 2, 3)) / 255
        noise = jax.random.normal(key, image.shape)
        each = (trainable["mean"] + frozen["offset"] - image + 0.1 * noise) ** 2
        if broken_after is not None:
            each = jnp.where(trainable["mean"] > broken_after, jnp.nan, each)
        return each

    rate = optax.linear_schedule(0.1, 0, steps)
    return Task(
        {"mean": jnp.zeros(())},
        {"offset": jnp.full((), offset)},
        views.of_mae,
        ("image",),
        rate,
        optax.adam(rate),
        lambda optimizer, placement: loop.make_step(loss, optimizer, placement=placement),
        lambda file, trained: save_tensors(file, trained, {}),
        ("a note",),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("lits", "msd"):
        SOURCES[name].write(folder / SOURCES[name].folder, shape=SMALL)
    return folder


def pretrain(data, out, task_of=tiny_task, **options):
    options = given(out, batch_size=3, **{"steps": 6, **options})
    trial = Trial(
        experiment="own", table="stage 1", method="mean", run="mean", options=options,
        build=samora._no_tuning, tests=(), smoke=True, settings={"beside": 1},
    )  # fmt: skip
    return pretraining.run(
        trial, make_mesh(), sources=pretraining.chosen(("lits", "msd")), data=data, side=16,
        store=out / "slices", result="mean.safetensors", task_of=task_of,
    )  # fmt: skip


def test_a_run_leaves_its_result_and_a_record_without_scores(data, tmp_path):
    record = pretrain(data, tmp_path)
    (stored,) = read_records(tmp_path / "mean")
    assert dataclasses.replace(record, settings=stored.settings) == stored
    assert stored.settings.keys() == record.settings.keys()
    assert record.scores == []
    assert record.parameters == {"trainable": 1, "total": 2}
    assert record.memory == {"weights": 8, "gradients": 4, "state": 16}  # two moments, two counts
    assert [entry["step"] for entry in record.history] == [1, 2, 3, 4, 5, 6]
    assert [entry["learning_rate"] for entry in record.history] == pytest.approx(
        [0.1 * (1 - step / 6) for step in range(6)]
    )
    assert set(record.data) == {"unlabelled lits", "unlabelled msd"}
    assert record.notes == ("a note",)
    assert record.settings["beside"] == 1
    assert record.images_per_second > 0
    assert set(load_tensors(tmp_path / "mean" / "mean.safetensors")[0]) == {"mean"}
    assert (tmp_path / "mean" / "curve.png").stat().st_size
    assert len(list((tmp_path / "slices").iterdir())) == 2


def test_a_seed_fixes_a_run(data, tmp_path):
    first, again, other = (
        pretrain(data, tmp_path / name, seed=seed)
        for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    assert first.history == again.history != other.history
    epoch = pretrain(data, tmp_path / "epoch", steps=None, epochs=1)
    slices = sum(len(part) for s in ("lits", "msd") for part in SOURCES[s].slices(data).values())
    assert len(epoch.history) == slices // 3


def test_a_loss_that_becomes_nan_names_the_slices_and_the_last_checkpoint(data, tmp_path):
    broken = partial(tiny_task, broken_after=0.2)
    message = r"step (\d): the loss became nan; the batch held the slices \[.*\]; the last good .*"
    with pytest.raises(TrainingError, match=message):
        pretrain(data, tmp_path, broken, checkpoint_every=1)
    assert not (tmp_path / "mean" / "mean.safetensors").exists()


def interrupted_at(patch, step):
    """SIGTERM comes while that step runs."""
    asked = Preemption.requested

    def requested(self, now):
        if now == step:
            signal.raise_signal(signal.SIGTERM)
        return asked(self, now)

    patch.setattr(Preemption, "requested", requested)


def test_a_stopped_run_is_gone_on_with_as_it_was_or_not_at_all(data, tmp_path, monkeypatch, capsys):
    whole = pretrain(data, tmp_path / "whole")
    out, folder = tmp_path / "stopped", tmp_path / "stopped" / "mean" / "checkpoints"
    with monkeypatch.context() as at_step_3:
        interrupted_at(at_step_3, 3)
        with pytest.raises(Preempted, match=rf"SIGTERM at step 3; the last good .* {folder}/3"):
            pretrain(data, out)
    with pytest.raises(CheckpointError, match=f"{folder} holds a run, at step 3: continue it with"):
        pretrain(data, out)
    with pytest.raises(CheckpointError, match=r"(?s)other settings:.*seed: 0 then, 1 now"):
        pretrain(data, out, resume=True, seed=1)
    with pytest.raises(CheckpointError, match=r"(?s)other settings:.*base: '"):
        pretrain(data, out, partial(tiny_task, offset=0.5), resume=True)
    again = pretrain(data, out, resume=True)
    assert "continuing after step 3" in capsys.readouterr().out
    assert again.history == whole.history
    one, other = (
        load_tensors(f / "mean" / "mean.safetensors")[0] for f in (out, tmp_path / "whole")
    )
    assert one["mean"] == other["mean"]
    # Without a checkpoint there is nothing to go on from, and it starts anew.
    assert pretrain(data, tmp_path / "new", resume=True).history == whole.history


def test_sigterm_at_the_last_step_is_no_interruption(data, tmp_path, monkeypatch):
    interrupted_at(monkeypatch, 6)
    assert len(pretrain(data, tmp_path).history) == 6


COMMAND = [
    *("--smoke", "--unlabelled", "msd", "--sets", "--few", "--ablations", "--ranks"),
    *("--stage1.steps", "4", "--cpt.steps", "4"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "result"),
    [("pixel", "expert"), ("mae", "teacher"), ("simclr", "teacher")],
)
def test_an_interrupted_command_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys, run, result):
    """Exit code 143, then --resume; masks are drawn and running statistics kept as they were."""
    only = ["--only", f"stage1_{run}"]
    assert samora.main([*COMMAND, "--out", str(tmp_path / "a"), *only]) == 0
    for kept in ("phantoms", "slices"):
        shutil.copytree(tmp_path / "a" / kept, tmp_path / "b" / kept)
    arguments = [*COMMAND, "--out", str(tmp_path / "b"), *only]
    folder = tmp_path / "b" / f"stage1_{run}"
    with monkeypatch.context() as at_step_2:
        interrupted_at(at_step_2, 2)
        assert samora.main(arguments) == 143
    message = f"the last good checkpoint is {folder}/checkpoints/2; continue with --resume"
    assert f"experiments.samora: SIGTERM at step 2; {message}" in capsys.readouterr().err
    assert not (folder / f"{result}.safetensors").exists()
    assert samora.main([*arguments, "--resume"]) == 0
    assert "continuing after step 2" in capsys.readouterr().out
    (one, about), (other, also) = (
        load_tensors(tmp_path / name / f"stage1_{run}" / f"{result}.safetensors") for name in "ab"
    )
    assert about == also
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[path], other[path]) for path in one)
    first, again = (read_records(tmp_path / name)[0] for name in "ab")
    assert first.history == again.history
    assert [entry["step"] for entry in again.history] == [1, 2, 3, 4]
