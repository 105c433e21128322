"""Masked autoencoders of Meta's PyTorch code to samjax and back.

    python -m convert.mae --ckpt mae_pretrain_vit_large.pth
    python -m convert.mae --ckpt mae_pretrain_vit_large.safetensors --to-torch back.pth

Upstream: facebookresearch/mae, `models_mae.py`. Its files `mae_pretrain_vit_*.pth` hold the encoder
only, which is what a teacher needs. To train one further take `mae_pretrain_vit_*_full.pth`, which
have the decoder too; `mae_visualize_vit_*.pth` have one, but are other weights, trained without
`norm_pix`.

A teacher takes no prompts, so its files are none of `samjax.models.weights.load_weights`; `load`
reads them, and a converted one without torch.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from convert import bridge
from convert.command import _print_facts, _samjax_metadata
from convert.shapes import Shapes, count_layers, mlp_ratio, vote
from convert.teacher_files import Loaded, load_converted, save
from convert.torch_io import CheckpointError, read_checkpoint, write_torch
from samjax.models.functional import abstract_params, init_params
from samjax.models.mae import VARIANTS, MaeConfig, sincos_positions
from samjax.trees import Params, count_values

NAMES: bridge.Names = [
    ("patch_embed/{p}", "patch_embed.proj.{p}"),
    ("cls_embed", "cls_token"),
    ("mask_embed", "mask_token"),
    ("{block}/mlp/lin1/{p}", "{block}.mlp.fc1.{p}"),
    ("{block}/mlp/lin2/{p}", "{block}.mlp.fc2.{p}"),
    ("{p}", "{p}"),
]
LEAVES: bridge.Leaves = [
    ("kernel", "weight", "o i h w -> h w i o"),
    ("kernel", "weight", "o i -> i o"),
    ("scale", "weight", "c -> c"),
    ("bias", "bias", "c -> c"),
    ("*_embed", "*", "b t c -> b t c"),
]
TOLERANCE = 1e-5  # of a fixed position: upstream's versions compute it in float32 or float64


def infer_config(state_dict: Mapping[str, Any]) -> MaeConfig:
    """The config of the masked autoencoder that `state_dict` belongs to.

    Args:
        state_dict: {upstream's key: anything with a `shape`}.

    Heads show in no shape: both widths have to be those of a known variant. The grid is taken to
    be square, as upstream's. Where the decoder is absent it is the variant's.

    Raises:
        CheckpointError: it is another model's, or too little of it is there to tell.
    """
    shapes: Shapes = {name: tuple(leaf.shape) for name, leaf in state_dict.items()}
    if not {"cls_token", "pos_embed"} & shapes.keys() or not _layers(shapes, "blocks"):
        first = ", ".join(list(shapes)[:3])
        raise CheckpointError(f"not a masked autoencoder (its first tensors are {first})")
    norms = r"blocks\.\d+\.norm[12]\.(weight|bias)"
    width = vote(shapes, "the width", (norms, 0))
    variant = _of_width(width, "width")
    patch = vote(shapes, "the patch size", (r"patch_embed\.proj\.weight", 2))
    tokens = vote(shapes, "the grid", (r"(decoder_)?pos_embed", 1)) - 1
    side = round(tokens**0.5)
    if side * side != tokens:
        raise CheckpointError(f"its {tokens} positions are no square grid; pass a config")
    hidden = vote(shapes, "the width of an MLP", (r"blocks\.\d+\.mlp\.fc1\.(weight|bias)", 0))
    config = replace(
        variant,
        image_size=(side * patch, side * patch),
        patch_size=patch,
        depth=_layers(shapes, "blocks"),
        mlp_ratio=mlp_ratio(width, hidden),
    )
    if not _has_decoder(shapes):
        return config
    narrow = vote(shapes, "the decoder's width", ("decoder_" + norms, 0))
    return replace(
        config,
        decoder_width=narrow,
        decoder_depth=_layers(shapes, "decoder_blocks"),
        decoder_heads=_of_width(narrow, "decoder_width").decoder_heads,
    )


def variant_name(config: MaeConfig) -> str:
    """The variant with this encoder ("vit_large"), whatever its image size; or "custom"."""
    for name, make in VARIANTS.items():
        variant = make()
        fields = ("patch_size", "width", "depth", "heads", "mlp_ratio")
        if all(getattr(config, field) == getattr(variant, field) for field in fields):
            return name
    return "custom"


def convert(state_dict: Mapping[str, np.ndarray], config: MaeConfig | None = None) -> Loaded:
    """A state dict of upstream's as config and tree of float32 arrays.

    Args:
        state_dict: {upstream's key: array}, with or without the decoder.
        config: what the checkpoint has to be; by default it is recognised from the tensors. For
            another image size, change that field of the result: the parameters do not know it.

    Raises:
        CheckpointError: it is another model's, or its positions are not the fixed ones.
        BridgeError: tensors are missing, left over or mis-shaped; lists them all.
    """
    config = config or infer_config(state_dict)
    complete = _has_decoder(state_dict)
    fixed = _positions(config)
    wanted = {**abstract_params(config), **fixed}
    if not complete:
        wanted = {name: part for name, part in wanted.items() if not _of_decoder(name)}
    params = bridge.from_torch(state_dict, wanted, NAMES, LEAVES)
    off = {name: np.abs(params.pop(name) - fixed[name]).max() for name in fixed if name in wanted}
    if any(difference > TOLERANCE for difference in off.values()):
        listed = ", ".join(f"{name} by up to {difference:.1e}" for name, difference in off.items())
        raise CheckpointError(
            f"its positions differ from the fixed sines and cosines ({listed}; allowed "
            f"{TOLERANCE:.0e}): learned or interpolated ones are not supported"
        )
    if not complete:
        # A stream of random numbers per leaf: without encoder blocks it is the same decoder.
        fresh = init_params(replace(config, depth=0))
        params |= {
            name: jax.tree.map(np.asarray, fresh[name]) for name in fresh if _of_decoder(name)
        }
    decoder = "converted" if complete else "fresh"
    return Loaded(config, params, {"variant": variant_name(config), "decoder": decoder})


def to_torch(config: MaeConfig, params: Params) -> dict[str, np.ndarray]:
    """Upstream's state dict {key: float32 array}, with decoder and positions."""
    return bridge.to_torch({**params, **_positions(config)}, NAMES, LEAVES)


def load(path: str | Path, config: MaeConfig | None = None, key: str | None = None) -> Loaded:
    """Read a masked autoencoder from upstream's checkpoint or from a converted file, by content.

    The metadata: "variant"; "decoder", which is "converted", or "fresh" where the checkpoint had
    none and it was initialised at random; of a file also its "sha256" and its name as "source".

    Args:
        path: `.pth` (any form that `read_checkpoint` takes) or `.safetensors` of either kind.
        config: see `convert`; a converted file has its own.
        key: see `read_checkpoint`.

    Raises:
        BridgeError: its tensors are not the model's; lists all that differ.
        ValueError: the file cannot be used. The message names it, as BridgeError's does.
        ImportError: PyTorch is needed for this file and not installed.
    """
    path = Path(path)
    try:
        metadata = _samjax_metadata(path)
        if metadata:
            return load_converted(path, metadata, MaeConfig)
        state_dict, info = read_checkpoint(path, key)
        loaded = convert(state_dict, config)
    except bridge.BridgeError as error:
        raise bridge.BridgeError(
            error.missing, error.unexpected, error.misshaped, source=str(path)
        ) from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    origin = {"sha256": info.sha256, "source": path.name}
    return loaded._replace(metadata={**loaded.metadata, **origin})


def _positions(config: MaeConfig) -> dict[str, np.ndarray]:
    """Upstream's tables of positions {key: (1, 1 + t, c)}, which our parameters do without."""
    widths = {"pos_embed": config.width, "decoder_pos_embed": config.decoder_width}
    return {name: sincos_positions(config.grid, c)[None] for name, c in widths.items()}


def _of_decoder(name: str) -> bool:
    return name.startswith(("decoder_", "mask_"))


def _has_decoder(names: Mapping[str, Any]) -> bool:
    return any(_of_decoder(name) for name in names)


def _layers(shapes: Shapes, name: str) -> int:
    return count_layers(shapes, re.compile(name + r"\.(\d+)\..*"))


def _of_width(width: int, field: str) -> MaeConfig:
    """The variant whose `field` is `width`."""
    known = {getattr(config, field): config for config in (make() for make in VARIANTS.values())}
    if width not in known:
        raise CheckpointError(
            f"its {field} is {width}; known are {sorted(known)}. "
            "The heads show in no shape: pass a config"
        )
    return known[width]


@dataclass(frozen=True)
class Arguments:
    """Convert a masked autoencoder between PyTorch and samjax."""

    ckpt: Path
    """The checkpoint: a .pth or a .safetensors file."""
    out: Path | None = None
    """The samjax file to write; by default beside the checkpoint, with suffix .safetensors."""
    to_torch: Path | None = None
    """Write a PyTorch file for Meta's code instead."""
    key: str | None = None
    """Where the state dict lies, if the file holds several ("model", "ema")."""


def run(arguments: Arguments) -> None:
    """What the command does; writes its one file at the very end.

    Raises:
        ValueError, OSError, ImportError: with a message for people. Nothing has been written.
    """
    if arguments.to_torch is not None and arguments.out is not None:
        raise ValueError("--out and --to-torch exclude each other: one run writes one file")
    beside = arguments.ckpt.with_suffix(".safetensors")
    target = arguments.to_torch or arguments.out or beside
    if target.resolve() == arguments.ckpt.resolve():
        raise ValueError(f"{target}: would overwrite the checkpoint itself; give another --out")
    config, params, metadata = load(arguments.ckpt, key=arguments.key)
    height, width = config.image_size
    print(f"{arguments.ckpt}: MAE {metadata['variant']}, image {height} x {width}")
    _print_facts(
        ("parameters", f"{count_values(params):,}"),
        *((name, metadata[name]) for name in ("decoder", "sha256") if name in metadata),
    )
    if arguments.to_torch is not None:
        write_torch(target, to_torch(config, params), "model")
    else:
        save(target, config, params, metadata)
    _print_facts(("written to", str(target)))


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 1 after an error, when nothing was written."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m convert.mae")
    try:
        run(arguments)
    except (ValueError, ImportError, OSError) as error:
        print(f"convert.mae: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
