"""Tracking objects through clips and volumes with SAM 2.

`SAM2VideoPredictor` is used as upstream's; `track` runs a whole clip as one compiled program;
`python -m samjax.video` tracks from a shell.
"""

from samjax.video.clip import ClipPrompts, ClipResult, Prompt, clip_prompts, track
from samjax.video.predictor import SAM2VideoPredictor
from samjax.video.state import ClipState

__all__ = [
    "ClipPrompts",
    "ClipResult",
    "ClipState",
    "Prompt",
    "SAM2VideoPredictor",
    "clip_prompts",
    "track",
]
