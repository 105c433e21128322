"""What one object remembers of a clip, and the bank of fixed size that a step takes from it.

Upstream: facebookresearch/sam2@2b90b9f, `sam2_base.py: _prepare_memory_conditioned_features` and
`sam2_utils.py: select_closest_cond_frames`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from samjax.models.sam2_config import Sam2Config

Array = Any  # a NumPy or JAX array


@dataclass
class Record:
    """What the model made of one object on one frame.

    Attributes:
        low_res_logits: float32 (h4, w4), small holes filled.
        object_score_logits: float32 (), positive where the object is in the frame.
        pointer: float32 (c,).
        memory: bfloat16 (gh, gw, m); None until the prompts of the frame are final.
    """

    low_res_logits: Array
    object_score_logits: Array
    pointer: Array
    memory: Array | None = None


@dataclass
class ObjectTrack:
    """One object's prompts and results, by frame.

    Attributes:
        points: the coordinates (p, 2) in pixels of the frame, and labels (p,), of prompted frames.
        masks: the masks of frames that were prompted by one, bool at the frame's size.
        conditioning: results on frames that were prompted before they were tracked.
        tracked: results on all others.
        new_conditioning, new_tracked: results of prompts since the last propagation.
        direction: of the frames that a propagation has passed, whether it went backwards.
    """

    points: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    masks: dict[int, np.ndarray] = field(default_factory=dict)
    conditioning: dict[int, Record] = field(default_factory=dict)
    tracked: dict[int, Record] = field(default_factory=dict)
    new_conditioning: dict[int, Record] = field(default_factory=dict)
    new_tracked: dict[int, Record] = field(default_factory=dict)
    direction: dict[int, bool] = field(default_factory=dict)

    def latest(self, frame: int, *, conditioning: bool) -> Record | None:
        """The result on a frame: of the newest prompts of this kind, else what was there before."""
        new = self.new_conditioning if conditioning else self.new_tracked
        for records in (new, self.conditioning, self.tracked):
            if frame in records:
                return records[frame]
        return None


class Slots(NamedTuple):
    """The memory bank of one object, before its records are stacked; empty slots are None.

    memories, pointers: records; ages, times: see `samjax.models.sam2.MemoryBank`.
    """

    memories: list[Record | None]
    ages: list[int]
    pointers: list[Record | None]
    times: list[int]


def select_conditioning(frames: list[int], frame: int, most: int) -> list[int]:
    """The conditioning frames that a frame attends to: all, or with `most` > 0 the closest.

    Of those the nearest before, the nearest at or after, then whatever is nearest.
    """
    if most < 0 or len(frames) <= most:
        return frames
    before = max((t for t in frames if t < frame), default=None)
    after = min((t for t in frames if t >= frame), default=None)
    chosen = [t for t in (before, after) if t is not None]
    others = sorted((t for t in frames if t not in chosen), key=lambda t: abs(t - frame))
    return chosen + others[: most - len(chosen)]


def fill_slots(
    config: Sam2Config,
    track: ObjectTrack,
    frame: int,
    *,
    num_frames: int,
    reverse: bool,
    conditioning_slots: int,
    most_conditioning: int = -1,
) -> Slots:
    """The memories and pointers that an object's frame attends to.

    The conditioning frames, the spatial memories of the last frames tracked, and the pointers of
    more of them; "last" is the future when tracking in `reverse`.
    """
    conditioning = track.conditioning
    selected = select_conditioning(list(conditioning), frame, most_conditioning)
    # A conditioning frame that was not selected counts as a tracked one.
    others: Mapping[int, Record] = {
        **{t: record for t, record in conditioning.items() if t not in selected},
        **track.tracked,
    }
    step = 1 if reverse else -1
    memories = [(config.num_memories, conditioning[t]) for t in selected]
    for age in range(1, config.num_memories):
        if (record := others.get(frame + age * step)) is not None:
            memories.append((age, record))
    past = [t for t in selected if (t >= frame if reverse else t <= frame)]
    pointers = [(abs(frame - t), conditioning[t]) for t in past]
    for distance in range(1, min(num_frames, config.num_pointers)):
        if (record := others.get(frame + distance * step)) is not None:
            pointers.append((distance, record))
    empty_memories = conditioning_slots + config.num_memories - 1 - len(memories)
    empty_pointers = conditioning_slots + config.num_pointers - 1 - len(pointers)
    return Slots(
        memories=[record for _, record in memories] + [None] * empty_memories,
        ages=[age for age, _ in memories] + [1] * empty_memories,
        pointers=[record for _, record in pointers] + [None] * empty_pointers,
        times=[distance for distance, _ in pointers] + [0] * empty_pointers,
    )
