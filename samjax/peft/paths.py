"""Strict labels for parameters by the path of each leaf.

A label says how a parameter is trained (``train``, ``freeze``, …) or stored.  Every parameter gets
exactly one: a path that no rule covers, one that two rules label differently, and a rule that
covers no path, are errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from samjax.trees import count_bytes

FREEZE = "freeze"


def path_name(path: tuple) -> str:
    """A key path of ``jax.tree_util`` as ``a/b/0/c``."""

    def text(key) -> str:
        return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))))

    return "/".join(text(key) for key in path)


def label_by_path(params: Any, rules: Sequence[tuple[str, str]]) -> Any:
    """A tree like ``params`` with a label at each leaf: that of the rule whose regular expression
    matches the whole path.

    Raises ``ValueError`` naming every parameter without a rule, every one that rules of different
    labels match (see ``in_order``), and every rule that matches nothing.
    """
    compiled = [(re.compile(pattern), label) for pattern, label in rules]
    used, problems = set(), []

    def label(path: tuple, _: Any) -> str:
        name = path_name(path)
        matching = [i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(name)]
        used.update(matching)
        found = list(dict.fromkeys(compiled[i][1] for i in matching))
        if len(found) > 1:
            problems.append(f"{name} is labelled {' and '.join(map(repr, found))}")
        elif not found:
            problems.append(f"no rule for {name}")
        return found[0] if found else ""

    labels = jax.tree_util.tree_map_with_path(label, params)
    problems += [
        f"nothing matches {pattern.pattern!r}"
        for index, (pattern, _) in enumerate(compiled)
        if index not in used
    ]
    if problems:
        raise ValueError(
            "labels must cover every parameter exactly once, and every rule must match one:\n  "
            + "\n  ".join(problems)
        )
    return labels


def in_order(rules: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rules of which the first that matches is meant, as rules that exclude each other."""
    exclusive, earlier = [], []
    for pattern, label in rules:
        but_not = rf"(?!(?:{'|'.join(earlier)})\Z)" if earlier else ""
        exclusive.append((f"{but_not}(?:{pattern})", label))
        earlier.append(pattern)
    return exclusive


def split_by_label(params: Any, labels: Any, label: str) -> tuple[dict, dict]:
    """``params`` (a nested dict) as two nested dicts: leaves with ``label``, and the others."""
    chosen, others = {}, {}
    for key, value in params.items():
        if isinstance(value, dict):
            inner = split_by_label(value, labels[key], label)
            for target, part in zip((chosen, others), inner, strict=True):
                if part:
                    target[key] = part
        else:
            (chosen if labels[key] == label else others)[key] = value
    return chosen, others


def join(first: dict, second: dict) -> dict:
    """Undoes ``split_by_label``; a leaf that both hold is a ``ValueError``."""
    joined = dict(first)
    for key, value in second.items():
        if key not in joined:
            joined[key] = value
        elif isinstance(value, dict) and isinstance(joined[key], dict):
            joined[key] = join(joined[key], value)
        else:
            raise ValueError(f"both trees hold a leaf at {key!r}")
    return joined


def table(params: Any, labels: Any, states: Mapping[str, Any] | None = None) -> str:
    """Parameters per label, and MiB of weights, gradients and optimizer state, for a person.

    ``states`` are the optimizer's states by label (``optax.partition``'s ``inner_states``), arrays
    or shapes; what is frozen has neither state nor gradient.  Gradients are counted as if all were
    there at once, which a compiled step may avoid.
    """
    counts: dict[str, list[int]] = {}
    for leaf, label in zip(jax.tree.leaves(params), jax.tree.leaves(labels), strict=True):
        entry = counts.setdefault(label, [0, 0, 0])
        entry[0] += 1
        entry[1] += leaf.size
        entry[2] += leaf.size * leaf.dtype.itemsize
    total = sum(entry[1] for entry in counts.values())
    columns = (("tensors", 9), ("parameters", 14), ("share", 9))
    sizes = (("weights MiB", 13), ("gradients MiB", 15), ("state MiB", 11))
    lines = [f"{'label':<10}" + "".join(f"{name:>{width}}" for name, width in columns + sizes)]
    for label, (tensors, size, nbytes) in sorted(counts.items()):
        state = count_bytes((states or {}).get(label, ()))
        values = nbytes, 0 if label == FREEZE else nbytes, state
        parts = [f"{tensors:>9}{size:>14,}{size / total:>9.2%}"]
        parts += [f"{v / 2**20:>{w}.2f}" for v, (_, w) in zip(values, sizes, strict=True)]
        lines.append(f"{label:<10}" + "".join(parts))
    return "\n".join(lines)
