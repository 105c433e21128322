"""Draws masks and the prompts that they answer onto an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

# One per prompt, in turn: unlike tissue and each other, distinct to colour-blind readers too.
COLOURS = ((0, 229, 255), (255, 64, 220), (255, 235, 0), (60, 255, 90), (255, 140, 0))
POINT_COLOURS = {1: (40, 200, 60), 0: (225, 40, 40)}  # foreground, background
OPACITY = 0.35  # of the tint inside a mask


class Drawing(NamedTuple):
    """One prompt and its mask.

    mask: bool (h, w); points: (x, y, label) in pixels, label 1 or 0; box: XYXY in pixels.
    """

    mask: np.ndarray
    points: Sequence[tuple[float, float, int]] = ()
    box: tuple[float, float, float, float] | None = None


def draw_overlay(image: np.ndarray, drawings: Sequence[Drawing]) -> np.ndarray:
    """Tints and outlines each mask in a colour of its own, and draws the prompts on top.

    Args:
        image: uint8 (h, w, 3) RGB.
        drawings: what to draw, masks of the image's size.

    Returns:
        uint8 (h, w, 3).
    """
    result = image.astype(np.float32)
    line = max(1, round(max(image.shape[:2]) / 400))
    for number, drawing in enumerate(drawings):
        colour = np.array(COLOURS[number % len(COLOURS)], np.float32)
        mask = drawing.mask
        result[mask] += OPACITY * (colour - result[mask])
        inside = np.asarray(ndimage.binary_erosion(mask, iterations=line, border_value=1), bool)
        result[mask & ~inside] = colour
    picture = Image.fromarray(np.clip(result + 0.5, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for number, drawing in enumerate(drawings):
        if drawing.box is not None:
            # Bright with dark edges: visible on any background, and told from a mask's outline.
            x0, y0, x1, y1 = drawing.box
            draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=(0, 0, 0), width=line + 2)
            draw.rectangle(drawing.box, outline=COLOURS[number % len(COLOURS)], width=line)
        for x, y, label in drawing.points:
            radius = 3 * line + 1
            corners = (x - radius, y - radius, x + radius, y + radius)
            draw.ellipse(corners, POINT_COLOURS[label], (255, 255, 255), line)
    return np.array(picture)
