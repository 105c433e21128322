"""The functional boundary: a config and a plain parameter tree to a callable model.

Outside ``samjax/models`` a model is a frozen config and a nested dict of arrays with string keys,
``params["image_encoder"]["blocks"]["0"]["attn"]["qkv"]["kernel"]``, whose path is written
``image_encoder/blocks/0/attn/qkv/kernel``.  ``bind`` turns both into the module, inside or outside
``jax.jit``; nothing else in the project touches NNX state.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from samjax.models.layers import Dense, Remat, SidePath
from samjax.trees import Params, block_columns, flatten, unflatten


class _SameKey(nnx.RngStream):
    """One key for all parameters: only their shapes are wanted.

    Counting keys while tracing takes a time that grows with the square of their number.
    """

    def __call__(self) -> jax.Array:
        return self.key[...]


@functools.lru_cache(maxsize=32)
def _abstract_module(config, dtype: DTypeLike, remat: Remat):
    """Graph definition, tree structure and the path of each leaf, without allocating anything."""

    def build():
        rngs = nnx.Rngs()
        setattr(rngs, "params", _SameKey(jax.random.key(0), tag="params"))  # noqa: B010
        return config.build(dtype=dtype, remat=remat, rngs=rngs)

    module = nnx.eval_shape(build)
    graph, state = nnx.split(module)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
    paths = ["/".join(str(key.key) for key in path) for path, _ in leaves]
    return graph, state, treedef, paths, [leaf for _, leaf in leaves]


def abstract_params(config) -> Params:
    """The tree that ``config``'s model needs, as ``jax.ShapeDtypeStruct`` leaves."""
    _, _, _, paths, leaves = _abstract_module(config, jnp.float32, False)
    structs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return unflatten(dict(zip(paths, structs, strict=True)))


def init_params(config, seed: int = 0) -> Params:
    """Fresh float32 parameters, the same for the same seed on every machine.

    Drawn by NumPy from the name and shape of each leaf.  Running the modules' own initialisers
    means compiling a generator for every shape: a minute for the smallest model, compiled or not.
    """
    drawn = {
        path: jnp.asarray(_draw(path, leaf.shape, seed), jnp.float32)
        for path, leaf in flatten(abstract_params(config)).items()
    }
    return unflatten(drawn)


def _draw(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    # A stream per leaf: a change of one layer leaves the others as they were.
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(path.encode())]))
    match path.rsplit("/", 1)[-1]:
        case "bias" | "rel_pos_h" | "rel_pos_w" | "mean":
            return np.zeros(shape)
        case "scale" | "variance":
            return np.ones(shape)
        case "kernel":  # Xavier for dense layers, LeCun for convolutions
            fan = sum(shape) / 2 if len(shape) == 2 else math.prod(shape[:-1])
            bound = (3 / fan) ** 0.5
            return rng.uniform(-bound, bound, shape)
        case "a":  # low-rank factors of a stage-2 encoder: hl_attention.py
            bound = shape[0] ** -0.5
            return rng.uniform(-bound, bound, shape)
        case "b":
            return np.zeros(shape)
        case "gain" | "gate":
            return np.ones(shape)
        case "gamma":  # a residual branch that starts almost switched off
            return np.full(shape, 1e-6)
        case name if name.endswith("_embed") or name == "pos_embed_window":
            return 0.02 * rng.standard_normal(shape, np.float32)
        case "embedding" | "pe_gaussian":
            return rng.standard_normal(shape, np.float32)
    raise ValueError(f"{path}: no rule for how to initialise it")


def bind(
    config,
    params: Params,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = False,
    adapter: Params | None = None,
    adapter_scale: float = 1.0,
    adapter_dropout: float = 0.0,
    drop_output: bool = False,
    dropout_key: jax.Array | None = None,
) -> Any:
    """The module with ``params``, computing in ``dtype``, with an adapter laid beside it.

    ``adapter`` is a tree ``{path of a Dense: {block: {"a": (in, r), "b": (r, out)}}}``; ``block``
    names output columns: ``q``, ``k``, ``v`` of a fused ``qkv``, or ``all``.  It is added as
    ``adapter_scale · (x a) b``; with ``dropout_key``, entries of ``x``, or with ``drop_output`` of
    the product, are dropped with probability ``adapter_dropout`` on the side path only.

    Raises ``ValueError`` naming all missing, unknown and mis-shaped parameters, or all factors of
    the adapter that fit no dense layer.
    """
    graph, state, treedef, paths, leaves = _abstract_module(config, dtype, remat)
    flat, known = flatten(params), set(paths)
    problems = [f"missing: {path}" for path in paths if path not in flat]
    problems += [f"unknown: {path}" for path in flat if path not in known]
    for path, leaf in zip(paths, leaves, strict=True):
        if path in flat and flat[path].shape != leaf.shape:
            problems.append(f"{path}: expected shape {leaf.shape}, got {flat[path].shape}")
    if problems:
        raise ValueError("these parameters do not fit the model:\n  " + "\n  ".join(problems))
    pure = jax.tree.unflatten(treedef, [flat[path] for path in paths])
    state = jax.tree.map(lambda leaf: leaf, state)  # a copy: the cached one stays abstract
    nnx.replace_by_pure_dict(state, pure)
    module = nnx.merge(graph, state)
    if adapter is not None:
        side = partial(
            SidePath, scale=adapter_scale, dropout=adapter_dropout, drop_output=drop_output
        )
        _lay_adapter(module, adapter, side, dropout_key)
    return module


def _lay_adapter(module, adapter: Params, side_path: Callable[..., SidePath], key) -> None:
    sides: dict[str, list[SidePath]] = {}
    flat, problems = flatten(adapter), []
    for path in flat:
        pair, _, side = path.rpartition("/")
        dense_path, _, block = pair.rpartition("/")
        try:
            dense = _find(module, dense_path)
            columns = block_columns(block, dense.kernel.shape[1])
            if side not in ("a", "b"):
                raise ValueError("expected factors named a and b")
        except ValueError as error:
            problems.append(f"{path}: {error}")
            continue
        if side == "b" and f"{pair}/a" in flat:
            continue  # dealt with together with its a
        a, b = flat.get(f"{pair}/a"), flat.get(f"{pair}/b")
        if a is None or b is None:
            problems.append(f"{path}: its other half is missing")
            continue
        rank, outputs = a.shape[-1], columns[1] - columns[0]
        expected = (dense.kernel.shape[0], rank), (rank, outputs)
        if (a.shape, b.shape) != expected:
            problems.append(f"{pair}: expected shapes {expected}, got {(a.shape, b.shape)}")
            continue
        own_key = None if key is None else jax.random.fold_in(key, zlib.crc32(path.encode()))
        sides.setdefault(dense_path, []).append(side_path(a, b, columns, key=own_key))
    if problems:
        raise ValueError("the adapter does not fit the model:\n  " + "\n  ".join(problems))
    for dense_path, paths in sides.items():
        # The bound module lives for one call and is never split again: no NNX bookkeeping needed.
        object.__setattr__(_find(module, dense_path), "side_paths", tuple(paths))


def _find(module, path: str) -> Dense:
    found = module
    for key in path.split("/"):
        try:
            found = found[int(key)] if key.isdigit() else getattr(found, key)
        except (AttributeError, IndexError, TypeError) as error:
            raise ValueError("the model has no such layer") from error
    if not isinstance(found, Dense):
        raise ValueError("the model has no dense layer there")
    return found
