"""Image prediction: masks for points, boxes and masks given in pixels of the user's image.

`SamPredictor` (SAM) and `SAM2ImagePredictor` (SAM 2 and 2.1) are used as upstream's; `python -m
samjax.predictor` writes masks from a shell.
"""

from samjax.predictor.model import SamModel
from samjax.predictor.sam import SamPredictor
from samjax.predictor.sam2 import SAM2ImagePredictor

__all__ = ["SAM2ImagePredictor", "SamModel", "SamPredictor"]
