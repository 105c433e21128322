"""SAM (v1) checkpoints of Meta's PyTorch code to samjax and back.

    python -m convert.sam --ckpt sam_vit_b_01ec64.pth --verify
    python -m convert.sam --ckpt sam_vit_b_01ec64.safetensors --to-torch back.pth

Upstream: facebookresearch/segment-anything@dca509f, `build_sam.py` and `modeling/`. The model's
sizes are read from the checkpoint itself (`convert.sam_shapes`), so fine-tuned files with other
numbers of masks or other input sizes convert as well.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tyro

from convert import bridge
from convert.sam_shapes import describe, infer_config, strip_wrapper, variant_name
from convert.torch_io import CheckpointError, read_checkpoint, write_torch
from samjax.models.functional import abstract_params, init_params
from samjax.models.sam import VARIANTS, SamConfig
from samjax.models.weights import load_weights, save_weights
from samjax.trees import Params, flatten

if TYPE_CHECKING:
    from samjax.predictor import SamModel

NAMES: bridge.Names = [
    ("image_encoder/patch_embed/{p}", "image_encoder.patch_embed.proj.{p}"),
    ("image_encoder/neck/conv1/{p}", "image_encoder.neck.0.{p}"),
    ("image_encoder/neck/norm1/{p}", "image_encoder.neck.1.{p}"),
    ("image_encoder/neck/conv2/{p}", "image_encoder.neck.2.{p}"),
    ("image_encoder/neck/norm2/{p}", "image_encoder.neck.3.{p}"),
    (
        "prompt_encoder/pe_gaussian",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    ("prompt_encoder/mask_downscaling/conv1/{p}", "prompt_encoder.mask_downscaling.0.{p}"),
    ("prompt_encoder/mask_downscaling/norm1/{p}", "prompt_encoder.mask_downscaling.1.{p}"),
    ("prompt_encoder/mask_downscaling/conv2/{p}", "prompt_encoder.mask_downscaling.3.{p}"),
    ("prompt_encoder/mask_downscaling/norm2/{p}", "prompt_encoder.mask_downscaling.4.{p}"),
    ("prompt_encoder/mask_downscaling/conv3/{p}", "prompt_encoder.mask_downscaling.6.{p}"),
    ("mask_decoder/output_upscaling/deconv1/{p}", "mask_decoder.output_upscaling.0.{p}"),
    ("mask_decoder/output_upscaling/norm/{p}", "mask_decoder.output_upscaling.1.{p}"),
    ("mask_decoder/output_upscaling/deconv2/{p}", "mask_decoder.output_upscaling.3.{p}"),
    ("{p}", "{p}"),
]

LEAVES: bridge.Leaves = [
    ("deconv*/kernel", "weight", "i o h w -> h w o i"),
    ("kernel", "weight", "o i h w -> h w i o"),
    ("kernel", "weight", "o i -> i o"),
    ("embedding", "weight", "n c -> n c"),
    ("scale", "weight", "c -> c"),
    ("bias", "bias", "c -> c"),
    ("pos_embed", "pos_embed", "b h w c -> b h w c"),
    ("rel_pos_[hw]", "*", "s c -> s c"),
    ("pe_gaussian", "pe_gaussian", "d c -> d c"),
]


def convert(
    state_dict: Mapping[str, np.ndarray], config: SamConfig | None = None
) -> tuple[SamConfig, Params]:
    """A state dict of upstream's `Sam` as (config, parameter tree of float32 NumPy arrays).

    Args:
        state_dict: {upstream's key: array}; a wrapper's prefix before every key is taken off.
        config: what the checkpoint has to be; by default it is recognised from the tensors.

    Raises:
        CheckpointError: it is another model's.
        BridgeError: tensors are missing, left over or mis-shaped; lists them all.
    """
    _, state_dict = strip_wrapper(state_dict)
    config = config or infer_config(state_dict)
    return config, bridge.from_torch(state_dict, abstract_params(config), NAMES, LEAVES)


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """A parameter tree as upstream's state dict {key: float32 array}; `convert`'s inverse."""
    return bridge.to_torch(params, NAMES, LEAVES)


@dataclass(frozen=True)
class Loaded:
    """A model, and lines about the file it came from.

    Attributes:
        metadata: what a converted file records: the variant and the source's sha256.
        facts: (what, value) for people.
    """

    config: SamConfig
    params: Params
    metadata: Mapping[str, str]
    facts: tuple[tuple[str, str], ...]


def load(path: str | Path, variant: str | None = None, key: str | None = None) -> Loaded:
    """Read a SAM model from upstream's checkpoint or from a converted file, by content.

    Args:
        path: `.pth` (any form that `read_checkpoint` takes) or `.safetensors` of either kind.
        variant: what it has to be, such as "vit_b"; by default anything.
        key: see `read_checkpoint`.

    Raises:
        BridgeError: its tensors are not the model's; lists all that differ.
        ValueError: the file cannot be used. The message names it, as BridgeError's does.
        ImportError: PyTorch is needed for this file and not installed.
    """
    path = Path(path)
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}")
    try:
        loaded = (
            _load_converted(path) if _samjax_metadata(path) else _load_torch(path, variant, key)
        )
    except bridge.BridgeError as error:
        raise bridge.BridgeError(
            error.missing, error.unexpected, error.misshaped, source=str(path)
        ) from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    _check_variant(path, loaded.config, variant)
    return loaded


def _load_converted(path: Path) -> Loaded:
    config, params = load_weights(path)
    kept = {name: text for name, text in _samjax_metadata(path).items() if name != "config"}
    return Loaded(config, params, kept, (("converted from", kept.get("sha256", "unknown")),))


def _load_torch(path: Path, variant: str | None, key: str | None) -> Loaded:
    state_dict, info = read_checkpoint(path, key)
    wrapper, state_dict = strip_wrapper(state_dict)
    config = infer_config(state_dict)
    _check_variant(path, config, variant)
    config, params = convert(state_dict, config)
    stored = ", ".join(f"{count} {dtype}" for dtype, count in info.dtypes.items())
    facts = [("stored as", f"{stored} ({info.container})"), ("sha256", info.sha256)]
    if prefix := info.prefix + wrapper:
        facts.insert(0, ("prefix", f"{prefix!r} taken off every key"))
    if info.key:
        facts.insert(0, ("found under", repr(info.key)))
    metadata = {"variant": variant_name(config), "sha256": info.sha256, "source": path.name}
    return Loaded(config, params, metadata, tuple(facts))


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


def _check_variant(path: Path, config: SamConfig, variant: str | None) -> None:
    if variant is not None and variant_name(config) != variant:
        raise CheckpointError(
            f"{path}: expected {variant}, recognised {describe(config)}; "
            "leave --variant out to convert what it is"
        )


def _build(variant: str, checkpoint: str | Path | None = None) -> SamModel:
    if checkpoint is None:
        config = VARIANTS[variant]()
        params = init_params(config)
    else:
        loaded = load(checkpoint, variant)
        config, params = loaded.config, loaded.params
    from samjax.predictor import SamModel

    return SamModel(config, params)


sam_model_registry: dict[str, Callable[..., SamModel]] = {
    "default": functools.partial(_build, "vit_h"),
    **{name: functools.partial(_build, name) for name in ("vit_h", "vit_l", "vit_b")},
}
"""As upstream's: `sam_model_registry["vit_b"](checkpoint=path)`, for a `.pth` or a converted file.
Without a checkpoint the model is randomly initialised."""


@dataclass(frozen=True)
class Arguments:
    """Convert a SAM checkpoint between PyTorch and samjax."""

    ckpt: Path
    """The checkpoint: .pth, or .safetensors."""
    variant: str | None = None
    """What it has to be (vit_b, vit_l, vit_h); recognised from the file by default."""
    out: Path | None = None
    """The samjax file to write; by default beside the checkpoint, with suffix .safetensors."""
    to_torch: Path | None = None
    """Write a PyTorch file for Meta's code instead."""
    adapter: Path | None = None
    """A LoRA adapter to merge into the weights first."""
    key: str | None = None
    """Where the state dict lies, if the file holds several ("model", "ema")."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compare with Meta's model on one image before writing, stage by stage."""
    image: Path | None = None
    """The image for --verify; a made-up one by default."""


def run(arguments: Arguments) -> None:
    """What the command does; writes its one file at the very end.

    Raises:
        ValueError, OSError, ImportError: with a message for people. Nothing has been written.
    """
    target = _target(arguments)
    loaded = load(arguments.ckpt, arguments.variant, arguments.key)
    params = loaded.params
    if arguments.adapter is not None:
        params = _merge(params, arguments.adapter)
    print(f"{arguments.ckpt}: {describe(loaded.config)}")
    leaves = flatten(params).values()
    _print_facts(
        ("tensors", str(len(leaves))),
        ("parameters", f"{sum(leaf.size for leaf in leaves):,}"),
        *loaded.facts,
        *([("merged", str(arguments.adapter))] if arguments.adapter else []),
    )
    if arguments.verify:
        from convert.sam_verify import verify

        verify(loaded.config, params, arguments.image)
    if arguments.to_torch is not None:
        write_torch(arguments.to_torch, to_torch(params))
    elif target is not None:
        metadata = dict(loaded.metadata)
        if arguments.adapter is not None:
            metadata["adapter"] = arguments.adapter.name
        save_weights(target, loaded.config, params, metadata)
    if target is not None:
        _print_facts(("written to", str(target)))


def _target(arguments: Arguments) -> Path | None:
    """The file to write; None if there is only something to verify."""
    if arguments.to_torch is not None and arguments.out is not None:
        raise ValueError("--out and --to-torch exclude each other: one run writes one file")
    target = arguments.to_torch or arguments.out
    if target is None and _samjax_metadata(arguments.ckpt):
        if arguments.verify:
            return None
        raise ValueError(
            f"{arguments.ckpt}: is converted already; give --to-torch, --out or --verify"
        )
    if target is None and arguments.adapter is not None:
        raise ValueError("--adapter changes the weights; name the file with --out or --to-torch")
    target = target or arguments.ckpt.with_suffix(".safetensors")
    if target.resolve() == arguments.ckpt.resolve():
        raise ValueError(f"{target}: would overwrite the checkpoint itself; give another --out")
    return target


def _merge(params: Params, adapter: Path) -> Params:
    from samjax.peft.adapter_files import read_adapter
    from samjax.peft.lora import merge

    return merge(params, read_adapter(adapter))


def _print_facts(*facts: tuple[str, str]) -> None:
    for what, value in facts:
        print(f"  {what:<14} {value}")


def _fail(message: object) -> int:
    print(f"convert.sam: error: {message}", file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 1 after an error, when nothing was written."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m convert.sam")
    try:
        run(arguments)
    except OSError as error:
        # str() puts the number first; the text alone does where it names the file.
        return _fail(error.strerror if error.strerror and error.filename is None else error)
    except (ValueError, ImportError) as error:
        return _fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
