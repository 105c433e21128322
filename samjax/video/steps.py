"""The compiled steps of tracking; each is compiled once for a clip, however long it is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from samjax.models.functional import bind
from samjax.models.ops import resize_antialiased, resize_bilinear
from samjax.models.sam2 import ImageFeatures, MemoryBank, ObjectPrediction
from samjax.models.sam2_config import Sam2Config
from samjax.trees import Params
from samjax.video.memory import ObjectTrack, Record, Slots, fill_slots

STATIC = ("config", "dtype")


@functools.partial(jax.jit, static_argnames=STATIC)
def encode(
    params: Params, frame: Num[Array, "h w 3"], *, config: Sam2Config, dtype: DTypeLike
) -> ImageFeatures:
    """A frame of 0..255 RGB in the model frame."""
    return bind(config, params, dtype=dtype).encode_image(frame[None])


@functools.partial(jax.jit, static_argnames=STATIC)
def prompt(
    params: Params,
    features: ImageFeatures,
    bank: dict[str, Any] | None,
    coords: Float[Array, "1 p 2"],
    labels: Int[Array, "1 p"],
    mask_logits: Float[Array, "1 h4 w4 1"] | None,
    multimask: Bool[Array, " 1"],
    *,
    config: Sam2Config,
    dtype: DTypeLike,
) -> ObjectPrediction:
    """One object on a frame with points; without a bank as on a clip's first frame."""
    model = bind(config, params, dtype=dtype)
    if bank is None:
        embedding = model.without_memory(features.embedding)
    else:
        embedding = model.condition(features.embedding, _stack(bank))
    return model.segment(
        embedding, features.high_res, coords, labels, mask_logits, multimask=multimask
    )


@functools.partial(jax.jit, static_argnames=STATIC)
def prompt_mask(
    params: Params,
    features: ImageFeatures,
    mask: Float[Array, "h w"],
    *,
    config: Sam2Config,
    dtype: DTypeLike,
) -> ObjectPrediction:
    """One object on a frame where its mask (0 or 1, at the model frame's size) is given."""
    return bind(config, params, dtype=dtype).segment_mask(features, mask[None])


@functools.partial(jax.jit, static_argnames=STATIC)
def remember(
    params: Params,
    features: ImageFeatures,
    low_res_logits: Float[Array, "h4 w4"],
    object_score_logits: Float[Array, ""],
    *,
    config: Sam2Config,
    dtype: DTypeLike,
) -> Num[Array, "gh gw m"]:
    """The memory, bfloat16, of a frame with prompts for one object."""
    model = bind(config, params, dtype=dtype)
    memory = model.encode_memory(
        features.embedding, low_res_logits[None], object_score_logits[None], jnp.ones(1, bool)
    )
    return memory[0].astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames=STATIC)
def track(
    params: Params,
    features: ImageFeatures,
    bank: dict[str, Any],
    *,
    config: Sam2Config,
    dtype: DTypeLike,
) -> list[tuple[Array, Array, Array, Array]]:
    """All objects on a frame without prompts; `bank` as from `bank_of`.

    Returns for each object its low-res logits, object score, pointer and memory (bfloat16).
    """
    model = bind(config, params, dtype=dtype)
    prediction, memory = model.track(features, _stack(bank))
    memory = memory.astype(jnp.bfloat16)
    logits, score = prediction.low_res_logits, prediction.object_score_logits
    pointer = prediction.pointer.astype(jnp.float32)
    return [(logits[i], score[i], pointer[i], memory[i]) for i in range(len(memory))]


def bank_of(
    config: Sam2Config,
    tracks: Sequence[ObjectTrack],
    frame: int,
    num_frames: int,
    *,
    reverse: bool,
    most: int,
) -> dict[str, Any]:
    """What each object remembers on a frame, as a tree of arrays, which a compiled step stacks.

    `most` is the number of conditioning frames to attend to, or -1 for all; their slots are a power
    of two, so that a new one seldom means a new program.
    """
    count = max(len(track.conditioning) for track in tracks)
    count = count if most < 0 else min(count, most)
    slots = [
        fill_slots(
            config,
            track,
            frame,
            num_frames=num_frames,
            reverse=reverse,
            conditioning_slots=1 << (count - 1).bit_length(),
            most_conditioning=most,
        )
        for track in tracks
    ]
    return _gather(config, slots, num_frames)


def _gather(config: Sam2Config, slots: Sequence[Slots], num_frames: int) -> dict[str, Any]:
    nothing, nowhere = _empty(config)

    def present(records: list[Record | None]) -> list[bool]:
        return [record is not None for record in records]

    return {
        "features": [[nothing if r is None else r.memory for r in s.memories] for s in slots],
        "ages": np.array([s.ages for s in slots], np.int32),
        "valid": np.array([present(s.memories) for s in slots]),
        "pointers": [[nowhere if r is None else r.pointer for r in s.pointers] for s in slots],
        "pointer_times": np.array([s.times for s in slots], np.int32),
        "pointer_valid": np.array([present(s.pointers) for s in slots]),
        "pointer_span": np.float32(max(min(num_frames, config.num_pointers) - 1, 1)),
    }


@functools.lru_cache(maxsize=4)
def _empty(config: Sam2Config) -> tuple[Array, Array]:
    """A memory and a pointer for slots without; on the device, as the others are."""
    memory = jnp.zeros((*config.image_encoder.grid, config.memory_width), jnp.bfloat16)
    return memory, jnp.zeros(config.image_encoder.out_channels, jnp.float32)


def _stack(bank: dict[str, Any]) -> MemoryBank:
    stacked = {
        name: jnp.stack([jnp.stack(records) for records in bank[name]])
        for name in ("features", "pointers")
    }
    return MemoryBank(**{**bank, **stacked})


@functools.partial(jax.jit, static_argnames=("size", "apart"))
def to_video_size(
    low_res_logits: Sequence[Float[Array, "h4 w4"]], *, size: tuple[int, int], apart: bool
) -> Float[Array, "n 1 h w"]:
    """Every object's logits at the video's size; `apart`: each pixel is left to one object."""
    logits = resize_bilinear(jnp.stack(list(low_res_logits)), size)
    if apart and len(logits) > 1:
        best = jnp.argmax(logits, axis=0)[None]
        own = best == jnp.arange(len(logits))[:, None, None]
        logits = jnp.where(own, logits, jnp.minimum(logits, -10.0))
    return logits[:, None]


@functools.partial(jax.jit, static_argnames="size")
def mask_to_frame(mask: Float[Array, "h w"], *, size: tuple[int, int]) -> Bool[Array, "H W"]:
    """A user's mask at the model frame's size, as upstream's `add_new_mask` resizes it."""
    return resize_antialiased(mask, size) >= 0.5
