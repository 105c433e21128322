"""A whole clip as one compiled program: `track`, a scan over its frames.

For clips whose prompts are all known beforehand: evaluation, volumes, many clips at once by
`jax.vmap`. The results are `SAM2VideoPredictor.propagate_in_video`'s, started from a fresh state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num
from numpy.typing import ArrayLike

from samjax.models.functional import bind
from samjax.models.prompt_encoder import merge_prompts
from samjax.models.sam2 import NO_OBJECT_LOGIT, ImageFeatures, MemoryBank, ObjectPrediction
from samjax.models.sam2_config import Sam2Config
from samjax.predictor.prompts import check_prompts, pad_slots
from samjax.prompt_labels import BACKGROUND, INVALID
from samjax.trees import Params


class ClipPrompts(NamedTuple):
    """The prompts of `n` objects, on up to `k` frames each, with up to `p` points a frame.

    frames: -1 where an object has fewer; coords: (x, y) in pixels of the model frame; labels: of
    `samjax.prompt_labels`, a box as its corners, upstream's padding point among them.
    """

    frames: Int[Array, "n k"]
    coords: Float[Array, "n k p 2"]
    labels: Int[Array, "n k p"]


class ClipResult(NamedTuple):
    """low_res_logits: a quarter of the model frame's size, -1024 where the object is not there or
    the frame was not tracked; object_score_logits: positive where it is there."""

    low_res_logits: Float[Array, "t n h4 w4"]
    object_score_logits: Float[Array, "t n"]


@dataclass(frozen=True)
class Prompt:
    """One object's prompt on one frame, in pixels of the clip.

    Attributes:
        obj: the object's number, from 0 without gaps.
        frame: the frame.
        points: (p, 2), (x, y); labels: (p,), 1 foreground and 0 background.
        box: (4,) XYXY.
    """

    obj: int
    frame: int
    points: ArrayLike | None = None
    labels: ArrayLike | None = None
    box: ArrayLike | None = None


def clip_prompts(
    config: Sam2Config, prompts: Sequence[Prompt], size: tuple[int, int], num_frames: int
) -> ClipPrompts:
    """Prompts as `track` takes them; `size` is the clip's (h, w) in pixels.

    Raises:
        ValueError: no prompts, objects without one, two for an object on one frame, a frame that
            the clip does not have, or a prompt that makes no sense.
    """
    by_object: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    scale = np.array(config.image_size[::-1], np.float64) / np.array(size[::-1])
    for prompt in prompts:
        name = f"prompt of object {prompt.obj} on frame {prompt.frame}"
        if not 0 <= prompt.frame < num_frames:
            raise ValueError(f"{name}: expected one of the frames 0 to {num_frames - 1}")
        if prompt.frame in by_object.setdefault(prompt.obj, {}):
            raise ValueError(f"{name}: there is one already; put all its points into one")
        if prompt.points is None and prompt.box is None:
            raise ValueError(f"{name}: give points with labels, or a box")
        try:
            checked = check_prompts(
                prompt.points,
                prompt.labels,
                prompt.box,
                None,
                image_size=size,
                low_res_size=config.low_res_size,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        coords, labels = merge_prompts(
            checked.points, checked.labels, checked.boxes, box_first=True
        )
        by_object[prompt.obj][prompt.frame] = (coords * scale).astype(np.float32), labels
    if sorted(by_object) != list(range(len(by_object))) or not by_object:
        raise ValueError(f"objects {sorted(by_object)}: expected 0, 1, … without gaps")
    most = max(len(own) for own in by_object.values())
    slots = max(labels.shape[1] for own in by_object.values() for _, labels in own.values())
    frames = np.full((len(by_object), most), -1, np.int32)
    all_coords = np.zeros((len(by_object), most, slots, 2), np.float32)
    all_labels = np.full((len(by_object), most, slots), INVALID, np.int32)
    for obj, own in by_object.items():
        for i, (frame, (coords, labels)) in enumerate(own.items()):
            frames[obj, i] = frame
            all_coords[obj, i, : labels.shape[1]] = coords[0]
            all_labels[obj, i, : labels.shape[1]] = labels[0]
    flat = pad_slots(all_coords.reshape(-1, slots, 2), all_labels.reshape(-1, slots))
    shape = frames.shape
    coords, labels = (jnp.asarray(array.reshape(*shape, *array.shape[1:])) for array in flat)
    return ClipPrompts(jnp.asarray(frames), coords, labels)


class _Past(NamedTuple):
    """The last frames, the most recent first; a conditioning frame leaves an empty slot."""

    features: Num[Array, "n s gh gw m"]
    valid: Bool[Array, "n s"]
    pointers: Float[Array, "n p c"]
    pointer_valid: Bool[Array, "n p"]


def track(
    config: Sam2Config,
    params: Params,
    frames: Num[Array, "t h w 3"],
    prompts: ClipPrompts,
    *,
    reverse: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> ClipResult:
    """Tracks all objects through a clip, from its first prompted frame to its end.

    A pure function, to be compiled with `jax.jit` (config, reverse and dtype are static) and
    mapped over several clips with `jax.vmap` (of frames and prompts).

    Args:
        config, params: a SAM 2 model.
        frames: RGB of 0..255 at the size of the model frame (`samjax.frame.stretch_video`).
        prompts: as from `clip_prompts`.
        reverse: from the last prompted frame to the beginning.
        dtype: of the computation, float32 or bfloat16.
    """
    model = bind(config, params, dtype=dtype)
    count = frames.shape[0]
    conditioning, kept = _condition_on_prompts(model, frames, prompts)
    given = prompts.frames >= 0
    n, k = given.shape
    first = jnp.where(given, prompts.frames, count).min()
    last = jnp.where(given, prompts.frames, -1).max()
    width, (gh, gw) = config.image_encoder.out_channels, config.image_encoder.grid
    memories, pointers = config.num_memories - 1, config.num_pointers - 1
    past = _Past(
        jnp.zeros((n, memories, gh, gw, config.memory_width), jnp.bfloat16),
        jnp.zeros((n, memories), bool),
        jnp.zeros((n, pointers, width)),
        jnp.zeros((n, pointers), bool),
    )
    ages = jnp.concatenate([jnp.full(k, config.num_memories), jnp.arange(1, memories + 1)])
    span = jnp.float32(max(min(count, config.num_pointers) - 1, 1))

    def step(past: _Past, frame: Array) -> tuple[_Past, tuple[Array, Array]]:
        features = model.encode_image(frames[frame][None])
        times = (prompts.frames - frame) if reverse else (frame - prompts.frames)
        seen = given & (times >= 0)
        distances = jnp.broadcast_to(jnp.arange(1, pointers + 1), (n, pointers))
        # Upstream looks at as many pointers as the clip has frames, at most.
        near = distances < min(count, config.num_pointers)
        bank = MemoryBank(
            features=jnp.concatenate([kept, past.features], axis=1),
            ages=jnp.broadcast_to(ages, (n, k + memories)),
            valid=jnp.concatenate([given, past.valid], axis=1),
            pointers=jnp.concatenate([conditioning.pointer, past.pointers], axis=1),
            pointer_times=jnp.concatenate([jnp.where(seen, times, 0), distances], axis=1),
            pointer_valid=jnp.concatenate([seen, past.pointer_valid & near], axis=1),
            pointer_span=span,
        )
        prediction, memory = model.track(features, bank)
        started = (frame <= last) if reverse else (frame >= first)
        here = given & (prompts.frames == frame)  # n k
        is_conditioning = here.any(axis=1)

        def choose(own: Array, tracked: Array) -> Array:
            """The result of the frame's own prompt, where there is one."""
            picked = jnp.where(_like(here, own), own, 0).sum(axis=1)
            return jnp.where(_like(is_conditioning, tracked), picked, tracked)

        logits = choose(conditioning.low_res_logits, prediction.low_res_logits)
        score = choose(conditioning.object_score_logits, prediction.object_score_logits)
        logits = jnp.where(started, logits, NO_OBJECT_LOGIT)
        score = jnp.where(started, score, NO_OBJECT_LOGIT)
        new = jnp.broadcast_to(started, (n,)) & ~is_conditioning
        past = _Past(
            _push(past.features, memory.astype(jnp.bfloat16)),
            _push(past.valid, new),
            _push(past.pointers, prediction.pointer.astype(jnp.float32)),
            _push(past.pointer_valid, new),
        )
        return past, (logits, score)

    _, (logits, scores) = jax.lax.scan(step, past, jnp.arange(count), reverse=reverse)
    return ClipResult(logits, scores)


def _condition_on_prompts(
    model: Any, frames: Array, prompts: ClipPrompts
) -> tuple[ObjectPrediction, Num[Array, "n k gh gw m"]]:
    """Results (n, k, …) and memories of the prompted frames, each by itself."""
    n, k = prompts.frames.shape

    def one(prompt: tuple[Array, Array, Array]) -> tuple[ObjectPrediction, Array]:
        frame, coords, labels = prompt
        features: ImageFeatures = model.encode_image(frames[jnp.maximum(frame, 0)][None])
        points = (labels >= BACKGROUND).sum()
        prediction = model.segment(
            model.without_memory(features.embedding),
            features.high_res,
            coords[None],
            labels[None],
            multimask=(points <= 1)[None],
        )
        memory = model.encode_memory(
            features.embedding,
            prediction.low_res_logits,
            prediction.object_score_logits,
            jnp.ones(1, bool),
        )
        pointer = prediction.pointer.astype(jnp.float32)
        prediction = prediction._replace(pointer=pointer)
        return jax.tree.map(lambda x: x[0], (prediction, memory.astype(jnp.bfloat16)))

    flat = jax.tree.map(lambda x: jnp.asarray(x).reshape(n * k, *x.shape[2:]), tuple(prompts))
    results = jax.lax.map(one, flat)
    return jax.tree.map(lambda x: x.reshape(n, k, *x.shape[1:]), results)


def _push(slots: Array, new: Array) -> Array:
    return jnp.concatenate([new[:, None], slots[:, :-1]], axis=1)


def _like(mask: Array, array: Array) -> Array:
    """The mask with as many axes as the array."""
    return mask.reshape(*mask.shape, *[1] * (array.ndim - mask.ndim))
