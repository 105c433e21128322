"""A mesh of devices, and on which of them each array lies: one training step for any number.

Three axes: ``data`` (each group has its share of the batch and all parameters), ``fsdp`` (its share
of the batch and of the parameters, ZeRO-3) and ``tensor`` (its share of each layer's columns or
rows, Megatron's; the batch is shared).  ``jax.jit`` finds the communication by itself (GSPMD, arXiv
2105.04663); here is only said what lies where, by path rules as strict as the labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from samjax.peft.paths import in_order, label_by_path, path_name
from samjax.training.loop import TrainState, init_state

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))  # of the leading axis

COLUMNS, ROWS, WHOLE = "columns", "rows", "whole"  # what of a parameter ``tensor`` divides
# A layer that widens is divided by its columns and the one behind it by its rows, so that the
# activations between them are never gathered. The factors of LoRA and all else stay whole.
RULES = in_order(
    [
        (r"(params|frozen)/.*/(qkv|[qkv]_proj|lin1)/(kernel|bias)", COLUMNS),
        (r"(params|frozen)/.*/(proj|out_proj|lin2)/kernel", ROWS),
        (".*", WHOLE),
    ]
)
SMALL = 1024  # elements: what has fewer is not divided over ``fsdp``


def make_mesh(
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh of all devices of all processes; ``data`` None is what the others leave.

    Raises ``ValueError`` if the three do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    if data is None:
        data = max(count // max(fsdp * tensor, 1), 1)
    if min(data, fsdp, tensor) < 1 or data * fsdp * tensor != count:
        raise ValueError(
            f"a mesh of data {data} x fsdp {fsdp} x tensor {tensor} = {data * fsdp * tensor} "
            f"devices, but there are {count}: the three must multiply to that"
        )
    mesh = jax.make_mesh(
        (data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )
    if _rows_of_process(mesh) is None:  # an order for the wires that scatters a process's rows
        grid = np.array(devices).reshape(data, fsdp, tensor)
        mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)
    return mesh


def shardings_of(tree: Any) -> Any:
    """The sharding of each array (or shape with a sharding); of a state, for ``make_step``."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def batch_parts(mesh: Mesh) -> int:
    """How many parts a batch is divided into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """``ValueError`` if a batch, or a micro-batch of it, does not divide over the mesh."""
    parts = batch_parts(mesh)
    if batch_size % (parts * accumulate):
        raise ValueError(
            f"a batch of {batch_size} in {accumulate} micro-batches does not divide over data "
            f"{mesh.shape['data']} x fsdp {mesh.shape['fsdp']}: expected a multiple of "
            f"{parts * accumulate}"
        )


def process_rows(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process needs the i-th of n equal parts of every batch.

    ``make_loader(process_index=i, process_count=n)`` reads it.  Processes that differ in their
    ``tensor`` shards only need the same part.
    """
    rows = _rows_of_process(mesh)
    if rows is None:
        raise ValueError(f"the devices of a process are not side by side in {mesh}")
    return rows


def _rows_of_process(mesh: Mesh) -> tuple[int, int] | None:
    parts = batch_parts(mesh)
    index = NamedSharding(mesh, BATCH).addressable_devices_indices_map((parts,))
    own = sorted({part[0].indices(parts)[0] for part in index.values() if part is not None})
    side_by_side = own == list(range(own[0], own[0] + len(own)))
    if not side_by_side or parts % len(own) or own[0] % len(own):
        return None
    return own[0] // len(own), parts // len(own)


def spec(shape: tuple[int, ...], label: str, mesh: Mesh, path: str = "") -> PartitionSpec:
    """Where the axes of one parameter lie.

    ``tensor`` takes the axis that the label names; ``fsdp`` the longest that is left and divides,
    the last of equals: that is also the one that GaLore does not project.

    Raises ``ValueError`` naming the parameter if ``tensor`` does not divide its axis.
    """
    axes: list[str | None] = [None] * len(shape)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    if tensor > 1 and label != WHOLE:
        axis = len(shape) - (1 if label == COLUMNS else 2)
        if shape[axis] % tensor:
            raise ValueError(f"tensor {tensor} does not divide axis {axis} of {path}, {shape}")
        axes[axis] = "tensor"
    if fsdp > 1 and math.prod(shape) >= SMALL:
        free = [i for i, n in enumerate(shape) if axes[i] is None and n % fsdp == 0]
        if free:
            axes[max(free, key=lambda i: (shape[i], i))] = "fsdp"
    return PartitionSpec(*axes)


def param_shardings(params: Any, mesh: Mesh, rules: Sequence[tuple[str, str]] = RULES) -> Any:
    """A tree like ``params`` (arrays or shapes) of ``NamedSharding``.

    ``rules`` label each path ``columns``, ``rows`` or ``whole``.  The default ones are for SAM and
    SAM 2, whole: ``{"params": …, "factors": …, "frozen": …}``.  Errors: ``label_by_path``'s and
    ``spec``'s.
    """
    labels = label_by_path(params, rules)

    def one(path: tuple, leaf: Any, label: str) -> NamedSharding:
        return NamedSharding(mesh, spec(leaf.shape, label, mesh, path_name(path)))

    return jax.tree_util.tree_map_with_path(one, params, labels)


def state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of an optimizer's state (arrays or shapes): each leaf lies as its parameter does.

    A leaf belongs to the parameter whose path stands in its own.  Axes that an optimizer has
    shortened (GaLore's moments), leaves of another rank and what belongs to a parameter without
    being like it (GaLore's bases) are whole on every device, and so are counters.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    known = {
        tuple(path_name(path).split("/")): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(flat, jax.tree.leaves(shardings), strict=True)
    }
    whole = NamedSharding(mesh, PartitionSpec())

    def one(path: tuple, leaf: Any) -> NamedSharding:
        parts = tuple(path_name(path).split("/"))
        if parts[-1] == "codes":  # of moments in 8 bits, in the shape of what they stand for
            parts = parts[:-1]
        found = next((known[parts[i:]] for i in range(len(parts)) if parts[i:] in known), None)
        if found is None or len(found[0]) != len(leaf.shape):
            return whole
        axes = (
            a if n == old else None
            for a, n, old in zip(found[1], leaf.shape, found[0], strict=True)
        )
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(one, state)


def state_placement(
    trainable: Any, optimizer: optax.GradientTransformation, mesh: Mesh, average: bool = False
) -> TrainState:
    """The sharding of each array of the state of a ``trainable`` (arrays, or shapes with
    shardings); for ``make_step``."""
    shardings = shardings_of(trainable)
    shapes = jax.eval_shape(optimizer.init, trainable)
    counter: Any = NamedSharding(mesh, PartitionSpec())
    state = state_shardings(shapes, trainable, shardings, mesh)
    return TrainState(counter, shardings, state, shardings if average else None)


def place_state(
    trainable: Any, optimizer: optax.GradientTransformation, mesh: Mesh, average: bool = False
) -> TrainState:
    """``init_state`` of a ``trainable`` that lies on the mesh; each array where it belongs."""
    placement = state_placement(trainable, optimizer, mesh, average)
    init = partial(init_state, optimizer=optimizer, average=average)
    return jax.jit(init, out_shardings=placement)(trainable)


def place(tree: Any, shardings: Any) -> Any:
    """The arrays of ``tree``, which every process holds whole, laid out over the mesh."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every array whole on every device of the mesh; PRNG keys too."""
    whole = NamedSharding(mesh, PartitionSpec())

    def one(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf), whole))
        return place(leaf, whole)

    return jax.tree.map(one, tree)


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch (of arrays or trees) of which this process holds the rows of ``process_rows``."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), dict(batch)
    )


def to_host(tree: Any) -> Any:
    """The whole arrays as NumPy's, in every process; to be called by all processes."""

    def one(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.array(leaf)

    return jax.tree.map(one, tree)


def bytes_per_device(tree: Any) -> dict[int, int]:
    """Bytes of the arrays of ``tree`` on each device of this process, by device id."""
    total: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device.id] = total.get(shard.device.id, 0) + shard.data.nbytes
    return total
