"""The state of a clip that is being tracked, and the checks of what a user asks of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from samjax.models.prompt_encoder import merge_prompts
from samjax.models.sam2 import ImageFeatures
from samjax.models.sam2_config import Sam2Config
from samjax.predictor.prompts import check_prompts
from samjax.video.frames import Frames
from samjax.video.memory import ObjectTrack


@dataclass
class ClipState:
    """A clip and what is known of its objects: upstream's `inference_state`.

    Attributes:
        frames: the clip, decoded frame by frame.
        num_frames, video_height, video_width: its length and its size in pixels.
        tracks: each object's prompts and results, by its id, in the order of their first prompts.
        offload: whether results are kept in the host's memory.
    """

    frames: Frames
    num_frames: int
    video_height: int
    video_width: int
    offload: bool = False
    tracks: dict[Any, ObjectTrack] = field(default_factory=dict)
    features: dict[int, ImageFeatures] = field(default_factory=dict)

    @property
    def obj_ids(self) -> list[Any]:
        """The objects, in the order of the masks."""
        return list(self.tracks)


def check_frame(state: ClipState, frame: int) -> int:
    """The frame's number, which has to be one of the clip's; else a `ValueError`."""
    if not isinstance(frame, int | np.integer) or not 0 <= frame < state.num_frames:
        raise ValueError(
            f"frame {frame!r}: expected one of the clip's {state.num_frames} frames, "
            f"0 to {state.num_frames - 1}"
        )
    return int(frame)


def check_points(
    state: ClipState, config: Sam2Config, points: Any, labels: Any, box: Any, *, normalize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates float32 (p, 2) in pixels of the model frame and labels (p,), a box's first.

    Raises:
        ValueError: no prompt, several, or one that makes no sense.
    """
    if points is None and labels is None and box is None:
        raise ValueError("no prompt: give points with labels, or a box")
    size = state.video_height, state.video_width
    extent = np.array([size[1], size[0]], np.float64)
    if not normalize:
        points = None if points is None else np.asarray(points, np.float64) * extent
        box = None if box is None else np.asarray(box, np.float64) * np.tile(extent, 2)
    prompts = check_prompts(
        points, labels, box, None, image_size=size, low_res_size=config.low_res_size
    )
    if prompts.count != 1:
        raise ValueError(f"{prompts.count} prompts for one object: expected one")
    coords, kinds = merge_prompts(prompts.points, prompts.labels, prompts.boxes, box_first=True)
    frame = np.array(config.image_size[::-1], np.float64)
    return (coords[0, :-1] / extent * frame).astype(np.float32), kinds[0, :-1]
