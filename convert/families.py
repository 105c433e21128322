"""All the families, for what takes a checkpoint of any of them."""

from __future__ import annotations

from pathlib import Path

from convert import command, hub, sam, sam2
from convert.command import Family, Loaded
from samjax.models.weights import Config

FAMILIES = (sam.FAMILY, sam2.FAMILY)


def load(path: str | Path, variant: str | None = None, key: str | None = None) -> Loaded:
    """`convert.command.load` for a file, or a name on the hub, of any family."""
    if not Path(path).exists() and hub.is_name(str(path)):
        path = hub.download(str(path))
    return command.load(FAMILIES, path, variant, key)


def family_of(config: Config) -> Family:
    """The family of a config."""
    return command.family_of(FAMILIES, config)
