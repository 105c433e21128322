"""SAMSEG: what is trained, on which slices, by which loss, and what it says of bad input."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_models
from experiments import published, samseg
from experiments import segmentation as seg
from experiments.modalities import SETS, OfModalities, load, of_modality
from experiments.paper import tiny_sam2
from experiments.record import read_records
from samjax.data import DataError, Subset
from samjax.data.layouts import volumes
from samjax.frame import pad_to_frame, resize, size_in_frame
from samjax.models.functional import abstract_params, init_params
from samjax.models.mask_decoder import MaskPrediction
from samjax.models.sam import vit_b
from samjax.models.weights import save_weights
from samjax.trees import flatten

CONFIG = tiny_models.SAM  # a frame of 48 x 80
FOUR = ("t1c", "t1n", "t2f", "t2w")


@pytest.fixture(scope="module")
def brats(tmp_path_factory):
    """Five phantoms of four patients, 48 x 40 x 6 voxels."""
    root = tmp_path_factory.mktemp("brats")
    volumes.write_brats_men(root, shape=(48, 40, 6))
    return root


@pytest.fixture(scope="module")
def opened(brats):
    return SETS["brats_men"].open(brats, (), 0)


def given(data, **options):
    return samseg.Arguments(data=data, ckpt="none.pth", **{"progress": False, **options})


@pytest.mark.parametrize("rank", [4, 64, 128, 256])
def test_trainable_parameters_are_36864_a_rank(rank):
    params = abstract_params(vit_b())
    tuned = jax.eval_shape(lambda: samseg.prepared(vit_b(), params, "lora", rank=rank).trainable)
    leaves = flatten(tuned)
    assert sum(leaf.size for leaf in leaves.values()) == 36_864 * rank
    assert len(leaves) == 12 * 2 * 2
    assert all("/attn/qkv/" in path and path.startswith("factors/image_enc") for path in leaves)


def test_factors_begin_as_loralib_has_them(tiny_config):
    tuning = samseg.prepared(tiny_config, init_params(tiny_config), "lora", rank=4)
    assert tuning.lora is not None
    assert tuning.lora.scale == 1
    for path, leaf in flatten(tuning.trainable["factors"]).items():
        bound = 32**-0.5  # Kaiming with a = √5 of 32 inputs
        largest = float(jnp.abs(leaf).max())
        assert largest == 0 if path.endswith("/b") else 0.95 * bound < largest <= bound


def test_adam_is_torchs_and_its_rate_constant(tiny_config):
    torch = pytest.importorskip("torch")
    options = samseg.Arguments(smoke=True)
    rate = options.rate(34_000)
    assert [np.float32(rate(step)) for step in (0, 1, 680, 17_000, 33_999)] == [
        np.float32(1e-4)
    ] * 5
    tuning = samseg.prepared(tiny_config, init_params(tiny_config), "lora", rank=4)
    optimizer = seg.make_optimizer(
        tuning, rate, weight_decay=options.weight_decay, clip=options.clip
    )
    ours, state = tuning.trainable, jax.jit(optimizer.init)(tuning.trainable)
    path = "factors/image_encoder/blocks/1/attn/qkv/v/a"
    theirs = torch.tensor(np.asarray(flatten(ours)[path]), requires_grad=True)
    adam = torch.optim.Adam([theirs], lr=1e-4)
    update = jax.jit(optimizer.update)
    rng = np.random.default_rng(0)
    for _ in range(3):
        gradients = jax.tree.map(lambda x: 30 * rng.normal(size=x.shape).astype(np.float32), ours)
        updates, state = update(gradients, state, ours)
        ours = jax.tree.map(np.add, ours, updates)
        theirs.grad = torch.tensor(flatten(gradients)[path])
        adam.step()
    np.testing.assert_allclose(flatten(ours)[path], theirs.detach().numpy(), atol=1e-7)


@pytest.mark.parametrize("loss_on", ["aggregate", "each"])
@pytest.mark.parametrize("at_slice", [False, True], ids=["frame", "slice"])
def test_loss_equals_monais(rng, loss_on, at_slice):
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.losses")
    original = (13, 18)
    size = size_in_frame(original, CONFIG.image_size, "pad")
    assert size == (48, 66)
    low = rng.normal(0, 3, (1, 4, 3, 12, 20)).astype(np.float32)
    truth = rng.integers(0, 2, original, dtype=np.uint8)
    batch = {
        "mask": jnp.asarray(pad_to_frame(resize(truth, size), CONFIG.image_size))[None],
        "size": jnp.asarray([size], jnp.int32),
    }
    objective = OfModalities(loss_on=loss_on, slice_size=original if at_slice else None)
    ours = objective.loss(CONFIG, MaskPrediction(jnp.asarray(low), jnp.zeros((1, 4, 3))), batch)

    def up(x, size):
        return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)

    logits = up(torch.tensor(low[:, :, 0]), CONFIG.image_size)[..., : size[0], : size[1]]
    target = torch.tensor(truth if at_slice else resize(truth, size)).float()[None, None]
    if at_slice:
        logits = up(logits, original)
    if loss_on == "aggregate":
        logits = logits.mean(1, keepdim=True)
    criterion = monai.DiceCELoss(sigmoid=True, squared_pred=True)
    theirs = [float(criterion(logits[:, [m]], target)) for m in range(logits.shape[1])]
    np.testing.assert_allclose(ours, [np.mean(theirs)], rtol=1e-6)


def test_the_maximum_of_the_logits_is_the_union_of_the_masks(rng):
    low = rng.normal(size=(2, 3, 3, 12, 20)).astype(np.float32)
    objective = OfModalities()
    prediction = MaskPrediction(jnp.asarray(low), jnp.zeros((2, 3, 3)))
    both = np.asarray(objective.logits(CONFIG, prediction, train=False))
    each = [
        objective.logits(
            CONFIG, MaskPrediction(jnp.asarray(low[:, [m]]), jnp.zeros((2, 1, 3))), train=False
        )
        for m in range(3)
    ]
    masks = np.stack([np.asarray(logits)[..., 0] for logits in each])
    assert both.shape == (2, 48, 80, 2)
    np.testing.assert_array_equal(both[..., 1] > 0, (masks > 0).any(0))
    np.testing.assert_allclose(both[..., 0], masks.mean(0), atol=1e-6)
    np.testing.assert_array_equal(objective.main(both[0]), both[0, ..., 0])


@pytest.mark.parametrize("several", [1, 4])
def test_every_modality_gets_the_prompt_of_its_own_slice(several):
    def encode_image(images, sizes):
        assert images.shape[1:] == (48, 80, 3)
        return jnp.stack([images[:, 0, 0, 0], sizes[:, 0]], axis=-1)

    def answer(features, coords, labels):
        told = jnp.concatenate([features, coords[:, 0], labels], axis=-1)  # 2 + 2 + 2 numbers
        return MaskPrediction(told[:, None, None], told[:, None, 0])

    module = SimpleNamespace(encode_image=encode_image, answer=answer)
    values = 10 * np.arange(1, 3)[:, None] + np.arange(several)
    batch = {
        "image": jnp.broadcast_to(values[:, :, None, None, None], (2, several, 48, 80, 3)),
        "size": jnp.array([[48, 70], [40, 80]]),
        "coords": jnp.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]]),
        "labels": jnp.array([[2, 3], [2, -2]]),
    }
    objective = OfModalities()
    features = objective.encode(module, batch)
    assert features.shape == (2, several, 2)
    told = objective.answer(module, features, batch, None).low_res_logits[:, :, 0, 0]
    for m in range(several):
        assert told[0, m].tolist() == [10 + m, 48, 1, 2, 2, 3]
        assert told[1, m].tolist() == [20 + m, 40, 5, 6, 2, -2]


def test_a_batch_holds_the_modalities_of_one_slice_and_its_tight_box(opened):
    every = opened.slices("train", take="foreground")
    dataset = Subset(every, range(1, len(every)))
    batches = load(
        dataset, modalities=FOUR, frame_size=(64, 64), batch_size=3, shuffle=True, seed=5,
        prompt_modes="box", box_jitter=0.0,
    )  # fmt: skip
    seen = []
    for batch in batches:
        assert batch["image"].shape == (3, 4, 64, 64, 3)
        for row in np.flatnonzero(batch["valid"]):
            seen.append(int(batch["index"][row]))
            height, width = batch["size"][row]
            for m, name in enumerate(FOUR):
                picture = of_modality(dataset, name)[seen[-1]]["image"]
                padded = pad_to_frame(resize(picture, (height, width)), (64, 64))
                np.testing.assert_array_equal(batch["image"][row, m], padded)
            inside = np.argwhere(batch["mask"][row])[:, ::-1]
            np.testing.assert_array_equal(batch["coords"][row], [inside.min(0), inside.max(0)])
    assert sorted(seen) == list(range(len(dataset)))
    assert seen != sorted(seen)


def test_brats_is_cropped_to_138_by_202_and_fills_700_rows(tmp_path):
    cases = ("00004-000", "00008-000", "00009-000")
    volumes.write_brats_men(tmp_path, shape=(240, 240, 2), cases=cases)
    opened = SETS["brats_men"].open(tmp_path, (), 0)
    assert opened.slice_size == (138, 202)
    assert size_in_frame((138, 202), (1024, 1024), "pad") == (700, 1024)
    slices = opened.slices("train", take="largest")
    whole = opened.train[slices.places[0].case].label[..., slices.places[0].slice]
    np.testing.assert_array_equal(slices[0]["mask"], whole[51:189, 19:221])
    assert not any("cropped" in note for note in opened.notes)


def test_other_grids_are_taken_whole(opened):
    assert opened.crop is None
    assert opened.slice_size == (48, 40)
    assert any("not cropped" in note for note in opened.notes)


def test_the_runs_are_those_of_the_thesis(brats, opened):
    runs = {run.run: run for run in samseg.trials(given(brats))}
    rows = {run.method for run in runs.values()}
    assert {e.method for e in published.SAMSEG if e.table == "rank"} <= rows
    assert {run.table for run in runs.values()} == {"rank"}
    steps = {name: (r.options.epochs, r.options.validate_every) for name, r in runs.items()}
    every, cases = opened.slices("train", take="foreground"), 3
    assert steps["r64"] == steps["r256"] == (10, 2 * cases)
    assert steps["r64_long"] == steps["full"] == steps["decoder"] == (50, 2 * cases)
    assert steps["full_published"] == (150, 2 * len(every))
    assert len(runs["r64_random"].train) == cases
    assert len(every) > len(runs["r64_every2"].train) > cases
    assert runs["zero_shot"].train is None
    (test,) = runs["r64"].tests
    assert test.dataset.places == opened.slices("validation", take="foreground").places
    assert not set(test.dataset.patients) & set(every.patients)
    assert runs["r64_released"].options.loss_on == "each"
    assert runs["r64"].options.batch_size == 1
    assert {r.options.epochs for r in samseg.trials(given(brats, epochs=3))} == {3}


def test_the_loss_of_validation_is_that_of_each_slice(opened, tiny_config):
    params = init_params(tiny_config)
    tuning = samseg.prepared(tiny_config, params, "zero-shot")
    assert not flatten(tuning.trainable["params"])
    slices = opened.slices("validation", take="foreground")
    batches = load(
        slices, modalities=("t2f",), frame_size=(64, 64), batch_size=4, prompt_modes="box",
        box_jitter=0.0,
    )  # fmt: skip
    losses, expected = [], []
    for _, logits, truth in seg.Evaluator(tuning).predictions(tuning.trainable, batches, losses):
        z, y = logits[..., 0].astype(np.float64), truth.astype(np.float64)
        np.testing.assert_array_equal(*np.moveaxis(logits, -1, 0))  # of one, mean and maximum
        p = 1 / (1 + np.exp(-z))
        dice = 1 - (2 * (p * y).sum() + 1e-5) / ((p**2).sum() + y.sum() + 1e-5)
        expected.append(dice + (np.log1p(np.exp(z)) - z * y).mean())
    assert len(losses) == len(slices)
    assert len(slices) % 4
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_smoke_trains_validates_and_scores_both_readings(tmp_path, capsys):
    assert samseg.main(["--smoke", "--out", str(tmp_path), "--only", "r4_released"]) == 0
    (record,) = read_records(tmp_path)
    assert record.method == "SAMSEG r=4, loss as released"
    assert record.parameters["trainable"] == 2 * 4 * 32 * 4  # blocks, matrices, width, rank
    assert [entry["step"] for entry in record.history if "loss" in entry] == [1, 2]
    (validated,) = [entry for entry in record.history if "val_dice" in entry]
    assert 0 < validated["val_loss"] < 5
    title = "BraTS-MEN 2023"
    assert [scores.data_set for scores in record.scores] == [
        title, f"{title} (per case)", f"{title} (union)", f"{title} (union, per case)",
    ]  # fmt: skip
    assert {scores.prompt for scores in record.scores} == {"box"}
    slices, cases = (len(record.scores[i].cases) for i in (0, 1))
    assert slices > cases == 2  # of one patient
    assert record.settings["loss_at"] == "slice"
    assert (tmp_path / "r4_released" / "overlays.png").exists()
    assert "Dice" in capsys.readouterr().out


def test_the_decathlon_has_one_modality_and_one_class(tmp_path):
    arguments = ["--smoke", "--set", "msd", "--out", str(tmp_path), "--only", "zero_shot"]
    assert samseg.main(arguments) == 0
    (record,) = read_records(tmp_path)
    assert [scores.data_set for scores in record.scores] == [
        "MSD hippocampus", "MSD hippocampus (per case)",
    ]  # fmt: skip
    assert record.scores[0].class_names == ("foreground",)
    assert record.parameters["trainable"] == 0


@pytest.mark.parametrize("name", ["brats_men", "msd"])
def test_another_folder_is_told_with_the_expected_tree(tmp_path, capsys, name):
    (tmp_path / "pictures").mkdir()
    arguments = ["--set", name, "--data", str(tmp_path), "--ckpt", "none.pth"]
    assert samseg.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "found there: pictures/); expected" in told
    assert ("-t1c.nii.gz, …-t1n" if name == "brats_men" else "labelsTr/") in told


def test_a_checkpoint_of_sam_2_is_told(brats, tmp_path, capsys):
    file = tmp_path / "sam2.safetensors"
    save_weights(file, tiny_sam2(), init_params(tiny_sam2()))
    arguments = ["--data", str(brats), "--ckpt", str(file), "--out", str(tmp_path)]
    assert samseg.main([*arguments, "--image-size", "64", "--only", "r64"]) == 1
    assert f"{file}: a model of SAM 2; SAMSEG is built on SAM" in capsys.readouterr().err


def test_a_missing_modality_is_named(tmp_path):
    volumes.write_brats_men(tmp_path, shape=(12, 10, 3))
    (gone,) = tmp_path.rglob("BraTS-MEN-00008-000-t2f.nii.gz")
    gone.unlink()
    with pytest.raises(DataError, match=r"1 files of the brats_men data set are missing:\n.*t2f"):
        samseg.trials(given(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modalities", "t1c", "flair"], "--modalities flair: expected some of t1c, t1n, t2f"),
        (["--cache-embeddings", "ram"], "--cache-embeddings: not for slices in several modalities"),
        (["--ranks"], "--ranks: expected at least one"),
    ],
)
def test_other_bad_settings_are_told(brats, tmp_path, capsys, options, message):
    arguments = ["--data", str(brats), "--ckpt", "none.pth", "--out", str(tmp_path)]
    assert samseg.main([*arguments, *options]) == 1
    assert message in capsys.readouterr().err


def test_the_loss_at_slices_needs_one_size(tmp_path, tiny_checkpoint, capsys):
    volumes.write_msd(tmp_path, cases=(1, 3, 4), shape=(20, 16, 3))
    volumes.write_msd(tmp_path / "wide", cases=(5,), shape=(24, 16, 3))
    for file in (tmp_path / "wide").rglob("*_005.nii.gz"):
        file.rename(tmp_path / file.parent.name / file.name)
    arguments = ["--set", "msd", "--data", str(tmp_path), "--ckpt", str(tiny_checkpoint)]
    arguments += ["--image-size", "64", "--loss-at", "slice", "--only", "zero_shot"]
    assert samseg.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert "--loss-at slice: slices of several sizes" in capsys.readouterr().err


def test_other_data_sets_have_no_modalities():
    with pytest.raises(ValueError, match="list has no modalities; expected slices of volumes"):
        of_modality([], "t1c")
