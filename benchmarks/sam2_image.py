"""SAM 2 on an image: time of our encoder and decoder over upstream's, alternating in one run.

    python -m benchmarks.sam2_image --variant sam2.1_hiera_tiny --rounds 5

Both have the same random weights. On a CPU both compute in float32; on a GPU in bfloat16, and
`--compile` gives upstream `torch.compile`. The result goes to `benchmarks/results/` as JSON.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.timing import alternate, machine, matmul_peak
from convert import reference, sam2
from samjax.atomic import write_json
from samjax.models.functional import bind
from samjax.models.prompt_encoder import merge_prompts
from samjax.models.sam2_config import VARIANTS
from samjax.models.sam2_config import sam2 as build


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time of our SAM 2 on an image over upstream's."""

    variant: str = "sam2.1_hiera_tiny"
    """Such as sam2.1_hiera_tiny."""
    image_size: int = 1024
    """Side of the frame in pixels."""
    rounds: int = 5
    """Alternating rounds after a warm-up."""
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile upstream's encoder."""
    out: Path = Path("benchmarks/results/sam2_image.json")
    """Where the figures go."""


def setup(variant: str, image_size: int) -> tuple[Any, Any, Any, Any, Any]:
    """(config, upstream on its device, our parameters, our dtype, upstream's autocast)."""
    import torch

    config = build(*VARIANTS[variant], image_size=(image_size, image_size))
    torch.manual_seed(0)
    upstream = reference.randomise(reference.build_reference_sam2(config), 0)
    state = {name: tensor.numpy() for name, tensor in upstream.state_dict().items()}
    _, params = sam2.convert(state, config)
    on_gpu = jax.default_backend() == "gpu"
    device = "cuda" if on_gpu else "cpu"
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=on_gpu)
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    return config, upstream.to(device), jax.tree.map(jnp.asarray, params), dtype, autocast


def run(arguments: Arguments) -> dict[str, Any]:
    """The benchmark; returns what it writes."""
    import torch

    config, upstream, params, dtype, autocast = setup(arguments.variant, arguments.image_size)
    device = next(upstream.parameters()).device
    if arguments.compile:
        upstream.image_encoder.forward = torch.compile(upstream.image_encoder.forward)
    pixels = np.random.default_rng(0).uniform(0, 255, (1, *config.image_size, 3)).astype("f")
    images = jnp.asarray(pixels)
    mean, std = (np.array(v, np.float32) for v in (config.pixel_mean, config.pixel_std))
    tensor = torch.from_numpy(((pixels - mean) / std).transpose(0, 3, 1, 2).copy()).to(device)
    encode = jax.jit(lambda p, x: bind(config, p, dtype=dtype).encode_image(x))
    flops = encode.lower(params, images).compile().cost_analysis()["flops"]

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def their_encoder() -> Any:
        with torch.inference_mode(), autocast:
            levels = upstream.forward_image(tensor)["backbone_fpn"]
        wait()
        return levels

    def our_encoder() -> Any:
        return jax.block_until_ready(encode(params, images))

    levels, features = their_encoder(), our_encoder()
    expected = levels[2].float().cpu().numpy().transpose(0, 2, 3, 1)
    difference = np.abs(np.asarray(features.embedding, np.float32) - expected).max()
    point = np.full((1, 1, 2), arguments.image_size / 3, np.float32)
    coords, labels = merge_prompts(point, np.ones((1, 1)), None, box_first=True)
    given = torch.from_numpy(point).to(device), torch.ones((1, 1), dtype=torch.int, device=device)

    def their_decoder() -> None:
        with torch.inference_mode(), autocast:
            sparse, dense = upstream.sam_prompt_encoder(given, None, None)
            positions = upstream.sam_prompt_encoder.get_dense_pe()
            upstream.sam_mask_decoder.predict_masks(
                levels[2], positions, sparse, dense, False, levels[:2]
            )
        wait()

    @jax.jit
    def decode(params, features):
        model = bind(config, params, dtype=dtype)
        prompt = model.encode_prompt(jnp.asarray(coords), jnp.asarray(labels))
        return model.decode(features.embedding, prompt, features.high_res)

    report = {
        "variant": arguments.variant,
        "image_size": config.image_size,
        "dtype": jnp.dtype(dtype).name,
        "upstream_compiled": arguments.compile,
        **machine(),
        "difference_over_std": float(difference / expected.std()),
        "encoder": alternate(their_encoder, our_encoder, arguments.rounds),
        "decoder": alternate(
            their_decoder,
            lambda: jax.block_until_ready(decode(params, features)),
            4 * arguments.rounds,
        ),
    }
    achieved = flops / min(report["encoder"]["ours_seconds"])
    report["encoder"]["fraction_of_matmul_peak"] = round(achieved / matmul_peak(dtype), 3)
    write_json(arguments.out, report)
    return report


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m benchmarks.sam2_image")
    for name, value in run(arguments).items():
        print(f"{name:<28}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
