"""SAMora's second stage: what it trains and how fast, the list of runs, and both stages through."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import compiling
from experiments import heat_maps, paper, samora, samora_stage1
from experiments import segmentation as seg
from experiments.baselines import UNIT_PIXELS
from experiments.record import read_records
from experiments.report import main as report
from samjax.data import make_loader
from samjax.models.functional import abstract_params
from samjax.models.sam import vit_b
from samjax.peft.adapter_files import read_adapter
from samjax.peft.paths import FREEZE
from samjax.peft.presets import ADAMW, STILL
from samjax.trees import flatten, unflatten

ALL = {"experts": ("image", "patch", "pixel"), "fusion": "hl_attn", "expert_rank": 4}
FIRST = [f"stage1_{name}" for name in ("simclr", "mae", "image", "patch", "pixel")]
COMMAND = [
    "--smoke", "--unlabelled", "msd", "--sets", "synapse", "--few", "synapse", "--ablations",
]  # fmt: skip


def given(out, **options):
    short = {"image_size": 64, "batch_size": 2, "unlabelled": ("msd",), "progress": False}
    short["seed"] = 1234  # as the command has it
    return samora.Arguments(smoke=True, out=out, **{**short, **options})


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """An --out with the phantoms of all four data sets, which every list of runs reads."""
    out = tmp_path_factory.mktemp("samora")
    samora.trials(given(out))
    return out


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    """The --out of a command that made both teachers and the three experts of rank 4."""
    out = tmp_path_factory.mktemp("stage1")
    with pytest.MonkeyPatch.context() as patch:  # the tests' own fixtures come after this one
        compiling.use_old_emitters(patch)
        patch.setattr(paper, "compile_quickly", lambda: None)
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            assert samora.main([*COMMAND, "--out", str(out), "--only", *FIRST]) == 0
        finally:
            jax.config.update("jax_disable_most_optimizations", False)
    return out


@pytest.fixture
def after_first(first_stage, tmp_path):
    """A copy of it, to go on in or to spoil."""
    return shutil.copytree(first_stage, tmp_path / "runs")


def listed(phantoms, **options):
    return {trial.run: trial for trial in samora.trials(given(phantoms, **options))}


def labelled(config, on, **fields):
    """Parameters of ``config`` with experts by path, and how each is trained."""
    own = samora.config_of(config, on, {**ALL, **fields})
    params = abstract_params(own)
    return flatten(params), flatten(samora.labels_of(params))


def test_vit_b_trains_71_million_in_the_fusion_and_the_mask_decoder():
    leaves, labels = labelled(dataclasses.replace(vit_b((224, 224)), num_multimask=8), "sam")
    trained = {path: leaf.size for path, leaf in leaves.items() if labels[path] == ADAMW}
    fusion = [path for path in trained if "/fusion/" in path]
    for block in range(12):
        of_block = [p for p in fusion if p.startswith(f"image_encoder/blocks/{block}/")]
        assert sum(trained[path] for path in of_block) == 5_916_674
    assert sum(trained[path] for path in fusion) == 12 * 5_916_674 == 71_000_088
    # The IoU head is fresh, so a file has to hold it, but no loss of a mask reaches it.
    decoder = {path for path in leaves if path.startswith("mask_decoder/")}
    assert trained.keys() == set(fusion) | {p for p in decoder if "iou_prediction_head" not in p}
    assert {p for p in decoder if labels[p] == STILL} == decoder - trained.keys()
    frozen = [path for path in leaves if labels[path] == FREEZE]
    assert {path.split("/")[0] for path in frozen} == {"image_encoder", "prompt_encoder"}
    for part in ("/gain", "/experts/image/q/a", "/attn/qkv/", "/mlp/", "neck/", "pos_embed"):
        assert any(part in path for path in frozen), part


@pytest.mark.parametrize("on", ["hsam", "sam2"])
def test_other_models_train_fusion_and_mask_decoders_too(on):
    config = paper.tiny_sam2() if on == "sam2" else paper.tiny_sam()
    leaves, labels = labelled(dataclasses.replace(config, num_multimask=3), on)
    trained = {path for path in leaves if labels[path] == ADAMW}
    parts = {"mask_decoder", "mask_decoder2"} if on == "hsam" else {"mask_decoder"}
    assert {path.split("/")[0] for path in trained} == {"image_encoder", *parts}
    encoder = {path for path in trained if path.startswith("image_encoder/")}
    assert encoder == {path for path in leaves if "/fusion/" in path}
    for part in parts - {"mask_decoder"}:
        assert {path for path in leaves if path.startswith(f"{part}/")} <= trained


def test_a_sum_trains_the_mask_decoder_alone():
    leaves, labels = labelled(paper.tiny_sam(), "sam", fusion="sum")
    trained = {path for path in leaves if labels[path] == ADAMW}
    assert {path.split("/")[0] for path in trained} == {"mask_decoder"}


def shaken(tree, only=""):
    """Noise on parameters: what starts at zero would hide a way that leads nowhere."""
    rng = np.random.default_rng(0)
    return unflatten(
        {
            path: leaf + jnp.asarray(rng.normal(0, 0.1 * (only in path), leaf.shape), leaf.dtype)
            for path, leaf in flatten(tree).items()
        }
    )


@pytest.fixture
def wider(monkeypatch):
    """Tiny models without a norm of one channel or a window of one token, which pass nothing on."""
    sam, sam2 = paper.tiny_sam(), paper.tiny_sam2()
    vit = dataclasses.replace(sam.image_encoder, depth=1, global_blocks=(), out_channels=64)
    hiera = dataclasses.replace(sam2.image_encoder, windows=(4, 4, 4, 2))
    sam, sam2 = (
        dataclasses.replace(config, image_encoder=encoder)
        for config, encoder in ((sam, vit), (sam2, hiera))
    )
    monkeypatch.setattr(paper, "tiny_sam", lambda size: sam)
    monkeypatch.setattr(paper, "tiny_sam2", lambda size: sam2)


@pytest.mark.usefixtures("wider")
@pytest.mark.parametrize("on", ["sam", "hsam", pytest.param("sam2", marks=pytest.mark.slow)])
def test_every_trained_parameter_gets_a_gradient(phantoms, on):
    trial = listed(phantoms)["synapse_samora"]
    fields = (
        {**ALL, "experts": ("pixel", "image")} if on == "sam2" else ALL
    )  # four blocks to compile
    tuning = samora.prepared(trial.options, 2, on, fields, untrained=True)
    trainable, frozen = shaken(tuning.trainable), shaken(tuning.frozen, "/experts/")
    config, arrays = tuning.config, tuning.objective.arrays
    loader = make_loader(
        trial.train, frame_size=config.image_size, fit=config.fit, batch_size=2, shuffle=True
    )
    batch = {**next(iter(loader)), "epoch": np.zeros(2, np.float32)}
    batch = {name: jnp.asarray(batch[name]) for name in arrays}
    batch["mask"] = jnp.minimum(batch["mask"], 2)
    assert batch["mask"].max() > 0

    @jax.jit
    def gradient(trainable):
        def loss(trainable):
            return seg.batch_loss(tuning, trainable, frozen, batch, jax.random.key(0)).mean()

        return jax.grad(loss)(trainable)

    labels = flatten(tuning.labels)
    unreached = {path for path, g in flatten(gradient(trainable)).items() if not g.any()}
    # What all keys share changes no softmax: of its gradient there is rounding or nothing.
    unreached = {p for p in unreached if not p.endswith(("/k_proj/bias", "/key_norm/bias"))}
    assert unreached == {path for path, label in labels.items() if label == STILL}


def released(peak, steps, warmup):
    """The learning rate of every step by ``trainer.py: _adjust_learning_rate`` (power 0.9).

    It is set after each step for the next one; before the first it is that of the warmup's start.
    """
    rate, used = peak / warmup, []
    for j in range(steps + 2):
        used.append(rate)
        if j < warmup:
            rate = peak * (j + 1) / warmup
        else:
            rate = peak * max(1 - (j - warmup) / (steps - warmup), 0) ** 0.9
    return np.array(used)


@pytest.mark.parametrize(("peak", "steps"), [(5e-3, 1380), (1e-3, 60)])
def test_the_learning_rate_is_the_released_rule(peak, steps):
    warmup = 25
    found = jax.vmap(samora_stage1.samora_rate(peak, steps))(jnp.arange(steps + 2))
    expected = released(peak, steps, warmup)
    for step in (0, 1, warmup - 1, warmup, warmup + 1, steps // 2, steps - 1, steps, steps + 1):
        np.testing.assert_allclose(found[step], expected[step], rtol=2e-5, atol=1e-9)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-9)
    assert found[0] == found[1] == pytest.approx(peak / warmup, rel=2e-6)
    assert found[warmup] == found[warmup + 1] == pytest.approx(peak, rel=2e-6)
    assert found[steps + 1] == 0 < found[steps]


def test_both_stages_have_that_rate_and_baselines_have_samed_s(phantoms):
    runs = listed(phantoms)
    rates = {name: runs[f"synapse_{name}"].options.rate(100) for name in ("samora", "samed")}
    expected = released(5e-3, 100, 25)
    np.testing.assert_allclose(rates["samora"](60), expected[60], rtol=2e-5)
    np.testing.assert_allclose(rates["samed"](60), 5e-3 * (1 - 34 / 100) ** 0.9, rtol=2e-5)
    first = runs["stage1_pixel"].options
    np.testing.assert_allclose(first.rate(100)(60), released(1e-3, 100, 25)[60], rtol=2e-5)
    assert (first.batch_size, first.epochs, first.weight_decay) == (16, 30, 0.1)


METHODS = ["samora", "hsamora", "samed", "hsam"]
ABLATIONS = [
    *("samora_pixel", "samora_patch", "samora_image"),
    *("samora_pixel_patch", "samora_pixel_image", "samora_patch_image"),
    *("samora_sum", "samora_r2", "samora_r8", "samora_r16", "samora_untrained", "samora_sam2"),
]


def test_the_list_of_runs(phantoms):
    runs = listed(phantoms)
    ranks, experts = ("", "_r2", "_r8", "_r16"), ("image", "patch", "pixel")
    assert list(runs) == [
        "stage1_simclr",
        "stage1_mae",
        *(f"stage1_{name}{rank}" for rank in ranks for name in experts),
        *(f"stage1_sam2_{name}" for name in experts),
        *(f"synapse_{name}" for name in [*METHODS, *ABLATIONS]),
        *(f"synapse_few_{name}" for name in [*METHODS, "samora_untrained"]),
        *(f"la2018_{name}" for name in METHODS),
        *(f"promise12_{name}" for name in METHODS),
    ]
    tables = {name: runs[f"{name}_samora"].table for name in ("synapse", "la2018", "promise12")}
    assert tables == {
        "synapse": "Synapse", "la2018": "LA 4 scans", "promise12": "PROMISE12 3 scans",
    }  # fmt: skip
    assert runs["stage1_mae"].table == runs["stage1_sam2_image"].table == "stage 1"
    assert runs["stage1_patch_r16"].method == "patch expert r=16"
    assert runs["synapse_samora_pixel_image"].method == "SAMora, pixel + image"
    assert runs["synapse_few_samora_untrained"].method == "SAMora, no stage 1"
    assert {trial.experiment for trial in runs.values()} == {"samora"}


def test_a_tenth_of_the_slices_is_the_same_for_all_methods(phantoms):
    runs = listed(phantoms)
    assert runs["synapse_few_samora"].table == "Synapse 10 %"
    few = {tuple(runs[f"synapse_few_{name}"].train.indices) for name in METHODS}
    assert len(few) == 1
    assert len(few.pop()) == 2 < len(runs["synapse_samora"].train)
    assert runs["synapse_few_hsam"].tests[0].name == runs["synapse_hsam"].tests[0].name


def test_baselines_have_the_budget_of_what_builds_on_them(phantoms):
    runs = listed(phantoms, image_size=224, batch_size=32)
    budgets = {}
    for name in METHODS:
        of = runs[f"la2018_{name}"].options
        budgets[name] = of.epochs, of.batch_size, of.image_size, of.warmup, of.lr, of.dice_weight
    assert budgets["samora"] == budgets["samed"] == (20, 32, 224, 25, 0.005, 0.8)
    assert budgets["hsamora"] == (30, 32, 224, 25, 0.0025, 0.8)
    assert budgets["hsam"] == (30, 32, 224, 25, 0.0025, 0.9)
    assert runs["la2018_samed"].notes == (
        "epochs, size, batch and warmup as SAMora's, not as published",
    )
    augments = {name: runs[f"la2018_{name}"].augment for name in METHODS}
    assert augments["samora"] == augments["samed"] != augments["hsamora"] == augments["hsam"]


def test_experts_of_another_run_leave_out_the_first_stage(phantoms):
    runs = listed(phantoms, experts=phantoms / "elsewhere", sets=("la2018",))
    assert list(runs) == [f"la2018_{name}" for name in METHODS]


def test_without_cpt_few_and_ablations_there_is_no_more_than_the_methods_need(phantoms):
    options = {"sets": ("synapse",), "few": (), "ablations": (), "ranks": (2, 8)}
    runs = listed(phantoms, cpt=samora_stage1.Cpt(use=False), **options)
    experts = [f"stage1_{name}" for name in ("image", "patch", "pixel")]
    assert list(runs) == [*experts, *(f"synapse_{name}" for name in METHODS)]


def test_smoke_leaves_what_the_command_says(tmp_path):
    options = given(tmp_path, chosen=("smoke", "stage1.steps", "cpt.no_use", "ranks"), ranks=())
    first = samora_stage1.StageOne(steps=5, lr=0.5)
    options = dataclasses.replace(options, stage1=first, cpt=samora_stage1.Cpt(use=False))
    options = paper.replaced(options, samora.smoke(options))
    assert options.stage1 == samora_stage1.StageOne(steps=5, lr=0.5, batch_size=2)
    assert options.cpt == samora_stage1.Cpt(use=False, steps=2, batch_size=2)
    assert options.ranks == ()


def test_the_model_of_the_second_stage(first_stage):
    """SAM as it was, pixels of 0 to 1, and the experts with the gains that stage 1 left them."""
    options = given(first_stage)
    config, base = samora_stage1.student_of(options, "sam")
    tuning = samora.prepared(options, 8, "sam", ALL)
    assert tuning.config.mask_tokens == 9
    assert tuning.config.pixel_std == UNIT_PIXELS["pixel_std"] == config.pixel_std
    frozen, before = flatten(tuning.frozen), flatten(base)
    own = {path for path in frozen if "/experts/" not in path}
    assert own == {p for p in before if p.startswith(("image_encoder/", "prompt_encoder/"))}
    assert all(np.array_equal(frozen[path], before[path]) for path in own)
    for name in ("image", "patch", "pixel"):
        adapter = read_adapter(first_stage / f"stage1_{name}" / samora_stage1.EXPERT)
        gains = np.ravel(adapter.params["gain"])
        assert not (gains == 1).all()
        for block, gain in enumerate(gains):
            root = f"image_encoder/blocks/{block}"
            assert frozen[f"{root}/experts/{name}/gain"].tolist() == [gain]
            for side in ("q/a", "q/b", "v/a", "v/b"):
                factor = flatten(adapter.factors)[f"{root}/attn/qkv/{side}"]
                np.testing.assert_array_equal(frozen[f"{root}/experts/{name}/{side}"], factor)
                assert factor.any()


def test_heat_maps_are_what_an_expert_adds_to_a_blocks_attention(tmp_path, rng):
    tuning = samora.prepared(given(tmp_path), 2, "sam", ALL, untrained=True)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)),
        "size": jnp.array([[64, 64], [48, 64]], jnp.int32),
    }
    frozen = flatten(tuning.frozen)
    first = frozen["image_encoder/blocks/0/experts/patch/v/b"]
    frozen["image_encoder/blocks/0/experts/patch/v/b"] = first + 0.1
    heat = jax.jit(lambda frozen: heat_maps.contributions(tuning, tuning.trainable, frozen, batch))
    found = np.asarray(heat(unflatten(frozen)))
    assert found.shape == (3, 2, 4, 4)
    pixel, patch, image = found
    assert patch.min() > 0
    assert not pixel.any()
    assert not image.any()
    frozen["image_encoder/blocks/0/experts/patch/gain"] *= 0
    assert not np.asarray(heat(unflatten(frozen))).any()


@pytest.mark.slow
def test_both_stages_through_and_the_report(after_first, tmp_path, monkeypatch, capsys):
    """Whatever is frozen is afterwards what it was, bit for bit; whatever is trained is not."""
    seen, draw = [], heat_maps.draw

    def drawn(trial, tuning, trainable):
        draw(trial, tuning, trainable)
        seen.append((trial, tuning, trainable))

    monkeypatch.setattr(heat_maps, "draw", drawn)
    out = str(after_first)
    assert samora.main([*COMMAND, "--out", out, "--only", "synapse_samora"]) == 0
    folder = after_first / "synapse_samora"
    for name in ("heatmaps.png", "curve.png", "overlays.png", "classes.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200, name
    result = json.loads((folder / "result.json").read_text("utf-8"))
    assert result["smoke"] is True
    assert [entry["step"] for entry in result["history"]] == [1, 2]
    assert {s["data_set"] for s in result["scores"]} == {"Synapse", "Synapse (SAMed's rule)"}

    ((trial, tuning, trained),) = seen
    before = trial.build()
    was, now = flatten(before.frozen), flatten(tuning.frozen)
    assert was.keys() == now.keys()
    assert all(np.array_equal(was[path], now[path]) for path in was)
    was, now, labels = (flatten(t["params"]) for t in (before.trainable, trained, before.labels))
    moved = {path for path in was if not np.array_equal(was[path], now[path])}
    still = {path for path, label in labels.items() if label == STILL}
    assert moved == was.keys() - still
    stored = flatten(read_adapter(folder / "adapter.safetensors").params)
    assert stored.keys() == now.keys()
    assert all(np.array_equal(stored[path], now[path]) for path in now)
    assert result["parameters"]["trainable"] == sum(leaf.size for leaf in now.values())

    records = {record.run: record for record in read_records(after_first)}
    assert set(records) == {*FIRST, "synapse_samora"}
    assert all(not records[name].scores and len(records[name].history) == 2 for name in FIRST)
    assert records["stage1_image"].notes == ("teacher: teacher.safetensors (cpt)",)
    assert records["stage1_simclr"].notes == ("teacher started from scratch",)
    assert report(["--results", out, "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "SAMora" in page
    assert "heatmaps" in page
    capsys.readouterr()
    assert samora.main([*COMMAND, "--out", out, "--only", "synapse_samora"]) == 1
    assert "holds a result: choose another --out, or --resume" in capsys.readouterr().err


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def as_another(file):
    shutil.copy(file.parent.parent / "stage1_pixel" / file.name, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file: file.unlink(), "no such file; train the experts first, by --only 'stage1_*'"),
        (cut, "not a complete safetensors file"),
        (as_another, "of the expert 'pixel'; expected 'patch'"),
    ],
    ids=["missing", "cut in half", "of another name"],
)
def test_a_damaged_first_stage_is_an_error_that_names_the_file(
    after_first, tmp_path, capsys, spoil, message
):
    file = after_first / "stage1_patch" / samora_stage1.EXPERT
    spoil(file)
    other = ["--out", str(tmp_path / "other"), "--experts", str(after_first)]
    assert samora.main([*COMMAND, *other, "--only", "synapse_samora"]) == 1
    assert f"{file}: {message}" in capsys.readouterr().err


def test_experts_of_another_base_model_are_refused(first_stage, tmp_path, capsys):
    other = ["--out", str(tmp_path), "--experts", str(first_stage), "--seeds", "1"]
    assert samora.main([*COMMAND, *other, "--only", "synapse_samora"]) == 1
    error = capsys.readouterr().err
    assert f"{samora_stage1.EXPERT}: trained on another base model" in error
    assert str(first_stage) in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --data DIR and --ckpt FILE, or --smoke"),
        (["--smoke", "--unlabelled", "btcv"], "--unlabelled btcv: expected some of amos22"),
        (["--smoke", "--sets", "acdc"], "--sets acdc: expected some of synapse"),
        (["--smoke", "--few", "acdc"], "--few acdc: expected some of synapse"),
        ([*COMMAND, "--only", "xyz"], "--only xyz: no such run; there are stage1_simclr"),
    ],
)
def test_bad_settings_are_named(tmp_path, capsys, argv, message):
    assert samora.main([*argv, "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("only", ["stage1_mae", "synapse_samora"])
def test_a_wrong_data_root_is_shown_beside_the_expected_tree(tmp_path, capsys, only):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "readme.txt").write_text("nothing")
    argv = ["--data", str(tmp_path / "data"), "--variant", "vit_xs", "--only", only, "--sets"]
    argv += [] if only.startswith("stage1") else ["synapse"]
    assert samora.main([*argv, "--out", str(tmp_path / "runs")]) == 1
    error = capsys.readouterr().err
    assert "readme.txt" in error
    assert ("imagesTr/amos_0001.nii.gz" if only == "stage1_mae" else "RawData/Training") in error


@pytest.mark.parametrize("only", ["stage1_pixel", "synapse_samora"])
def test_a_checkpoint_of_sam_2_is_refused(
    first_stage, sam2_checkpoint, tiny_checkpoint, tmp_path, capsys, only
):
    data = ["--data", str(first_stage / "phantoms"), "--unlabelled", "msd", "--image-size", "64"]
    data += ["--sets", "synapse", "--out", str(tmp_path), "--no-progress"]
    assert samora.main([*data, "--ckpt", str(sam2_checkpoint), "--only", only]) == 1
    expected = f"{sam2_checkpoint}: a model of family sam2; expected SAM (v1), by --ckpt"
    assert expected in capsys.readouterr().err
    both = ["--ckpt", str(tiny_checkpoint), "--ckpt2", str(tiny_checkpoint)]
    on_sam2 = only.replace("stage1", "stage1_sam2").replace("_samora", "_samora_sam2")
    assert samora.main([*data, *both, "--only", on_sam2]) == 1
    assert f"{tiny_checkpoint}: a model of family sam; expected SAM 2" in capsys.readouterr().err


def test_the_variant_is_of_sam_s_checkpoint_alone(sam2_checkpoint, tmp_path):
    options = given(tmp_path, variant="vit_b", ckpt2=str(sam2_checkpoint))
    config, _ = samora_stage1.student_of(options, "sam2")
    assert (config.family, config.image_size) == ("sam2", (64, 64))
