"""One step, one loop: accumulation, schedules, and stopping with a reason."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from samjax.peft.galore import galore
from samjax.training.loop import (
    TrainingError,
    adamw,
    fit,
    init_state,
    make_step,
)
from samjax.training.schedules import warmup_cosine

KEY = jax.random.key(0)


def squares(trainable, frozen, batch, key):
    """Per-example squared error of a linear model with a frozen offset."""
    predicted = batch["x"] @ trainable["w"] + jnp.broadcast_to(frozen["c"], (len(batch["x"]), 2))
    return ((predicted - batch["y"]) ** 2).sum(1)


@pytest.fixture
def problem(rng):
    batch = {
        "x": rng.standard_normal((12, 3)).astype(np.float32),
        "y": rng.standard_normal((12, 2)).astype(np.float32),
    }
    trainable = {"w": jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)}
    return trainable, {"c": jnp.ones((2,))}, batch


@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_micro_batches_equal_one_big_batch(problem, accumulate):
    trainable, frozen, batch = problem
    optimizer = adamw(warmup_cosine(0.1, 20, 3), 0.01)
    big, small = (make_step(squares, optimizer, k) for k in (1, accumulate))
    a, b = init_state(trainable, optimizer), init_state(trainable, optimizer)
    for _ in range(5):
        a, metrics_a = big(a, frozen, batch, KEY)
        b, metrics_b = small(b, frozen, batch, KEY)
        np.testing.assert_allclose(metrics_a["loss"], metrics_b["loss"], rtol=1e-6)
    np.testing.assert_allclose(a.trainable["w"], b.trainable["w"], atol=1e-6)
    assert int(a.step) == int(b.step) == 5, "a schedule advances once per step, not per micro-batch"


def test_refreshes_decided_on_the_host_are_those_of_the_count(problem):
    trainable, frozen, batch = problem
    optimizer = galore(0.05, 1, update_gap=3)
    inside, outside = make_step(squares, optimizer), make_step(squares, optimizer, refresh_gap=3)
    a, b = init_state(trainable, optimizer), init_state(trainable, optimizer)
    bases = []
    for _ in range(7):
        a, _ = inside(a, frozen, batch, KEY)
        b, _ = outside(b, frozen, batch, KEY)
        np.testing.assert_allclose(a.trainable["w"], b.trainable["w"], atol=1e-6)
        bases.append(b.optimizer[0].bases["w"]["out"].tolist())
    assert [one != other for one, other in itertools.pairwise(bases)] == [0, 0, 1, 0, 0, 1]


def test_the_callers_arrays_survive_donation(problem):
    trainable, frozen, batch = problem
    optimizer = optax.sgd(0.1)
    state, _ = make_step(squares, optimizer)(init_state(trainable, optimizer), frozen, batch, KEY)
    assert not np.array_equal(state.trainable["w"], np.asarray(trainable["w"]))


def test_vectors_do_not_decay():
    optimizer = adamw(optax.constant_schedule(0.1), weight_decay=1.0)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    assert float(updates["bias"].sum()) == 0
    assert float(updates["kernel"].sum()) < 0


def run(problem, batches, **options):
    trainable, frozen, _ = problem
    optimizer = optax.sgd(0.01)
    return fit(
        init_state(trainable, optimizer),
        frozen,
        make_step(squares, optimizer),
        batches,
        key=KEY,
        arrays=("x", "y"),
        progress=False,
        **options,
    )


def test_validation_runs_at_its_interval_and_at_the_end(problem):
    seen, logged = [], []
    state = run(
        problem,
        [problem[2]] * 7,
        steps=7,
        validate_every=3,
        validate=lambda step, _: seen.append(step) or "",
        on_step=lambda step, metrics: logged.append((step, sorted(metrics))),
    )
    assert seen == [3, 6, 7]
    assert [step for step, _ in logged] == list(range(1, 8))
    assert logged[0][1] == ["gradient_norm", "loss"]
    assert int(state.step) == 7


def test_a_loss_that_is_not_finite_stops_with_step_and_examples(problem):
    good = {**problem[2], "names": "a, b"}
    bad = {**good, "x": good["x"] * np.float32(np.nan), "names": "c.png, d.png"}
    with pytest.raises(TrainingError, match=r"step 3.*nan.*c\.png, d\.png"):
        run(problem, [good, good, bad], steps=3, describe=lambda batch: batch["names"])


def test_data_that_ends_early_is_an_error(problem):
    with pytest.raises(TrainingError, match="after 2 of 5 steps"):
        run(problem, [problem[2]] * 2, steps=5)
