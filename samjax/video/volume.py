"""A volume tracked as a clip: from prompts on some slices, through all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from samjax.video.predictor import SAM2VideoPredictor

Prompts = Mapping[tuple[int, int], Mapping[str, Any]]
"""{(frame, object from 1): keyword arguments of `add_new_points_or_box`, or {"mask": …}}"""


def label_frames(
    predictor: SAM2VideoPredictor,
    frames: Any,
    prompts: Prompts,
    progress: bool = False,
) -> np.ndarray:
    """Tracks objects from their prompts to both ends of a clip.

    Args:
        predictor: of a SAM 2 model.
        frames: what `init_state` takes, such as the slices of a volume, uint8 (t, h, w, 3).
        prompts: by frame and object; object 1 becomes label 1.
        progress: show a bar.

    Returns:
        uint8 (t, h, w): 0 background, else the object with the highest logit above 0.

    Raises:
        ValueError: no prompts, more than 255 objects, or a prompt that makes no sense.
    """
    objects = sorted({obj for _, obj in prompts})
    if not objects or objects[0] < 1 or objects[-1] > 255:
        raise ValueError(f"objects {objects}: expected at least one, numbered from 1 to 255")
    state = predictor.init_state(frames)
    for (frame, obj), prompt in sorted(prompts.items()):
        if "mask" in prompt:
            predictor.add_new_mask(state, frame, obj, prompt["mask"])
        else:
            predictor.add_new_points_or_box(state, frame, obj, **prompt)
    labels = np.zeros((state.num_frames, state.video_height, state.video_width), np.uint8)
    first = min(frame for frame, _ in prompts)
    with tqdm(total=state.num_frames, unit="frame", disable=not progress) as bar:
        for reverse in (False, True):
            for frame, ids, logits in predictor.propagate_in_video(state, first, reverse=reverse):
                if reverse and frame == first:
                    continue  # the forward pass has shown it
                labels[frame] = merge_objects(logits[:, 0], ids)
                bar.update()
    return labels


def merge_objects(logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """uint8 (h, w): the id of the object with the highest logit (n, h, w) above 0, else 0."""
    best = logits.argmax(axis=0)
    values = np.array(ids, np.uint8)[best]
    return np.where(logits.max(axis=0) > 0, values, 0).astype(np.uint8)
