"""Time of our image encoder over upstream's, alternating in one run.

    python -m benchmarks.image_encoder --variant vit_b --rounds 5

Both encode the same image with the same random weights in float32; each round times upstream, then
ours, so that a drifting machine hurts both.  On CPU it also times the parts of ours (patch
embedding, a windowed block, a global block, neck) and says how much of the time is matrix products
at the machine's own measured speed.  The result goes to ``benchmarks/results/`` as JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.timing import alternate, machine, seconds
from convert import reference, sam
from samjax.atomic import write_json
from samjax.models.functional import bind
from samjax.models.sam import VARIANTS


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time of our image encoder over upstream's."""

    variant: str = "vit_b"
    """vit_xs, vit_b, vit_l or vit_h."""
    image_size: int | None = None
    """Side of the frame in pixels; by default the variant's."""
    rounds: int = 5
    """Alternating rounds after a warm-up."""
    out: Path = Path("benchmarks/results/image_encoder.json")
    """Where the figures go."""


def run(arguments: Arguments) -> dict[str, Any]:
    """The benchmark; returns what it writes."""
    import torch

    build = VARIANTS[arguments.variant]
    size = arguments.image_size
    config = build() if size is None else build((size, size))
    upstream = reference.randomise(reference.build_reference_sam(config), 0)
    _, params = sam.convert({name: t.numpy() for name, t in upstream.state_dict().items()})
    params = jax.tree.map(jnp.asarray, params)
    images = np.random.default_rng(0).standard_normal((1, *config.image_size, 3), np.float32)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    encode = jax.jit(lambda params, x: bind(config, params).image_encoder(x))
    compiling = seconds(lambda: jax.block_until_ready(encode(params, images)))

    def theirs() -> np.ndarray:
        with torch.inference_mode():
            return upstream.image_encoder(tensor).numpy()

    def ours() -> np.ndarray:
        return np.asarray(encode(params, images))

    difference = np.abs(ours() - theirs().transpose(0, 2, 3, 1)).max() / theirs().std()
    report = {
        "variant": arguments.variant,
        "image_size": config.image_size,
        **machine(),
        "compile_seconds": round(compiling, 2),
        "difference_over_std": float(difference),
        **alternate(theirs, ours, arguments.rounds),
        "stages_seconds": stages(config, params, images),
    }
    write_json(arguments.out, report)
    return report


def stages(config, params, images: np.ndarray) -> dict[str, float]:
    """Minimum of three calls of each part of our encoder, and of a matrix product of its size."""
    encoder = config.image_encoder
    windowed = next(i for i in range(encoder.depth) if i not in encoder.global_blocks)
    whole = encoder.global_blocks[0]
    x = jnp.zeros((1, *encoder.grid, encoder.width))

    def part(call: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return jax.jit(lambda params, x: call(bind(config, params).image_encoder, x))

    parts = {
        "patch_embedding": (part(lambda m, x: m.embed_patches(x)), images),
        "windowed_block": (part(lambda m, x: m.blocks[windowed](x)), x),
        "global_block": (part(lambda m, x: m.blocks[whole](x)), x),
        "neck": (part(lambda m, x: m.neck(x)), x),
    }
    found = {}
    for name, (call, argument) in parts.items():
        jax.block_until_ready(call(params, argument))
        found[name] = min(
            seconds(lambda c=call, a=argument: jax.block_until_ready(c(params, a)))
            for _ in range(3)
        )
    found["all_blocks"] = found["windowed_block"] * (
        encoder.depth - len(encoder.global_blocks)
    ) + found["global_block"] * len(encoder.global_blocks)
    return {name: round(value, 4) for name, value in found.items()}


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m benchmarks.image_encoder")
    for name, value in run(arguments).items():
        print(f"{name:<28}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
