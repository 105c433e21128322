"""Plain parameter trees: nested dicts with string keys, and the names used in their paths.

Every room of the house may import this file; it imports none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import traverse_util

Params = dict[str, Any]  # nested; leaves are arrays


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict to ``{"a/b/c": leaf}``, in the tree's own order."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """``{"a/b/c": leaf}`` to a nested dict."""
    return traverse_util.unflatten_dict(flat, sep="/")


def count_values(tree: Any) -> int:
    """Numbers in all leaves of a tree of arrays, or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def count_bytes(tree: Any) -> int:
    """Bytes of all leaves, on all devices together."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def block_columns(block: str, width: int) -> tuple[int, int]:
    """Start and stop of a named output block of a dense layer with ``width`` columns.

    ``q``, ``k`` and ``v`` are the thirds of a fused ``qkv``; ``all`` is the whole layer.
    """
    if block == "all":
        return 0, width
    index = {"q": 0, "k": 1, "v": 2}.get(block)
    if index is None or width % 3:
        raise ValueError(f"unknown block {block!r} of {width} columns; expected q, k, v or all")
    return index * width // 3, (index + 1) * width // 3
