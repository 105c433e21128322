"""Eight devices, three ways to use them, one loss curve; two processes, and one that goes on.

Devices are virtual, of the CPU, in processes of their own: here there is one.
"""

import json
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from compiling import quick_environment
from samjax.data.phantom import write_phantom_folder
from samjax.models.functional import abstract_params
from samjax.models.sam import vit_b
from samjax.models.sam2_config import sam2
from samjax.peft.eight_bit import eight_bit
from samjax.peft.galore import galore
from samjax.training.sharding import (
    AXES,
    RULES,
    check_batch,
    make_mesh,
    param_shardings,
    place_batch,
    process_rows,
    replicate,
    spec,
    state_shardings,
    to_host,
)
from samjax.trees import flatten

FINETUNE = ("-m", "experiments.finetune")
RUN = Path(__file__).with_name("sharded_run.py")
REPOSITORY = RUN.parents[2]
METHODS = ("lora", "galore", "full")
STEPS = 12  # of two processes
EVERY = bool(os.environ.get("SAMJAX_EVERY_SIZE"))
MESHES = {  # the methods that are tried on each; compiling them all takes seven minutes
    "1 1 1": METHODS if EVERY else ("lora", "galore"),
    "2 2 2": METHODS if EVERY else ("lora", "galore"),
    "8 1 1": METHODS if EVERY else (),
    "1 8 1": METHODS if EVERY else (),
}


def start(*arguments, devices=8, program=(RUN,), **variables):
    environment = {
        **quick_environment(),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
        "PYTHONWARNINGS": "ignore",
        **variables,
    }
    command = [sys.executable, *map(str, (*program, *arguments))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def answer(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def mesh_of(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def runs():
    """What each mesh answers, by mesh and method."""
    found = {}
    for mesh, methods in ((mesh, methods) for mesh, methods in MESHES.items() if methods):
        found[mesh] = answer(start("curves", *mesh.split(), ",".join(methods)))
    return found


@pytest.mark.slow
def test_every_mesh_gives_the_curve_of_one_device(runs):
    for mesh, methods in MESHES.items():
        for method in methods:
            one, many = (np.array(runs[name][method]["losses"]) for name in ("1 1 1", mesh))
            assert len(one) == 5
            assert method == "lora" or one[-1] < one[0] - 0.01, "it learns"
            difference = np.abs(many / one - 1).max()
            print(f"{mesh}, {method}: {difference:.1e}")
            assert difference <= 1e-5


@pytest.mark.slow
def test_parameters_and_optimizer_state_are_divided(runs):
    """Small arrays and GaLore's bases stay whole: a device of eight holds more than an eighth."""
    for mesh, parts, most in (("2 2 2", 4, 0.6), ("1 8 1", 8, 0.4)):
        for method in MESHES[mesh]:
            one, many = runs["1 1 1"][method]["bytes"], runs[mesh][method]["bytes"]
            for name in ("trainable", "optimizer") if method != "lora" else ("frozen",):
                share = max(many[name]) / one[name][0]
                print(f"{mesh}, {method}, {name}: {share:.3f} of one device's bytes")
                assert len(many[name]) == 8
                assert 1 / parts <= share <= most
    if EVERY:
        copies = runs["8 1 1"]["lora"]["bytes"]["frozen"]
        assert set(copies) == set(runs["1 1 1"]["lora"]["bytes"]["frozen"]), "data: each has all"


@pytest.mark.slow
def test_two_processes_are_preempted_and_one_goes_on(tmp_path):
    """Two processes of four devices give the curve of one with eight; when SIGTERM comes to one,
    both stop at the same step; one process goes on with the same batches in the same order.

    One of the two is told where the other is, and one learns it from SLURM.
    """
    alone = answer(start("run", tmp_path / "alone", STEPS, 2, 4, 1))
    port = free_port()
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "127.0.0.1,node[002-003]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1",
        "JAX_COORDINATOR_PORT": port,
    }
    shared, mesh = tmp_path / "shared", (2, 4, 1)
    both = [
        start("run", shared, STEPS, *mesh, f"127.0.0.1:{port}", 2, 0, devices=4),
        start("run", shared, STEPS, *mesh, "auto", devices=4, PREEMPTED_AT="2", **slurm),
    ]
    first, second = (answer(process) for process in both)
    stopped = len(first["losses"])
    assert 2 < stopped < STEPS
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], alone["losses"][:stopped], rtol=1e-5)
    rows = [a + b for a, b in zip(first["seen"], second["seen"], strict=True)]
    assert rows == alone["seen"][:stopped]
    assert [path.name for path in shared.iterdir()] == [str(stopped)], "saved there, and complete"

    after = answer(start("run", shared, STEPS, 1, 4, 1, devices=4))
    assert after["seen"][stopped:] == alone["seen"][stopped:], "the next batches, each whole"
    np.testing.assert_allclose(after["losses"], alone["losses"], rtol=1e-5)


@pytest.mark.slow
def test_the_whole_command_by_two_processes(tmp_path):
    """Fine-tuning, validation and scores: one process's, up to roundings; the first writes."""
    write_phantom_folder(tmp_path, "colour", 8, size=(64, 64), seed=0, target="disc")
    settings = {
        "images": tmp_path / "images", "masks": tmp_path / "masks", "variant": "vit_xs",
        "image-size": 64, "method": "full", "steps": 3, "batch-size": 4, "validate-every": 2,
    }  # fmt: skip
    given = [part for name, value in settings.items() for part in (f"--{name}", value)]
    command = partial(start, *given, "--no-progress", "--no-torch-export", program=FINETUNE)
    address = f"127.0.0.1:{free_port()}"
    cluster = ("--mesh.fsdp", 4, "--mesh.coordinator", address, "--mesh.processes", 2)
    running = [
        command("--out", tmp_path / "two", *cluster, "--mesh.process", index, devices=2)
        for index in range(2)
    ]
    running.append(command("--out", tmp_path / "one", devices=1))
    for process in running:
        _, error = process.communicate(timeout=900)
        assert process.returncode == 0, error[-3000:]
    two, one = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one")
    )
    assert [entry.keys() for entry in two["history"]] == [e.keys() for e in one["history"]]
    for here, there in zip(two["history"], one["history"], strict=True):
        np.testing.assert_allclose(list(here.values()), list(there.values()), rtol=1e-5)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        path.name for path in (tmp_path / "one").iterdir()
    }


def test_no_cluster_to_be_found(tmp_path):
    process = start("run", tmp_path, 1, 1, 1, 1, "auto", devices=1)
    _, error = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "--mesh.coordinator auto: this is no job of SLURM, Open MPI, GKE or a TPU pod" in error


@pytest.mark.parametrize(
    "config", [vit_b(), sam2("hiera_tiny")], ids=["vit_b", "sam2.1_hiera_tiny"]
)
def test_rules_on_real_sizes(config):
    tree = {"params": {}, "factors": {}, "frozen": abstract_params(config)}
    found = {
        path: sharding.spec
        for path, sharding in flatten(param_shardings(tree, mesh_of(1, 8, 4))).items()
    }
    block = "frozen/image_encoder/" + ("blocks/2" if "vit" in str(config) else "trunk/blocks/2")
    block = next(p for p in found if p.endswith("blocks/2/attn/qkv/kernel"))[
        : -len("/attn/qkv/kernel")
    ]
    assert found[f"{block}/attn/qkv/kernel"] == PartitionSpec("fsdp", "tensor")
    assert found[f"{block}/attn/proj/kernel"] == PartitionSpec("tensor", "fsdp")
    assert found[f"{block}/mlp/lin1/bias"] == PartitionSpec("tensor")
    assert found[f"{block}/norm1/scale"] == PartitionSpec(None)
    held = sum(
        np.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(
            jax.tree.leaves(tree),
            jax.tree.leaves(param_shardings(tree, mesh_of(1, 8, 4))),
            strict=True,
        )
    )
    whole = sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert held < 0.06 * whole


def test_fsdp_leaves_galore_s_projected_axis_alone():
    mesh = mesh_of(1, 4, 1)
    assert spec((768, 2304), "whole", mesh) == PartitionSpec(None, "fsdp")
    assert spec((768, 768), "whole", mesh) == PartitionSpec(None, "fsdp"), (
        "a tie projects the input"
    )
    assert spec((3072, 768), "whole", mesh) == PartitionSpec("fsdp", None)
    assert spec((30, 20), "whole", mesh) == PartitionSpec(None, None), "small"


def test_state_lies_as_its_parameters_do():
    mesh = mesh_of(1, 4, 1)
    params = {"params": {"lin1": {"kernel": np.zeros((64, 96), np.float32)}}}
    shardings = param_shardings(params, mesh, [(".*", "whole")])
    for optimizer in (
        galore(1e-3, 4),
        galore(1e-3, 4, inner=eight_bit(optax.adam(1.0), smallest=1)),
    ):
        shapes = jax.eval_shape(optimizer.init, params)
        for path, sharding in zip(
            (jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(shapes)[0]),
            jax.tree.leaves(state_shardings(shapes, params, shardings, mesh)),
            strict=True,
        ):
            moment = ("mu" in path or "nu" in path) and "scales" not in path
            assert ("fsdp" in sharding.spec) == moment, path


def test_one_device_is_a_mesh_too():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert process_rows(mesh) == (0, 1)
    batch = place_batch({"x": np.arange(4)}, mesh)
    np.testing.assert_array_equal(to_host(batch)["x"], np.arange(4))
    key = jax.random.key(3)
    assert replicate({"key": key}, mesh)["key"] == key


def test_meshes_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"data 2 x fsdp 1 x tensor 1 = 2 devices, but there are 1"
    ):
        make_mesh(2)
    with pytest.raises(ValueError, match="data 1 x fsdp 0"):
        make_mesh(None, 0)
    mesh = mesh_of(4, 2, 1)
    check_batch(mesh, 16, 2)
    with pytest.raises(ValueError, match=r"batch of 12 in 1 micro-.* expected a multiple of 8"):
        check_batch(mesh, 12)
    with pytest.raises(ValueError, match="expected a multiple of 16"):
        check_batch(mesh, 24, 2)
    with pytest.raises(ValueError, match=r"tensor 3 does not divide axis 1 of a/b, \(6, 8\)"):
        spec((6, 8), "columns", mesh_of(1, 1, 3), "a/b")
    with pytest.raises(ValueError, match="nothing matches"):
        param_shardings({"w": np.zeros((2, 2))}, mesh, RULES)
