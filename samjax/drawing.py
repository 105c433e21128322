"""Masks on pictures, as a person wants to see them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

Colour = tuple[int, int, int]
# Bright, unlike tissue and each other, and distinct to colour-blind readers too.
COLOURS: tuple[Colour, ...] = (
    (0, 229, 255),
    (255, 64, 220),
    (255, 235, 0),
    (60, 255, 90),
    (255, 140, 0),
    (120, 140, 255),
    (255, 255, 255),
    (255, 70, 70),
)


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    colours: Sequence[Colour] = COLOURS,
    fill: float = 0.25,
) -> np.ndarray:
    """An image with the regions of a label map tinted and outlined.

    Args:
        image: uint8 (h, w, 3) or (h, w).
        mask: integer or bool (h, w); 0 is background, class i gets colours[i - 1], in turn.
        colours: RGB, 0..255.
        fill: opacity of the tint, 0..1; the outline is opaque, inside the region, and about one
            300th of the longer side wide.

    Returns:
        uint8 (h, w, 3); the arguments stay as they are.

    Raises:
        ValueError: an image or mask of another kind, or of different sizes.
    """
    image = as_rgb(image, "image")
    mask = as_labels(mask, "mask", image.shape[:2])
    result = image.astype(np.float32)
    width = max(1, round(max(mask.shape) / 300))
    for label in np.unique(mask[mask != 0]):
        region = mask == label
        colour = np.array(colours[(label - 1) % len(colours)], np.float32)
        inner = ndimage.binary_erosion(region, iterations=width, border_value=1)
        result[region] += fill * (colour - result[region])
        result[np.logical_xor(region, inner)] = colour
    return np.clip(result + 0.5, 0, 255).astype(np.uint8)


def as_rgb(image: np.ndarray, name: str) -> np.ndarray:
    """The image as uint8 (h, w, 3), checked."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(
            f"{name} is {image.dtype} {image.shape}, expected uint8 (h, w, 3) or (h, w)"
        )
    return image if image.ndim == 3 else np.stack([image] * 3, axis=-1)


def as_labels(mask: np.ndarray, name: str, size: tuple[int, ...]) -> np.ndarray:
    """The label map as int32, checked."""
    mask = np.asarray(mask)
    if mask.dtype != bool and not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f"{name} is {mask.dtype}, expected integer labels or bool")
    if mask.shape != size:
        raise ValueError(f"{name} has shape {mask.shape}, the image {size}")
    return mask.astype(np.int32)
