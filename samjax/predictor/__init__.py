"""Image prediction: masks for points, boxes and masks given in pixels of the user's image.

`SamPredictor` is used as upstream's; `python -m samjax.predictor` writes masks from a shell.
"""

from samjax.predictor.sam import SamModel, SamPredictor

__all__ = ["SamModel", "SamPredictor"]
