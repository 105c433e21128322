"""SimCLRv2's TensorFlow checkpoints to samjax: the teacher of SAMora's image expert.

    python -m convert.simclr --ckpt r50_2x_sk1/model.ckpt-250228

Upstream: google-research/simclr@383d414, `resnet.py` and `model_util.py` (TensorFlow 1); the
checkpoints lie under gs://simclr-checkpoints/simclrv2/pretrained, one folder a network. There the
layers are numbered as they are made: the shortcut of a block before the block, and convolutions
apart from norms, since one convolution of a selective kernel has none.

TensorFlow is not needed (`convert.tf_bundle`). A teacher takes no prompts, so the converted file,
`.safetensors`, is none of `samjax.models.weights.load_weights`; `load` reads it.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from convert import bridge
from convert.command import _print_facts, _samjax_metadata
from convert.teacher_files import Loaded, load_converted, save
from convert.tf_bundle import Bundle
from convert.torch_io import CheckpointError
from samjax.models.functional import abstract_params
from samjax.models.sk_resnet import SkResNetConfig
from samjax.trees import flatten, unflatten

LEAVES: bridge.Leaves = [
    ("kernel", "kernel", "..."),
    ("scale", "gamma", "c -> c"),
    ("bias", "beta", "c -> c"),
    ("mean", "moving_mean", "c -> c"),
    ("variance", "moving_variance", "c -> c"),
]
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # of each depth
AVERAGE = "ema_model/"  # before the names of a second network: the average over training
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"  # what only TensorFlow 2 writes


def unused(name: str, average: bool = False) -> str | None:
    """Why a variable is none of the network's; None if it is, or if nobody knows it.

    With `average`, the network is the one under ``ema_model/``.
    """
    if name.endswith("/Momentum"):
        return "state of the optimizer"
    if name == "global_step":
        return "number of training steps"
    if "head_supervised/" in name:
        return "classifier of ImageNet"
    if "memory" in name:
        return "older projections to contrast with"
    if average and name.startswith(("base_model/", "head_contrastive/")):
        return "last weights, of which the average is taken"
    if not average and name.startswith(AVERAGE):
        return "average of the weights, of which the last are taken"
    return None


def variant_name(config: SkResNetConfig) -> str:
    """Upstream's folder: "r50_2x_sk1"; or "custom"."""
    for depth, blocks in BLOCKS.items():
        if config == SkResNetConfig(blocks=blocks, width_multiplier=config.width_multiplier):
            return f"r{depth}_{config.width_multiplier}x_sk1"
    return "custom"


def convert(
    variables: Mapping[str, np.ndarray],
    config: SkResNetConfig | None = None,
    average: bool = False,
) -> Loaded:
    """The variables of a checkpoint as config and tree of float32 arrays.

    Args:
        variables: {upstream's name: array}; what `unused` knows may be left out.
        config: what the checkpoint has to be; by default ResNet-50 of width 2.
        average: take the moving average of the weights instead of the last ones.

    Raises:
        CheckpointError: it is TensorFlow 2's, or has no selective kernels.
        BridgeError: variables are missing, left over or mis-shaped; lists them all.
    """
    config = config or SkResNetConfig()
    prefix = AVERAGE if average else ""
    if OBJECT_GRAPH in variables:
        raise CheckpointError(
            "a checkpoint of TensorFlow 2; take that of TensorFlow 1, "
            "from gs://simclr-checkpoints/simclrv2/pretrained"
        )
    first = variables.get(f"{prefix}base_model/conv2d/kernel")
    if first is not None and first.shape[:2] == (7, 7):
        raise CheckpointError(
            "a network without selective kernels; take one whose name ends in _sk1"
        )
    ours = {name: array for name, array in variables.items() if unused(name, average) is None}
    abstract = flatten(abstract_params(config))
    # A 1x1 convolution has four axes there, a dense layer two, as both have here.
    pointwise = {
        path
        for path, leaf in abstract.items()
        if path.endswith("/kernel") and len(leaf.shape) == 2 and not path.startswith("head/")
    }
    wanted = {
        path: jax.ShapeDtypeStruct((1, 1, *leaf.shape), leaf.dtype) if path in pointwise else leaf
        for path, leaf in abstract.items()
    }
    names = [(f"{layer}/{{p}}", f"{prefix}{theirs}/{{p}}") for layer, theirs in layer_names(config)]
    params = flatten(bridge.from_torch(ours, unflatten(wanted), names, LEAVES))
    params = {path: leaf[0, 0] if path in pointwise else leaf for path, leaf in params.items()}
    return Loaded(config, unflatten(params), {"variant": variant_name(config)})


def layer_names(config: SkResNetConfig) -> list[tuple[str, str]]:
    """(path of our layer, upstream's name of it) of every convolution, dense layer and norm."""
    counts: Counter[str] = Counter()

    def numbered(kind: str) -> str:
        number = counts[kind]
        counts[kind] += 1
        return f"base_model/{kind}_{number}" if number else f"base_model/{kind}"

    names = []
    for path in _in_order(config):
        if path.endswith("/select"):
            names.append((path, numbered("conv2d")))
        else:
            names.append((f"{path}/conv", numbered("conv2d")))
            names.append((f"{path}/norm", numbered("batch_normalization")))
    for i in range(config.head_layers):
        names.append((f"head/{i}/dense", f"head_contrastive/nl_{i}/dense"))
        names.append((f"head/{i}/norm", f"head_contrastive/nl_{i}/batch_normalization"))
    return names


def _in_order(config: SkResNetConfig) -> Iterator[str]:
    """Our convolutions in the order in which upstream makes them."""
    yield from (f"stem/{i}" for i in range(3))
    for stage, count in enumerate(config.blocks):
        for block in range(count):
            parts = ["shortcut"] if block == 0 else []
            parts += ["reduce", "selective/kernels", "selective/squeeze", "selective/select"]
            yield from (f"stages/{stage}/{block}/{part}" for part in [*parts, "expand"])


def load(path: str | Path, config: SkResNetConfig | None = None, average: bool = False) -> Loaded:
    """Read a network from upstream's checkpoint or from a converted file.

    The metadata: "variant" such as "r50_2x_sk1"; of a checkpoint also its name as "source",
    "weights" ("last" or "averaged") and the "sha256" of its `.index`, which has each tensor's
    checksum.

    Args:
        path: what the checkpoint's files begin with (`model.ckpt-250228`, of which there are
            `.index` and `.data-…`), or its `.index`; or a converted `.safetensors`.
        config, average: see `convert`; a converted file has its own.

    Raises:
        BridgeError: its variables are not the model's; lists all that differ.
        CheckpointError: the file is missing, damaged, of another kind, or holds NaN.
    """
    path = Path(path)
    try:
        metadata = _samjax_metadata(path)
        if metadata:
            return load_converted(path, metadata, SkResNetConfig)
        variables = read_variables(path, average)
        loaded = convert(variables, config, average)
    except bridge.BridgeError as error:
        raise bridge.BridgeError(
            error.missing, error.unexpected, error.misshaped, source=str(path)
        ) from None
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    digest = hashlib.sha256(_index(path).read_bytes()).hexdigest()
    weights = "averaged" if average else "last"
    origin = {"sha256": digest, "source": path.name, "weights": weights}
    return loaded._replace(metadata={**loaded.metadata, **origin})


def read_variables(path: str | Path, average: bool = False) -> dict[str, np.ndarray]:
    """The variables of a TensorFlow checkpoint but for those that are `unused`; see `load`."""
    index = _index(Path(path))
    if not index.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint; expected the file {index.name} and its data in "
            f"{index.parent}, and the path without .index"
        )
    try:
        bundle = Bundle(index.with_suffix(""))
        names = [name for name in bundle.entries if not unused(name, average)]
        if OBJECT_GRAPH in names:
            return {OBJECT_GRAPH: np.array(0.0)}  # `convert` says what that means
        variables = {name: bundle.read(name) for name in names}
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: a damaged or incomplete checkpoint ({error})") from error
    broken = [k for k, a in variables.items() if a.dtype.kind == "f" and not np.isfinite(a).all()]
    if broken:
        listed = ", ".join(broken[:3])
        raise CheckpointError(
            f"{path}: NaN or infinite values in {len(broken)} of {len(variables)} variables: "
            f"{listed}"
        )
    return variables


def _index(path: Path) -> Path:
    return path if path.suffix == ".index" else path.with_name(f"{path.name}.index")


@dataclass(frozen=True)
class Arguments:
    """Convert a SimCLRv2 checkpoint of TensorFlow to samjax."""

    ckpt: Path
    """What the checkpoint's files begin with, as in r50_2x_sk1/model.ckpt-250228."""
    out: Path | None = None
    """The samjax file to write; by default beside the checkpoint, with .safetensors added."""
    average: bool = False
    """Take the moving average of the weights instead of the last ones."""
    depth: Literal[50, 101, 152] = 50
    """Of the network."""
    width: int = 2
    """Of the network: 1, 2 or 3."""


def run(arguments: Arguments) -> None:
    """What the command does; writes its one file at the very end.

    Raises:
        ValueError, OSError: with a message for people. Nothing has been written.
    """
    config = SkResNetConfig(blocks=BLOCKS[arguments.depth], width_multiplier=arguments.width)
    target = arguments.out or arguments.ckpt.with_name(f"{arguments.ckpt.name}.safetensors")
    config, params, metadata = load(arguments.ckpt, config, arguments.average)
    count = sum(math.prod(leaf.shape) for leaf in flatten(params).values())
    print(f"{arguments.ckpt}: SimCLRv2 {metadata['variant']}")
    _print_facts(("parameters", f"{count:,}"))
    _print_facts(*((k, metadata[k]) for k in ("weights", "sha256") if k in metadata))
    save(target, config, params, metadata)
    _print_facts(("written to", str(target)))


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 1 after an error, when nothing was written."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m convert.simclr")
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"convert.simclr: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
