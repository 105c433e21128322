"""MedSAGa: the list of its runs, what they train, and one of them the whole way."""

import json

import pytest

from experiments import medsaga, paper
from experiments.baselines import METHODS, grown
from experiments.record import read_records
from experiments.report import main as report
from samjax.models.functional import abstract_params, init_params
from samjax.models.sam import vit_b
from samjax.peft.presets import label_for
from samjax.trees import flatten


def listed(tmp_path, **options):
    arguments = medsaga.Arguments(smoke=True, out=tmp_path, **options)
    arguments = paper.replaced(arguments, medsaga.smoke(arguments))
    return {trial.run: trial for trial in medsaga.trials(arguments)}


def test_runs_are_methods_by_data_set_and_by_number_of_images(tmp_path):
    runs = listed(tmp_path)
    methods = ("medsaga_r4", "samed", "full", "dae_former", "released_blocks", "released_frozen")
    for name in ("synapse", "brats2020"):
        assert {f"{name}_{method}" for method in methods} <= set(runs)
    assert {"synapse_medsaga_r8", "synapse_medsaga_both", "synapse_medsaga_cold"} <= set(runs)
    few = [name for name in runs if name.startswith("chestxray8")]
    assert few == [
        f"chestxray8_n{count:03d}_{method}"
        for count in (2, 4)
        for method in ("medsaga_r4", "samed")
    ]
    assert runs["chestxray8_n002_samed"].table == "ChestX-ray8, 2 images"
    assert set(runs["chestxray8_n002_samed"].train.indices) < set(
        runs["chestxray8_n004_samed"].train.indices
    )


def test_settings_are_samed_s_with_galore_s_own(tmp_path):
    runs = listed(tmp_path)
    options = runs["synapse_medsaga_r4"].options
    assert (options.lr, options.weight_decay, options.warmup, options.clip) == (
        0.005,
        0.1,
        250,
        "none",
    )
    assert (options.galore_gap, options.galore_scale, options.galore_projection) == (
        200,
        1.0,
        "std",
    )
    assert runs["synapse_medsaga_both"].options.galore_projection == "full"
    assert runs["synapse_medsaga_cold"].options.warmup == 0
    assert runs["synapse_dae_former"].options.lr == 0.05
    user = listed(tmp_path, lr=1e-3, chosen=("lr",))["synapse_medsaga_r4"].options
    assert user.lr == 1e-3


def test_what_each_run_trains_of_vit_b():
    """MedSAGa leaves patch embedding, positions and neck; as logged only the blocks move."""
    params = abstract_params(vit_b((240, 240)))

    def millions(method, label=None):
        labels = flatten(label_for(params, method, fresh_head=True, prompts=()))
        chosen = [p for p, of in labels.items() if of not in ("freeze", "still")]
        chosen = [p for p in chosen if label in (None, labels[p])]
        return chosen, sum(flatten(params)[p].size for p in chosen) / 1e6

    chosen, _ = millions("galore+decoder")
    assert not [p for p in chosen if "patch_embed" in p or "pos_embed" in p or "/neck/" in p]
    assert millions("galore+decoder", "galore")[1] == pytest.approx(84.93, abs=0.01)
    assert set(millions("blocks+decoder")[0]) == set(chosen)
    blocks, _ = millions("blocks")
    assert all(p.startswith(("image_encoder/blocks/", "mask_decoder/")) for p in blocks)
    frozen, _ = millions("prompting")
    assert not [p for p in frozen if p.startswith("image_encoder/")]


def test_growing_keeps_the_base_and_says_what_does_not_fit():
    small, large = paper.tiny_sam(64), paper.tiny_sam(128)
    base = init_params(small, 0)
    kept = flatten(grown(small, base, 5))
    same = {p for p, leaf in flatten(base).items() if (leaf == kept[p]).all()}
    assert "image_encoder/blocks/0/attn/qkv/kernel" in same
    assert "mask_decoder/mask_tokens/embedding" not in same
    with pytest.raises(ValueError, match=r"does not fit: .*image_encoder/pos_embed"):
        grown(large, base, 0)


def test_the_whole_way_and_the_report(tmp_path, capsys):
    run = ["--smoke", "--sets", "synapse", "--few-shot", "--out", str(tmp_path / "runs")]
    assert medsaga.main([*run, "--only", "synapse_medsaga_r4"]) == 0
    (record,) = read_records(tmp_path / "runs")
    assert record.smoke
    assert {scores.data_set for scores in record.scores} == {"Synapse", "Synapse (SAMed's rule)"}
    assert len(record.scores[0].class_names) == 8
    assert record.memory["state"] > 0
    folder = tmp_path / "runs" / "synapse_medsaga_r4"
    for name in ("curve.png", "overlays.png", "classes.png", "adapter.safetensors"):
        assert (folder / name).stat().st_size
    assert medsaga.main([*run, "--only", "synapse_medsaga_r4"]) == 1
    assert "holds a result: choose another --out, or --resume" in capsys.readouterr().err
    assert medsaga.main([*run, "--only", "synapse_medsaga_r4", "--resume"]) == 0
    assert report(["--results", str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    assert "MedSAGa r=4" in (tmp_path / "report" / "report.md").read_text("utf-8")
    assert json.loads((folder / "result.json").read_text("utf-8"))["smoke"] is True


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --data DIR and --ckpt FILE, or --smoke"),
        (["--data", "nowhere", "--variant", "vit_xs"], "nowhere: no such folder"),
        (["--smoke", "--only", "xyz"], "--only xyz: no such run; there are synapse_"),
        (["--smoke", "--few-shot", "xyz"], "--few-shot xyz: expected some of synapse, brats2020"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert medsaga.main([*argv, "--out", str(tmp_path / "runs")]) == 1
    assert message in capsys.readouterr().err


def test_a_wrong_tree_is_shown_beside_the_expected_one(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "readme.txt").write_text("nothing")
    argv = ["--data", str(tmp_path / "data"), "--variant", "vit_xs", "--sets", "synapse"]
    assert medsaga.main([*argv, "--out", str(tmp_path / "runs")]) == 1
    error = capsys.readouterr().err
    assert "RawData/Training" in error
    assert "readme.txt" in error


def test_baselines_have_the_released_settings():
    assert METHODS["hsam"].settings["lr"] == 0.0025
    assert METHODS["samed_s"].settings["dice_weight"] == 0.8
