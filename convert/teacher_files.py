"""Converted files of SAMora's teachers: tensors keyed by path, the network's config beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from convert import bridge
from convert.torch_io import CheckpointError
from samjax.models.functional import abstract_params
from samjax.models.weights import load_tensors, save_tensors
from samjax.trees import Params


class Loaded(NamedTuple):
    """A network and what is known of where it came from, see ``load`` of each converter."""

    config: Any
    params: Params
    metadata: dict[str, str]


def save(
    path: str | Path, config: Any, params: Params, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file that `load_converted` reads. Atomic."""
    own = {"family": config.family, "config": json.dumps(config.to_dict())}
    save_tensors(path, params, {**(metadata or {}), **own})


def load_converted(path: Path, metadata: Mapping[str, str], kind: Any) -> Loaded:
    """The network of a file of `save`, whose config is a ``kind``.

    Raises ``CheckpointError``, without the path, for another family or config, and for tensors that
    are missing, left over or mis-shaped.
    """
    if metadata.get("family") != kind.family:
        found = metadata.get("family")
        raise CheckpointError(f"a model of family {found!r}; expected {kind.family!r}")
    try:
        config = kind.from_dict(json.loads(metadata["config"]))
    except (TypeError, AttributeError) as error:
        raise CheckpointError(f"the config in its metadata cannot be used ({error})") from error
    tensors = {name.replace("/", "."): array for name, array in load_tensors(path)[0].items()}
    same = [("{p}", "{p}")], [("*", "*", "...")]
    params = bridge.from_torch(tensors, abstract_params(config), *same)
    own = ("family", "config")
    return Loaded(config, params, {k: v for k, v in metadata.items() if k not in own})
