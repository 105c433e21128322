"""The next click of a user who corrects a prediction, as SAM 2 simulates it.

Paper: arXiv 2408.00714, §4 "Training" (corrective clicks). Upstream:
facebookresearch/sam2@2b90b9f, ``sam2/modeling/sam2_utils.py`` (``get_next_point``). Upstream draws
uniformly when it trains and takes the centre when it evaluates.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from scipy import ndimage

from samjax.prompt_labels import BACKGROUND, FOREGROUND

Method = Literal["uniform", "center"]


def next_click(
    mask: np.ndarray,
    prediction: np.ndarray | None,
    rng: np.random.Generator,
    method: Method = "uniform",
) -> tuple[np.ndarray, int]:
    """A click where the prediction is wrong: foreground on what it misses, background elsewhere.

    `uniform`: any wrong pixel, each as likely as the other. `center`: the wrong pixel that lies
    deepest within the missed or within the surplus region, whichever is deeper (the surplus one of
    two that are equal); the first one in reading order, and without chance.

    Nothing wrong: `uniform` gives a background click on any pixel outside the mask. Where there is
    none either, and for `center`, upstream gives a background click on pixel (0, 0); so does this.

    Args:
        mask: bool (h, w), the truth.
        prediction: bool (h, w); None stands for an empty one.
        rng: the only source of chance.
        method: see above.

    Returns:
        float32 (2,), (x, y) of the pixel, and its label: 1 foreground, 0 background.

    Raises:
        ValueError: unknown method, or arrays that are not bool, not 2-D, empty or of two sizes.
    """
    if prediction is None:
        prediction = np.zeros_like(mask)
    if method not in get_args(Method):
        raise ValueError(f"method {method!r}: expected one of {', '.join(get_args(Method))}")
    if (
        not (mask.dtype == prediction.dtype == bool)
        or mask.shape != prediction.shape
        or mask.ndim != 2
        or not mask.size
    ):
        raise ValueError(
            f"mask {mask.dtype} {mask.shape} and prediction {prediction.dtype} "
            f"{prediction.shape}: expected two bool arrays (h, w) of one size"
        )
    missed, surplus = mask & ~prediction, prediction & ~mask
    if method == "uniform":
        place = _any_of(missed | surplus, ~mask, rng)
    else:
        depths = _depth(missed), _depth(surplus)
        deeper = depths[0] if depths[0].max() > depths[1].max() else depths[1]
        place = int(deeper.argmax())
    row, column = divmod(place, mask.shape[1])
    label = FOREGROUND if missed[row, column] else BACKGROUND
    return np.array([column, row], np.float32), label


def _any_of(wrong: np.ndarray, otherwise: np.ndarray, rng: np.random.Generator) -> int:
    candidates = np.flatnonzero(wrong)
    if not len(candidates):
        candidates = np.flatnonzero(otherwise)
    return int(candidates[rng.integers(len(candidates))]) if len(candidates) else 0


def _depth(region: np.ndarray) -> np.ndarray:
    """Distance of each pixel of the region to the nearest one outside, the picture's rim included.

    In float32 as OpenCV has it, so that what is equal there is equal here.
    """
    depth = np.asarray(ndimage.distance_transform_edt(np.pad(region, 1)), np.float32)
    return depth[1:-1, 1:-1]
