"""Simulated user prompts, drawn from a ground-truth mask, in arrays of a fixed size.

Labels are those of `samjax.prompt_labels`; the padding point, which upstream's prompt encoder
appends to points without a box by itself, is among the slots.

Coordinates are (x, y) pixel indices in the model's frame; the half pixel to the centre is added
by the prompt encoder, as upstream does.
"""

from collections.abc import Sequence

import numpy as np

from samjax.prompt_labels import (
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    INVALID,
    NOT_A_POINT,
    TOP_LEFT,
)

MODES = ("none", "points", "box")


def num_slots(modes: str | Sequence[str], num_points: int = 1, num_negatives: int = 0) -> int:
    """Number of prompt slots that every example needs when its mode is one of `modes`.

    0 for `none`; the points and upstream's pad point for `points`; 2 for `box`.

    Raises:
        ValueError: unknown mode, no mode, or negative counts.
    """
    if num_points < 1 or num_negatives < 0:
        raise ValueError(
            f"{num_points} foreground and {num_negatives} background points: expected at least "
            "1 and at least 0"
        )
    slots = {"none": 0, "points": num_points + num_negatives + 1, "box": 2}
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


def sample_prompt(
    mask: np.ndarray,
    mode: str | Sequence[str],
    rng: np.random.Generator,
    *,
    num_points: int = 1,
    num_negatives: int = 0,
    box_jitter: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the prompt that a user could have given for a mask.

    `none`: no prompt. `points`: foreground pixels drawn evenly (with replacement), background
    pixels likewise, and the pad point that upstream appends when points come without a box.
    `box`: the tight box, its last row and column included, each side moved by jitter and clipped
    to the image. Of several modes, one is drawn.

    A mask without foreground gives one background point for `points` and no prompt for `box`;
    a mask without background gives no background points.

    Args:
        mask: bool (h, w), the object in the frame, without the padding.
        mode: of `MODES`, or several of them.
        rng: the only source of chance.
        num_points: foreground points.
        num_negatives: background points.
        box_jitter: largest move of a side, as a fraction of the box's width or height, below 0.5.

    Returns:
        coords float32 (n, 2), (x, y) in pixels, zero where there is no point, and labels int32
        (n,), with n = `num_slots(mode, num_points, num_negatives)`.

    Raises:
        ValueError: unknown mode, negative counts, jitter outside [0, 0.5).
    """
    if not 0.0 <= box_jitter < 0.5:
        raise ValueError(f"box jitter {box_jitter}: expected at least 0 and below 0.5")
    modes = as_modes(mode)
    slots = num_slots(modes, num_points, num_negatives)
    coords = np.zeros((slots, 2), np.float32)
    labels = np.full(slots, INVALID, np.int32)

    chosen = modes[int(rng.integers(len(modes)))]
    if chosen == "points":
        inside = _draw_pixels(mask, num_points, rng)
        outside = _draw_pixels(~mask, num_negatives if len(inside) else 1, rng)
        # The zeros after the points are already the pad point's coordinates.
        points = np.concatenate([inside, outside])
        coords[: len(points)] = points
        labels[: len(inside)] = FOREGROUND
        labels[len(inside) : len(points)] = BACKGROUND
        labels[len(points)] = NOT_A_POINT
    elif chosen == "box" and mask.any():
        coords[:2] = _draw_box(mask, box_jitter, rng)
        labels[:2] = TOP_LEFT, BOTTOM_RIGHT
    return coords, labels


def _draw_pixels(mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 2) pixels (x, y) of the mask, drawn evenly; (0, 2) where it has none."""
    candidates = np.flatnonzero(mask)
    if not len(candidates):
        return np.zeros((0, 2), np.int64)
    rows, columns = np.divmod(candidates[rng.integers(len(candidates), size=count)], mask.shape[1])
    return np.stack([columns, rows], axis=-1)


def _draw_box(mask: np.ndarray, jitter: float, rng: np.random.Generator) -> np.ndarray:
    """Corners (2, 2), (x, y) of the top left and the bottom right pixel."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    corners = np.array([[columns[0], rows[0]], [columns[-1], rows[-1]]], np.float64)
    extent = corners[1] - corners[0] + 1.0
    corners += rng.uniform(-jitter, jitter, (2, 2)) * extent
    # Less than half a side each way cannot cross, but a box of one pixel has no side to spare.
    corners[1] = np.maximum(corners[0], corners[1])
    return np.clip(corners, 0.0, [mask.shape[1] - 1.0, mask.shape[0] - 1.0])
