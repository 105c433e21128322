"""SAM 2 on a clip: time per tracked frame over upstream's, alternating frame by frame.

    python -m benchmarks.sam2_video --variant sam2.1_hiera_tiny --frames 10

Both track the same objects through the same made-up clip with the same random weights; frame i is
tracked by upstream, then by us. The first frames have few memories, the later ones a full bank, so
the list shows what an empty bank costs. On a CPU both compute in float32; on a GPU in bfloat16, and
`--compile` gives upstream `torch.compile` (its memory attention compiles for any length).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from benchmarks.sam2_image import setup
from benchmarks.timing import machine, seconds
from samjax.atomic import write_json
from samjax.models.functional import bind
from samjax.predictor import SamModel
from samjax.video import SAM2VideoPredictor
from samjax.video.steps import bank_of


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time of our SAM 2 on a clip over upstream's."""

    variant: str = "sam2.1_hiera_tiny"
    """Such as sam2.1_hiera_tiny."""
    image_size: int = 1024
    """Side of the frame in pixels."""
    frames: int = 10
    """Length of the clip; from the eighth tracked frame on, the bank is full."""
    objects: int = 1
    """Objects that are tracked."""
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile upstream's encoder, memory attention and memory encoder."""
    out: Path = Path("benchmarks/results/sam2_video.json")
    """Where the figures go."""


def clip(frames: int) -> np.ndarray:
    """uint8 (t, 480, 640, 3): a disc that moves over a texture."""
    rows, columns = np.mgrid[:480, :640]
    ground = np.random.default_rng(0).integers(0, 90, (48, 64, 3)).repeat(10, 0).repeat(10, 1)
    moving = [(rows - 240) ** 2 + (columns - 120 - 30 * i) ** 2 < 70**2 for i in range(frames)]
    return np.stack([np.where(disc[..., None], 220, ground) for disc in moving]).astype(np.uint8)


def run(arguments: Arguments) -> dict[str, Any]:
    """The benchmark; returns what it writes."""
    import torch

    config, upstream, params, dtype, autocast = setup(arguments.variant, arguments.image_size)
    attend = upstream.memory_attention.forward

    def in_float32(**given):  # upstream's own types fail where there is no autocast and no pointer
        return attend(**{**given, "memory": given["memory"].float()})

    if not autocast._enabled:
        upstream.memory_attention.forward = in_float32
    if arguments.compile:
        for part in (upstream.image_encoder, upstream.memory_encoder):
            part.forward = torch.compile(part.forward)
        upstream.memory_attention.forward = torch.compile(attend, dynamic=True)
    frames = clip(arguments.frames)
    predictor = SAM2VideoPredictor(SamModel(config, params), fill_hole_area=0, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), autocast:
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(f"{folder}/{i:05}.jpg", quality=95)
        states = upstream.init_state(folder), predictor.init_state(folder)
        for obj in range(arguments.objects):
            given = {"points": [[120.0 + 20 * obj, 240.0]], "labels": [1]}
            upstream.add_new_points_or_box(states[0], 0, obj, **given)
            predictor.add_new_points_or_box(states[1], 0, obj, **given)
        # A pass to compile, then the one that counts, from the first tracked frame on.
        for _ in predictor.propagate_in_video(states[1], 0, 2):
            pass
        theirs = upstream.propagate_in_video(states[0])
        ours = predictor.propagate_in_video(states[1])
        next(theirs), next(ours)
        pairs = []
        for _ in range(1, arguments.frames):
            pairs.append((seconds(lambda: next(theirs)), seconds(lambda: next(ours))))
    full = pairs[config.num_memories - 1 :] or pairs
    report = {
        "variant": arguments.variant,
        "image_size": config.image_size,
        "objects": arguments.objects,
        "dtype": jnp.dtype(dtype).name,
        "upstream_compiled": arguments.compile,
        **machine(),
        "upstream_seconds": [round(a, 3) for a, _ in pairs],
        "ours_seconds": [round(b, 3) for _, b in pairs],
        "speed_over_upstream_median": round(statistics.median(a / b for a, b in pairs), 3),
        "with_a_full_bank": round(statistics.median(a / b for a, b in full), 3),
        "stages_seconds": stages(predictor, states[1], arguments.frames - 1),
    }
    write_json(arguments.out, report)
    return report


def stages(predictor: SAM2VideoPredictor, state: Any, frame: int) -> dict[str, float]:
    """Minimum of three calls of each part of ours on one frame; `condition` with 1 and all."""
    config, params = predictor.config, predictor.model.params
    dtype = predictor._static["dtype"]
    pixels = jnp.zeros((1, *config.image_size, 3))
    tracks = list(state.tracks.values())
    full = bank_of(config, tracks, frame, frame + 1, reverse=False, most=-1)
    one = bank_of(config, tracks, 1, frame + 1, reverse=False, most=-1)

    def part(call: Any) -> Any:
        return jax.jit(lambda params, *given: call(bind(config, params, dtype=dtype), *given))

    from samjax.video.steps import _stack

    features = part(lambda m, x: m.encode_image(x))(params, pixels)
    logits = jnp.zeros((len(tracks), *config.low_res_size))
    score, prompted = jnp.ones(len(tracks)), jnp.zeros(len(tracks), bool)
    parts = {
        "image_encoder": (part(lambda m, x: m.encode_image(x)), (pixels,)),
        "memory_attention_1": (
            part(lambda m, f, b: m.condition(f.embedding, _stack(b))),
            (features, one),
        ),
        "memory_attention_full": (
            part(lambda m, f, b: m.condition(f.embedding, _stack(b))),
            (features, full),
        ),
        "memory_encoder": (
            part(lambda m, f, x, s, p: m.encode_memory(f.embedding, x, s, p)),
            (features, logits, score, prompted),
        ),
    }
    found = {}
    for name, (call, given) in parts.items():
        jax.block_until_ready(call(params, *given))
        times = [
            seconds(lambda c=call, g=given: jax.block_until_ready(c(params, *g))) for _ in range(3)
        ]
        found[name] = round(min(times), 4)
    return found


def main(argv: list[str] | None = None) -> int:
    """The command."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m benchmarks.sam2_video")
    for name, value in run(arguments).items():
        print(f"{name:<28}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
