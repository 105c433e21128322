"""Small holes and specks of a mask, found as connected components.

Upstream: facebookresearch/sam2@2b90b9f, `sam2/utils/transforms.py: postprocess_masks` and
`sam2/utils/misc.py: fill_holes_in_mask_scores`, whose CUDA kernel this replaces.

Differs from upstream: it runs on every machine; upstream skips it, with a warning, without CUDA.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

FULL = np.ones((3, 3), bool)  # pixels that touch at a corner are connected


def small_components(mask: np.ndarray, max_area: float) -> np.ndarray:
    """The pixels of a mask, bool (h, w), in 8-connected components of at most `max_area` pixels."""
    labels = np.empty(mask.shape, np.int32)
    ndimage.label(mask, structure=FULL, output=labels)
    areas = np.bincount(labels.ravel())
    small = areas <= max_area
    small[0] = False  # the background
    return small[labels]


def clean(
    logits: np.ndarray,
    *,
    threshold: float = 0.0,
    max_hole_area: float = 0.0,
    max_sprinkle_area: float = 0.0,
    margin: float = 10.0,
) -> np.ndarray:
    """Fills small holes, then removes small specks.

    Args:
        logits: float32 (…, h, w), a mask each.
        threshold: what a logit has to exceed to be part of the mask.
        max_hole_area: pixels of a hole that is filled, at most; 0 fills none.
        max_sprinkle_area: pixels of a speck that is removed, at most; 0 removes none.
        margin: changed pixels get the threshold plus or minus this.

    Returns:
        A copy, of the same shape.
    """
    cleaned = np.array(logits, np.float32)
    for mask in cleaned.reshape(-1, *cleaned.shape[-2:]):  # views
        if max_hole_area > 0:
            mask[small_components(mask <= threshold, max_hole_area)] = threshold + margin
        if max_sprinkle_area > 0:
            mask[small_components(mask > threshold, max_sprinkle_area)] = threshold - margin
    return cleaned
