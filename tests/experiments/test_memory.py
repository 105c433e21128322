"""The memory of a step before it runs."""

import dataclasses
import json

import jax
import pytest

from experiments import memory
from samjax.models.functional import abstract_params
from samjax.training.sharding import make_mesh

SMALL = memory.Arguments(variant="vit_xs", size=64, method="full")


@pytest.fixture(scope="module")
def full():
    return memory.measure(SMALL, make_mesh())


def test_what_is_held_is_counted_exactly(full):
    leaves = jax.tree.leaves(abstract_params(memory.config_of("vit_xs", 64)))
    assert full.weights == sum(4 * leaf.size for leaf in leaves)
    assert full.gradients < full.weights
    assert 2 * full.gradients <= full.state < 2 * full.gradients + 100, "two moments, some counters"
    assert full.batch == 64 * 64 * 4 + 8 + 16 + 8
    assert full.peak > full.weights + full.state + full.batch
    assert full.activations > 0


def test_the_report_and_its_answers(full, tmp_path, capsys):
    """A budget between what remat needs and what it saves; the largest batch is itself compiled."""
    out = tmp_path / "memory.json"
    bare = dataclasses.replace(SMALL, batch=8)
    before = memory.measure(bare, make_mesh())
    after = memory.measure(dataclasses.replace(bare, remat=True), make_mesh())
    assert after.peak < before.peak
    budget = (before.peak + after.peak) / 2e9
    settings = ["--variant", "vit_xs", "--size", "64", "--method", "full", "--batch", "8"]
    assert memory.main([*settings, "--budget", str(budget), "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["bytes"]["peak"] == before.peak
    assert [entry["verdict"] for entry in report["proposals"]] == ["fits"]
    assert report["proposals"][0]["switches"] == "--remat"
    assert "--remat" in capsys.readouterr().out

    largest = report["largest_batch"][f"{budget:g} GB"]
    assert 1 <= largest < 8
    for batch, fits in ((largest, True), (largest + 1, False)):
        peak = memory.measure(dataclasses.replace(bare, batch=batch), make_mesh()).peak
        assert (peak <= budget * 1e9) == fits, (batch, peak)


def test_bad_settings_are_named(capsys):
    assert memory.main(["--variant", "vit_z"]) == 1
    assert "--variant vit_z: expected one of vit_b" in capsys.readouterr().err
    assert memory.main(["--variant", "vit_xs", "--size", "64", "--rank", "500"]) == 1
    assert "rank 500 exceeds" in capsys.readouterr().err
    assert memory.main(["--batch", "3", "--accumulate", "2"]) == 1
    assert "expected a multiple of 2" in capsys.readouterr().err
