"""What the converters of all model families share: reading, checking, writing, and the command.

A family is its tables of names and layouts and its way to tell a config from a checkpoint; see
`convert.sam` and `convert.sam2`. What takes several tells the family from the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from convert import bridge, hub
from convert.torch_io import CheckpointError, read_checkpoint, write_torch
from samjax.models.functional import abstract_params
from samjax.models.weights import load_weights, resize_params, save_weights
from samjax.trees import Params, count_values, flatten


@dataclass(frozen=True)
class Family:
    """A model family on both sides of the bridge.

    Attributes:
        command: the module that converts it, such as "convert.sam".
        config: its config class.
        mark: a part of a key that its checkpoints have, and those of other families have not.
        names, leaves: the tables of `convert.bridge`.
        variants: the names of its sizes.
        infer_config: the config from a state dict; CheckpointError for another family's.
        strip_wrapper: takes off a wrapper's prefix; returns it and the state dict.
        variant_name, describe: of a config, for files and for people.
        key: under which a PyTorch file holds the state dict; None where it is the whole file.
        suffix: of upstream's files.
        verify: compares with Meta's model; arguments config, params and an image's path or None.
    """

    command: str
    config: type
    mark: str
    names: bridge.Names
    leaves: bridge.Leaves
    variants: tuple[str, ...]
    infer_config: Callable[[Mapping[str, Any]], Any]
    strip_wrapper: Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]
    variant_name: Callable[[Any], str]
    describe: Callable[[Any], str]
    key: str | None
    suffix: str
    verify: Callable[[Any, Params, Path | None], Any]

    def convert(
        self, state_dict: Mapping[str, np.ndarray], config: Any = None
    ) -> tuple[Any, Params]:
        """A state dict of upstream's as (config, parameter tree of float32 NumPy arrays).

        Args:
            state_dict: {upstream's key: array}; a wrapper's prefix before every key is taken off.
            config: what the checkpoint has to be; by default it is recognised from the tensors.

        Raises:
            CheckpointError: it is another model's.
            BridgeError: tensors are missing, left over or mis-shaped; lists them all.
        """
        _, state_dict = self.strip_wrapper(state_dict)
        config = config or self.infer_config(state_dict)
        tree = bridge.from_torch(state_dict, abstract_params(config), self.names, self.leaves)
        return config, tree

    def to_torch(self, params: Params) -> dict[str, np.ndarray]:
        """A parameter tree as upstream's state dict {key: float32 array}; `convert`'s inverse."""
        return bridge.to_torch(params, self.names, self.leaves)

    def write(self, path: str | Path, params: Params) -> None:
        """A parameter tree as upstream's file; see `write_torch` for what may go wrong."""
        write_torch(path, self.to_torch(params), self.key)

    def modules(self, params: Params) -> dict[str, str]:
        """{path of a layer: upstream's name of that module}, for PEFT's files."""
        table = bridge.routes(params, self.names, self.leaves)
        return {
            path.removesuffix("/kernel"): route.key.removesuffix(".weight")
            for path, route in table.items()
            if path.endswith("/kernel")
        }


@dataclass(frozen=True)
class Loaded:
    """A model, and lines about the file it came from.

    Attributes:
        family: the one it belongs to.
        metadata: what a converted file records: the variant and the source's sha256.
        facts: (what, value) for people.
    """

    family: Family
    config: Any
    params: Params
    metadata: Mapping[str, str]
    facts: tuple[tuple[str, str], ...]


def load(
    families: Sequence[Family], path: str | Path, variant: str | None = None, key: str | None = None
) -> Loaded:
    """Read a model from upstream's checkpoint or from a converted file, by content.

    Args:
        families: what it may be; the first speaks of a file that looks like none.
        path: `.pth` (any form that `read_checkpoint` takes) or `.safetensors` of either kind.
        variant: what it has to be, such as "vit_b"; by default anything.
        key: see `read_checkpoint`.

    Raises:
        BridgeError: its tensors are not the model's; lists all that differ.
        ValueError: the file cannot be used. The message names it, as BridgeError's does.
        ImportError: PyTorch is needed for this file and not installed.
    """
    path = Path(path)
    known = [name for family in families for name in family.variants]
    if variant is not None and variant not in known:
        raise ValueError(f"no variant {variant!r}; there are {', '.join(known)}")
    try:
        if _samjax_metadata(path):
            loaded = _load_converted(families, path)
        else:
            loaded = _load_torch(families, path, variant, key)
    except bridge.BridgeError as error:
        raise bridge.BridgeError(
            error.missing, error.unexpected, error.misshaped, source=str(path)
        ) from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    _check_variant(loaded.family, path, loaded.config, variant)
    return loaded


def family_of(families: Sequence[Family], config: Any) -> Family:
    """The family of a config.

    Raises:
        ValueError: it is of none of them.
    """
    for family in families:
        if isinstance(config, family.config):
            return family
    commands = " or ".join(family.command for family in families)
    raise ValueError(f"a model of family {config.family!r}; not {commands}'s")


def _load_converted(families: Sequence[Family], path: Path) -> Loaded:
    config, params = load_weights(path)
    family = family_of(families, config)
    kept = _samjax_metadata(path)
    kept = {name: kept[name] for name in kept if name not in ("config", "family")}
    return Loaded(
        family, config, params, kept, (("converted from", kept.get("sha256", "unknown")),)
    )


def _load_torch(
    families: Sequence[Family], path: Path, variant: str | None, key: str | None
) -> Loaded:
    state_dict, info = read_checkpoint(path, key)
    marked = (family for family in families if any(family.mark in name for name in state_dict))
    family = next(marked, families[0])
    wrapper, state_dict = family.strip_wrapper(state_dict)
    config = family.infer_config(state_dict)
    _check_variant(family, path, config, variant)
    config, params = family.convert(state_dict, config)
    stored = ", ".join(f"{count} {dtype}" for dtype, count in info.dtypes.items())
    facts = [("stored as", f"{stored} ({info.container})"), ("sha256", info.sha256)]
    if prefix := info.prefix + wrapper:
        facts.insert(0, ("prefix", f"{prefix!r} taken off every key"))
    if info.key:
        facts.insert(0, ("found under", repr(info.key)))
    metadata = {"variant": family.variant_name(config), "sha256": info.sha256, "source": path.name}
    return Loaded(family, config, params, metadata, tuple(facts))


def _samjax_metadata(path: Path) -> dict[str, str]:
    """The metadata of a converted file: safetensors with a config. {} for any other file."""
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if stream.read(1) != b"{" or length > path.stat().st_size:
                return {}
            stream.seek(8)
            metadata = json.loads(stream.read(length)).get("__metadata__", {})
    except (OSError, ValueError):
        return {}  # the readers say what is wrong with the file
    return metadata if "config" in metadata else {}


def _check_variant(family: Family, path: Path, config: Any, variant: str | None) -> None:
    if variant is not None and family.variant_name(config) != variant:
        raise CheckpointError(
            f"{path}: expected {variant}, recognised {family.describe(config)}; "
            "leave --variant out to convert what it is"
        )


@dataclass(frozen=True)
class Arguments:
    """Convert a checkpoint between PyTorch and samjax."""

    ckpt: str
    """The checkpoint: a .pth, .pt or .safetensors file, or a name on the Hugging Face hub, such as
    facebook/sam2.1-hiera-tiny or owner/name:file.pt."""
    variant: str | None = None
    """What it has to be (vit_b, sam2.1_hiera_tiny, ...); recognised from the file by default."""
    out: Path | None = None
    """The samjax file to write; by default beside the checkpoint, with suffix .safetensors."""
    to_torch: Path | None = None
    """Write a PyTorch file for Meta's code instead."""
    adapter: Path | None = None
    """A LoRA adapter to merge into the weights first."""
    image_size: int | None = None
    """Side of the model's frame in pixels, if another than the checkpoint's: 512 for MedSAM2."""
    key: str | None = None
    """Where the state dict lies, if the file holds several ("model", "ema")."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare with Meta's model on one image before writing, stage by stage."""
    image: Path | None = None
    """The image for --verify; a made-up one by default."""


def run(families: Sequence[Family], arguments: Arguments) -> None:
    """What the command does; writes its one file at the very end.

    Raises:
        ValueError, OSError, ImportError: with a message for people. Nothing has been written.
    """
    source, target = _source_and_target(arguments)
    loaded = load(families, source, arguments.variant, arguments.key)
    family, config, params = loaded.family, loaded.config, loaded.params
    if (side := arguments.image_size) is not None:
        config, params = resize_params(config, params, (side, side))
    if arguments.adapter is not None:
        params = _merge(family, params, arguments.adapter)
    print(f"{arguments.ckpt}: {family.describe(config)}")
    _print_facts(
        ("tensors", str(len(flatten(params)))),
        ("parameters", f"{count_values(params):,}"),
        *loaded.facts,
        *([("merged", str(arguments.adapter))] if arguments.adapter else []),
    )
    if arguments.verify:
        family.verify(config, params, arguments.image)
    if arguments.to_torch is not None:
        family.write(arguments.to_torch, params)
    elif target is not None:
        metadata = dict(loaded.metadata)
        if arguments.adapter is not None:
            metadata["adapter"] = arguments.adapter.name
        save_weights(target, config, params, metadata)
    if target is not None:
        _print_facts(("written to", str(target)))


def _source_and_target(arguments: Arguments) -> tuple[Path, Path | None]:
    """The file to read, and the one to write; None if there is only something to verify."""
    if arguments.to_torch is not None and arguments.out is not None:
        raise ValueError("--out and --to-torch exclude each other: one run writes one file")
    target = arguments.to_torch or arguments.out
    source, beside = Path(arguments.ckpt), Path(arguments.ckpt).with_suffix(".safetensors")
    if not source.exists() and hub.is_name(arguments.ckpt):
        source = hub.download(arguments.ckpt)
        beside = Path(source.name).with_suffix(".safetensors")  # not into the hub's cache
    if target is None and _samjax_metadata(source):
        if arguments.verify:
            return source, None
        raise ValueError(
            f"{arguments.ckpt}: is converted already; give --to-torch, --out or --verify"
        )
    if target is None and arguments.adapter is not None:
        raise ValueError("--adapter changes the weights; name the file with --out or --to-torch")
    target = target or beside
    if target.resolve() == source.resolve():
        raise ValueError(f"{target}: would overwrite the checkpoint itself; give another --out")
    return source, target


def _merge(family: Family, params: Params, adapter: Path) -> Params:
    from samjax.peft.adapter_files import read_adapter
    from samjax.peft.lora import merge

    return merge(params, read_adapter(adapter, family.modules(params)))


def _print_facts(*facts: tuple[str, str]) -> None:
    for what, value in facts:
        print(f"  {what:<14} {value}")


def main(families: Sequence[Family], argv: list[str] | None = None, name: str = "") -> int:
    """The command; returns the exit code: 0, or 1 after an error, when nothing was written.

    `name` is that of the module; by default the only family's.
    """
    name = name or families[0].command
    arguments = tyro.cli(Arguments, args=argv, prog=f"python -m {name}")
    try:
        run(families, arguments)
    except (ValueError, ImportError, OSError) as error:
        # An OSError's str() puts the number first; the text alone does where it names the file.
        text = isinstance(error, OSError) and error.filename is None and error.strerror
        print(f"{name}: error: {text or error}", file=sys.stderr)
        return 1
    return 0
