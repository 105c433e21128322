"""One declaration of names and layouts, read forwards and backwards.

A model's bridge is two tables. `names` says what a parameter is called on the other side,
`leaves` how it lies in memory there:

    NAMES = [
        ("encoder/neck/conv1/{p}", "encoder.neck.0.{p}"),
        ("{p}", "{p}"),
    ]
    LEAVES = [
        ("deconv*/kernel", "weight", "i o h w -> h w o i"),
        ("kernel", "weight", "o i h w -> h w i o"),
        ("kernel", "weight", "o i -> i o"),
        ("*", "*", "..."),
    ]

In both the first match wins. `from_torch` walks *our* tree, so the tree itself lists what has to be
filled, and the emptied checkpoint proves that nothing was lost; `to_torch` walks the same tree with
the same tables, so the way back cannot drift from the way there.

This module knows neither PyTorch nor SAM: it maps dicts of NumPy arrays.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samjax.trees import flatten, unflatten

Names = Sequence[tuple[str, str]]
"""(our path, their key), `/` against `.`; `{p}` stands for any text and is copied across."""

Leaves = Sequence[tuple[str, str, str]]
"""(glob on the last components of our path, their leaf's name or `*` for the same, 'theirs ->
ours' axes or `...` for the same). A rule applies when its number of axes fits the array."""

Tree = dict[str, Any]
"""A nested dict with string keys; its leaves are arrays, or anything with a `shape`."""

_LISTED = 40


class BridgeError(ValueError):
    """A checkpoint and a model do not fit; lists every mismatch, not only the first.

    Attributes:
        missing: {key: shape} that the model needs and the checkpoint lacks.
        unexpected: {key: shape} that the checkpoint has and the model does not know.
        misshaped: {key: (shape the model needs, shape found)}.
    All keys and shapes are those of the checkpoint's side; `source` names it in the message.
    """

    def __init__(
        self,
        missing: Mapping[str, tuple[int, ...]],
        unexpected: Mapping[str, tuple[int, ...]],
        misshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
        source: str = "the checkpoint",
    ) -> None:
        self.missing = dict(missing)
        self.unexpected = dict(unexpected)
        self.misshaped = dict(misshaped)
        lines = [
            f"{source} does not fit the model: {len(missing)} missing, "
            f"{len(unexpected)} left over, {len(misshaped)} of another shape"
        ]
        lines += _listing("missing     ", [f"{k} {s}" for k, s in self.missing.items()])
        lines += _listing("left over   ", [f"{k} {s}" for k, s in self.unexpected.items()])
        lines += _listing(
            "other shape ",
            [f"{k}: expected {e}, found {f}" for k, (e, f) in self.misshaped.items()],
        )
        super().__init__("\n".join(lines))


def _listing(title: str, entries: list[str]) -> list[str]:
    more = len(entries) - _LISTED
    lines = [f"  {title} {entry}" for entry in entries[:_LISTED]]
    return [*lines, f"  {title} … and {more} more"] if more > 0 else lines


@dataclass(frozen=True)
class Route:
    """Where one of our parameters lives on the other side.

    Attributes:
        key: its key there.
        axes: `ours = theirs.transpose(axes)`.
    """

    key: str
    axes: tuple[int, ...]

    @property
    def inverse_axes(self) -> tuple[int, ...]:
        return tuple(self.axes.index(axis) for axis in range(len(self.axes)))


def routes(tree: Tree, names: Names, leaves: Leaves) -> dict[str, Route]:
    """{our path: its route} for every leaf of `tree` (arrays or shape structs).

    Raises:
        ValueError: a mistake in the tables: a leaf without a rule, or two of our parameters that
            would share one key.
    """
    table: dict[str, Route] = {}
    owners: dict[str, str] = {}
    for path, leaf in flatten(tree).items():
        renamed, axes = _match_leaf(path, len(leaf.shape), leaves)
        key = _match_name(renamed, names)
        if key in owners:
            raise ValueError(f"both {owners[key]!r} and {path!r} map to {key!r}")
        owners[key] = path
        table[path] = Route(key, axes)
    return table


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    abstract: Tree,
    names: Names,
    leaves: Leaves,
    ignore: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Carry a checkpoint over into our layout.

    Args:
        state_dict: {their key: array}, floating point. Not changed, and not aliased by the result.
        abstract: our parameter tree; only the shapes of its leaves are used.
        names: see `Names`.
        leaves: see `Leaves`.
        ignore: (glob on their key, reason) for tensors that we have no use for.

    Returns:
        A nested dict like `abstract` of C-contiguous float32 arrays.

    Raises:
        BridgeError: tensors are missing, left over, or of another shape; all of them at once.
        ValueError: a tensor that the model needs is not floating point.
    """
    left = {k: a for k, a in state_dict.items() if not _ignored(k, ignore)}
    table = routes(abstract, names, leaves)
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(abstract).items()}
    missing: dict[str, tuple[int, ...]] = {}
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    filled: dict[str, np.ndarray] = {}
    for path, route in table.items():
        expected = tuple(shapes[path][axis] for axis in route.inverse_axes)
        array = left.pop(route.key, None)
        if array is None:
            missing[route.key] = expected
        elif tuple(array.shape) != expected:
            misshaped[route.key] = (expected, tuple(array.shape))
        else:
            filled[path] = array
    if missing or left or misshaped:
        raise BridgeError(missing, {k: tuple(a.shape) for k, a in left.items()}, misshaped)
    return unflatten(
        {p: _as_float32(table[p].key, a.transpose(table[p].axes)) for p, a in filled.items()}
    )


def to_torch(params: Tree, names: Names, leaves: Leaves) -> dict[str, np.ndarray]:
    """Carry our parameters back: {their key: C-contiguous float32 array}.

    `params` is a nested dict of NumPy or JAX arrays. The exact inverse of `from_torch`.
    """
    flat = flatten(params)
    return {
        route.key: _as_float32(path, np.asarray(flat[path]).transpose(route.inverse_axes))
        for path, route in routes(params, names, leaves).items()
    }


def _as_float32(name: str, array: np.ndarray) -> np.ndarray:
    # bfloat16 and its kin are extension types to NumPy, of kind "V"; JAX's ml_dtypes can cast them.
    if array.dtype.kind in "biuOSUMmc":
        raise ValueError(f"{name!r} is {array.dtype}; expected floating point")
    return np.array(array, dtype=np.float32, order="C", copy=True)


def _ignored(key: str, ignore: Sequence[tuple[str, str]]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern, _ in ignore)


def _match_leaf(path: str, ndim: int, leaves: Leaves) -> tuple[str, tuple[int, ...]]:
    """(our path with their leaf's name, axes) by the first rule that fits."""
    components = path.split("/")
    for pattern, their_leaf, arrangement in leaves:
        wanted = pattern.split("/")
        tail = components[-len(wanted) :]
        axes = _axes(arrangement, ndim)
        if axes is None or len(tail) < len(wanted):
            continue
        if all(fnmatch.fnmatchcase(c, w) for c, w in zip(tail, wanted, strict=True)):
            name = components[-1] if their_leaf == "*" else their_leaf
            return "/".join([*components[:-1], name]), axes
    raise ValueError(f"no leaf rule fits {path!r} with {ndim} axes")


def _axes(arrangement: str, ndim: int) -> tuple[int, ...] | None:
    """'o i h w -> h w i o' as the transposition (2, 3, 1, 0); None where ndim differs."""
    if arrangement == "...":
        return tuple(range(ndim))
    theirs, _, ours = (side.split() for side in arrangement.partition("->"))
    if sorted(theirs) != sorted(ours) or len(set(ours)) != len(ours):
        raise ValueError(f"not a transposition: {arrangement!r}")
    return tuple(theirs.index(axis) for axis in ours) if len(ours) == ndim else None


def _match_name(path: str, names: Names) -> str:
    for ours, theirs in names:
        if found := _as_regex(ours).fullmatch(path):
            texts = {hole: text.replace("/", ".") for hole, text in found.groupdict().items()}
            return theirs.format(**texts)
    raise ValueError(f"no name rule fits {path!r}")


@functools.cache
def _as_regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", pattern)
    return re.compile(
        "".join(f"(?P<{part}>.+)" if i % 2 else re.escape(part) for i, part in enumerate(parts))
    )
