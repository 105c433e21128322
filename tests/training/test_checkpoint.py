"""Runs that are killed, preempted, damaged or changed, and go on or say why not."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compiling import quick_environment
from samjax.peft.eight_bit import eight_bit
from samjax.peft.galore import galore
from samjax.training.checkpoint import CheckpointError, Checkpoints, fingerprint
from samjax.training.loop import init_state, make_step

RUN = Path(__file__).with_name("resumable_run.py")
STEPS = 30
KEY = jax.random.key(0)


def start(folder, pause=0.0):
    environment = {
        **quick_environment(),
        "PYTHONPATH": str(RUN.parents[2]),
        "PYTHONWARNINGS": "ignore",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, str(RUN), str(folder), str(STEPS), str(pause)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def end(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def until(process, steps):
    """Reads what the process prints until it has made so many steps more."""
    for line in process.stdout:
        steps -= 1
        if not steps:
            return int(line)
    raise AssertionError(f"it ended: {process.stderr.read()[-3000:]}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return end(start(tmp_path_factory.mktemp("whole") / "run"))


def test_killed_three_times_it_ends_with_the_same_weights(uninterrupted, tmp_path):
    """kill -9 in the middle of anything, also while a checkpoint is being written."""
    chance = random.Random()
    for _ in range(3):
        process = start(tmp_path / "run", pause=0.05)
        at = until(process, chance.randint(3, 8))
        process.kill()
        process.communicate()
        print(f"killed at step {at}")
    last = end(start(tmp_path / "run"))
    assert last["seen"] == uninterrupted["seen"], "the same images in the same order"
    assert len(last["seen"]) == STEPS
    assert last["weights"] == uninterrupted["weights"], "and the moments, bases and average"


def test_sigterm_leaves_a_complete_checkpoint(uninterrupted, tmp_path):
    process = start(tmp_path / "run", pause=0.05)
    until(process, 5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 143, err[-3000:]
    reached = max(5, *map(int, out.split())) if out else 5
    assert str(reached) in os.listdir(tmp_path / "run")
    assert end(start(tmp_path / "run")) == uninterrupted


@pytest.fixture
def state(rng):
    """GaLore's bases, moments of 8 bits, an average."""
    params = {"a": {"kernel": jnp.asarray(rng.normal(size=(24, 200)), jnp.float32)}}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), galore(0.1, 4, inner=eight_bit(optax.adam(1.0), smallest=1))
    )
    step = make_step(lambda p, _, batch, key: (p["a"]["kernel"] ** 2).sum(1), optimizer)
    return step(init_state(params, optimizer, average=True), None, {}, KEY)[0]


def at_step(state, step):
    return state._replace(step=jnp.int32(step))


def test_everything_comes_back(state, tmp_path):
    with Checkpoints(tmp_path / "c", {"lr": 0.1, "path": Path("x")}) as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(state, {"history": [1, 2.5], "none": None})
        checkpoints.wait()
        assert checkpoints.steps == [1]
    with Checkpoints(tmp_path / "c", {"path": Path("x"), "lr": 0.1}) as checkpoints:
        again, extra = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert extra == {"history": [1, 2.5], "none": None}
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(old, new)


def test_the_last_few_and_the_best_are_kept(state, tmp_path):
    with Checkpoints(tmp_path, {}, keep=2) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(at_step(state, step), {}, best_step=min(step, 2))
        checkpoints.wait()
        assert checkpoints.steps == [2, 5, 6]
        assert int(checkpoints.restore_step(2, state).step) == 2
        with pytest.raises(CheckpointError, match="/3 is damaged"):
            checkpoints.restore_step(3, state)
    with pytest.raises(ValueError, match="keep is 0"):
        Checkpoints(tmp_path, {}, keep=0)


# Orbax leaves readers behind that fail once more when Python collects them, at any time.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_checkpoint_cut_in_half_is_passed_over(state, tmp_path):
    """Whichever of its files: it is refused, or nothing in it has changed."""
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save(at_step(state, 1), {"best": 0})
        checkpoints.save(at_step(state, 2), {"best": 0})
        checkpoints.wait()
        refused = 0
        for path in [path for path in sorted((tmp_path / "2").rglob("*")) if path.is_file()]:
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            said = []
            checkpoints._say = said.append
            again, _ = checkpoints.restore(state)
            path.write_bytes(whole)
            assert int(again.step) == (1 if said else 2)
            for text in said:
                assert text.startswith(f"checkpoint {tmp_path}/2 is damaged")
                assert text.endswith("trying the one before it")
            for old, new in zip(
                jax.tree.leaves(state)[1:], jax.tree.leaves(again)[1:], strict=True
            ):
                np.testing.assert_array_equal(old, new)
            refused += bool(said)
        assert refused >= 5

        for step in (1, 2):
            for path in (tmp_path / str(step) / "state").rglob("manifest.ocdbt"):
                path.write_bytes(b"")
        with pytest.raises(CheckpointError, match="no checkpoint can be used") as error:
            checkpoints.restore(state)
        gc.collect()
        assert all(f"{tmp_path}/{step} is damaged" in str(error.value) for step in (1, 2))


def test_another_config_is_refused_by_name(state, tmp_path):
    with Checkpoints(tmp_path, {"rank": 4, "lr": 0.1, "old": 1}) as checkpoints:
        checkpoints.save(state, {})
    changed = {"rank": 8, "lr": 0.1, "new": [2]}
    with (
        Checkpoints(tmp_path, changed) as checkpoints,
        pytest.raises(CheckpointError, match="other settings") as error,
    ):
        checkpoints.restore(state)
    assert str(error.value).splitlines()[1:] == [
        "  new: None then, [2] now",
        "  old: 1 then, None now",
        "  rank: 4 then, 8 now",
    ]


def test_a_fingerprint_sees_every_value_name_and_type():
    tree = {"a": {"b": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, "c": np.zeros(2)}
    first = fingerprint(tree)
    assert fingerprint(jax.tree.map(np.copy, tree)) == first
    nearly = jax.tree.map(np.copy, tree)
    nearly["a"]["b"][1, 2] = np.nextafter(np.float32(5), np.float32(6))
    others = [
        nearly,
        {"a": {"d": tree["a"]["b"]}, "c": tree["c"]},
        {**tree, "c": np.zeros(2, np.float32)},
        {"a": {"b": tree["a"]["b"].reshape(3, 2)}, "c": tree["c"]},
    ]
    assert len({first, *map(fingerprint, others)}) == 5
