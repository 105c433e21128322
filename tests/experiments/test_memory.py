"""The memory of a step before it runs."""

import dataclasses
import json

import jax
import pytest

from experiments import memory
from samjax.models.functional import abstract_params
from samjax.training.sharding import make_mesh

SMALL = memory.Arguments(variant="vit_b", size=64, method="full")


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tiny_config):
    """A model that compiles in seconds, whatever variant is asked for."""
    real = memory.config_of

    def config_of(variant, size):
        real(variant, size)
        return tiny_config

    monkeypatch.setattr(memory, "config_of", config_of)


def test_what_is_held_is_counted_exactly(tiny_config):
    found = memory.measure(SMALL, make_mesh())
    leaves = jax.tree.leaves(abstract_params(tiny_config))
    assert found.weights == sum(4 * leaf.size for leaf in leaves)
    assert found.gradients < found.weights
    assert 2 * found.gradients <= found.state < 2 * found.gradients + 100, "two moments, counters"
    assert found.batch == 64 * 64 * 4 + 8 + 16 + 8
    assert found.peak > found.weights + found.state + found.batch
    assert found.activations > 0


def test_the_report_and_its_answers(tmp_path, capsys):
    """A budget that all other switches miss and accumulation keeps to."""
    out = tmp_path / "memory.json"
    asked = dataclasses.replace(
        SMALL, batch=8, remat="all", dtype="bfloat16", clip="each", method="lora"
    )
    mesh = make_mesh()
    small = memory.measure(dataclasses.replace(asked, accumulate=8), mesh)
    before = memory.measure(asked, mesh)
    assert small.peak < before.peak
    budget = (before.peak + small.peak) / 2e9
    settings = ["--size", "64", "--batch", "8", "--remat", "all", "--dtype", "bfloat16"]
    settings += ["--clip", "each", "--budget", str(budget), "--out", str(out)]
    assert memory.main(settings) == 0
    report = json.loads(out.read_text())
    assert report["bytes"]["peak"] == before.peak
    assert report["proposals"] == [
        {"switches": "--accumulate 8", "peak": small.peak, "verdict": "fits"}
    ]
    assert "--accumulate 8" in capsys.readouterr().out

    largest = report["largest_batch"][f"{budget:g} GB"]
    assert 1 <= largest < 8 < report["largest_batch"]["8 GB"]
    assert memory.measure(dataclasses.replace(asked, batch=largest), mesh).peak <= budget * 1e9


def test_bad_settings_are_named(capsys):
    assert memory.main(["--variant", "vit_z"]) == 1
    assert "--variant vit_z: expected one of vit_b" in capsys.readouterr().err
    assert memory.main(["--size", "64", "--rank", "500"]) == 1
    assert "rank 500 exceeds" in capsys.readouterr().err
    assert memory.main(["--batch", "3", "--accumulate", "2"]) == 1
    assert "expected a multiple of 2" in capsys.readouterr().err
