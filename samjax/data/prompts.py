"""Simulated user prompts, drawn from a ground-truth mask, in arrays of a fixed size.

Labels are those of `samjax.prompt_labels`; the padding point, which upstream's prompt encoder
appends to points without a box by itself, is among the slots.

Coordinates are (x, y) pixel indices in the model's frame; the half pixel to the centre is added
by the prompt encoder, as upstream does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from samjax.data.regions import as_region, draw_points, erode_once
from samjax.prompt_labels import (
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    INVALID,
    NOT_A_POINT,
    TOP_LEFT,
)

MODES = ("none", "points", "box", "points+box")
BOX_RULES = {"sides": 0.1, "sam2lora": 0.02}
"""How a box is moved off its object, each with the jitter that it has by default."""


def num_slots(modes: str | Sequence[str], num_points: int = 1, num_negatives: int = 0) -> int:
    """Number of prompt slots that every example needs when its mode is one of `modes`.

    0 for `none`; the points and upstream's pad point for `points`; 2 for `box`; the points and 2
    for `points+box`.

    Raises:
        ValueError: unknown mode, no mode, or negative counts.
    """
    if num_points < 1 or num_negatives < 0:
        raise ValueError(
            f"{num_points} foreground and {num_negatives} background points: expected at least "
            "1 and at least 0"
        )
    points = num_points + num_negatives
    slots = {"none": 0, "points": points + 1, "box": 2, "points+box": points + 2}
    return max(slots[mode] for mode in as_modes(modes))


def as_modes(modes: str | Sequence[str]) -> tuple[str, ...]:
    """The modes as a tuple, checked.

    Raises:
        ValueError: unknown mode or no mode.
    """
    names = (modes,) if isinstance(modes, str) else tuple(modes)
    unknown = [name for name in names if name not in MODES]
    if unknown or not names:
        raise ValueError(
            f"prompt modes {', '.join(unknown) or '(none given)'}: expected {', '.join(MODES)}"
        )
    return names


def as_jitter(box_jitter: float | None, box_rule: str) -> float:
    """The jitter of a box, or the rule's own for None, checked.

    Raises:
        ValueError: unknown rule, jitter outside [0, 0.5).
    """
    if box_rule not in BOX_RULES:
        raise ValueError(f"box_rule {box_rule!r}: expected one of {', '.join(BOX_RULES)}")
    jitter = BOX_RULES[box_rule] if box_jitter is None else box_jitter
    if not 0.0 <= jitter < 0.5:
        raise ValueError(f"box_jitter {jitter}: expected at least 0 and below 0.5")
    return jitter


def sample_prompt(
    mask: np.ndarray,
    mode: str | Sequence[str],
    rng: np.random.Generator,
    *,
    num_points: int = 1,
    num_negatives: int = 0,
    box_jitter: float | None = None,
    region: str = "foreground",
    box_rule: str = "sides",
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the prompt that a user could have given for a mask.

    `none`: no prompt. `points`: foreground points of a region, background pixels drawn evenly (with
    replacement), and the pad point that upstream appends when points come without a box.
    `box`: the tight box, its last row and column included, moved by jitter and clipped to the
    image. `points+box`: the points, then the box, and no pad point; this is SAM's order, and SAM 2,
    to which the order means nothing, adds its pad point itself. Of several modes, one is drawn.

    Two rules move a box. `sides` moves each side in or out. `sam2lora` is that of arXiv 2510.10288
    (``dataloader/datautils.py``: ``get_boxes``): the box of the mask eroded by 2x2 pixels, all four
    sides pushed out by one draw (clipped there one pixel further right and below than here).

    A mask without foreground gives one background point for `points` and `points+box` and no
    prompt for `box`; a mask without background gives no background points.

    Args:
        mask: bool (h, w), the object in the frame, without the padding.
        mode: of `MODES`, or several of them.
        rng: the only source of chance.
        num_points: foreground points.
        num_negatives: background points.
        box_jitter: largest move of a side, as a fraction (below 0.5) of the box's width or height,
            or for `sam2lora` of the mask's longest side. By default the rule's own of `BOX_RULES`.
        region: where the foreground points lie, see `regions.draw_points`.
        box_rule: of `BOX_RULES`.

    Returns:
        coords float32 (n, 2), (x, y) in pixels, zero where there is no point, and labels int32
        (n,), with n = `num_slots(mode, num_points, num_negatives)`.

    Raises:
        ValueError: unknown mode, region or rule, negative counts, jitter outside [0, 0.5).
    """
    box_jitter, region = as_jitter(box_jitter, box_rule), as_region(region)
    modes = as_modes(mode)
    slots = num_slots(modes, num_points, num_negatives)
    coords = np.zeros((slots, 2), np.float32)
    labels = np.full(slots, INVALID, np.int32)

    chosen = modes[int(rng.integers(len(modes)))]
    boxed = mask.any() and chosen in ("box", "points+box")
    count = 0
    if chosen in ("points", "points+box"):
        inside = draw_points(mask, num_points, rng, region)
        outside = draw_points(~mask, num_negatives if len(inside) else 1, rng)
        count = len(inside) + len(outside)
        coords[:count] = np.concatenate([inside, outside])
        labels[: len(inside)] = FOREGROUND
        labels[len(inside) : count] = BACKGROUND
        if not boxed:  # its coordinates are the zeros that are there already
            labels[count] = NOT_A_POINT
    if boxed:
        box = _jittered_box if box_rule == "sides" else _pushed_box
        coords[count : count + 2] = box(mask, box_jitter, rng)
        labels[count : count + 2] = TOP_LEFT, BOTTOM_RIGHT
    return coords, labels


def _tight_box(mask: np.ndarray) -> np.ndarray:
    """Corners float64 (2, 2), (x, y) of the top left and the bottom right pixel."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return np.array([[columns[0], rows[0]], [columns[-1], rows[-1]]], np.float64)


def _clip(corners: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.clip(corners, 0.0, [mask.shape[1] - 1.0, mask.shape[0] - 1.0])


def _jittered_box(mask: np.ndarray, jitter: float, rng: np.random.Generator) -> np.ndarray:
    corners = _tight_box(mask)
    extent = corners[1] - corners[0] + 1.0
    corners += rng.uniform(-jitter, jitter, (2, 2)) * extent
    # Less than half a side each way cannot cross, but a box of one pixel has no side to spare.
    corners[1] = np.maximum(corners[0], corners[1])
    return _clip(corners, mask)


def _pushed_box(mask: np.ndarray, jitter: float, rng: np.random.Generator) -> np.ndarray:
    push = rng.uniform(0.0, jitter * max(mask.shape))
    return _clip(_tight_box(erode_once(mask)) + np.array([[-push], [push]]), mask)
