"""A user's prompts, checked and brought into batches of a fixed shape.

Upstream's predictor passes on whatever it gets; a point far outside the image, a label 7 or
swapped corners then give a mask of something else. Here each is an error that names it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from samjax.prompt_labels import BACKGROUND, FOREGROUND, INVALID, NOT_A_POINT

TOLERANCE = 1.0  # pixels that a prompt may lie beyond the image's edge: detectors' boxes do
SLOTS = (4, 16, 64)  # numbers of prompt tokens that are compiled for; above, multiples of the last
PROMPTS = (16, 4, 1)  # numbers of prompts decoded in one call, each compiled for once


class Prompts(NamedTuple):
    """One prompt per row; at least one of the first three is given, or `count` is 1."""

    points: np.ndarray | None  # float64 (b, p, 2), (x, y) in pixels
    labels: np.ndarray | None  # int32 (b, p)
    boxes: np.ndarray | None  # float64 (b, 4), XYXY in pixels
    mask_logits: np.ndarray | None  # float32 (b, h4, w4, 1)
    count: int  # b


def check_prompts(
    point_coords: ArrayLike | None,
    point_labels: ArrayLike | None,
    box: ArrayLike | None,
    mask_input: ArrayLike | None,
    *,
    image_size: tuple[int, int],
    low_res_size: tuple[int, int],
) -> Prompts:
    """Checks prompts and gives each its batch axis.

    Args:
        point_coords: (p, 2) or (b, p, 2), (x, y) in pixels.
        point_labels: (p,) or (b, p): 1 foreground, 0 background, -1 upstream's padding point.
        box: (4,) or (b, 4), XYXY in pixels.
        mask_input: (1, h4, w4) or (b, 1, h4, w4) logits.
        image_size: (h, w) in pixels that points and boxes may span, up to `TOLERANCE` beyond.
        low_res_size: (h4, w4) of the mask.

    Raises:
        ValueError: wrong shapes, values that are not finite, points without labels or labels
            without points, unknown labels, a point or a box outside the image, a box whose
            second corner is not to the right of and below the first, unequal numbers of prompts.
    """
    if (point_coords is None) != (point_labels is None):
        given = "point_labels" if point_coords is None else "point_coords"
        raise ValueError(f"point_coords and point_labels go together, got {given} alone")
    points = labels = boxes = mask_logits = None
    if point_coords is not None and point_labels is not None:
        points = _numbers("point_coords", point_coords, ("p", 2))
        labels = _labels(point_labels, points)
        # A padding point has no place, whatever its coordinates.
        _check_inside(points, labels != NOT_A_POINT, image_size)
    if box is not None:
        boxes = _numbers("box", box, (4,))
        _check_boxes(boxes, image_size)
    if mask_input is not None:
        masks = _numbers("mask_input", mask_input, (1, *low_res_size))
        mask_logits = masks[:, 0, :, :, None].astype(np.float32)
    given = {"point_coords": points, "box": boxes, "mask_input": mask_logits}
    counts = {name: len(array) for name, array in given.items() if array is not None}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise ValueError(f"unequal numbers of prompts ({listed})")
    return Prompts(points, labels, boxes, mask_logits, max(counts.values(), default=1))


def pad_slots(coords: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Adds INVALID slots to coords (b, n, 2) and labels (b, n) up to the next of `SLOTS`."""
    slots = labels.shape[1]
    padded = next((size for size in SLOTS if size >= slots), -(-slots // SLOTS[-1]) * SLOTS[-1])
    extra = ((0, 0), (0, padded - slots))
    return np.pad(coords, (*extra, (0, 0))), np.pad(labels, extra, constant_values=INVALID)


def chunks(count: int) -> list[slice]:
    """Cuts `count` prompts into pieces of the sizes `PROMPTS`, large ones first."""
    pieces, start = [], 0
    for size in PROMPTS:
        while count - start >= size:
            pieces.append(slice(start, start + size))
            start += size
    return pieces


def _numbers(name: str, value: ArrayLike, shape: tuple[int | str, ...]) -> np.ndarray:
    """`value` as float64 of `shape` behind a batch axis, which is added where it is missing."""
    single = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
    expected = f"expected numbers of shape ({single}) or (b, {single.rstrip(',')})"
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {expected}, got {value!r:.100}") from error
    if array.ndim == len(shape):
        array = array[None]
    fits = array.ndim == len(shape) + 1 and all(
        wanted in ("p", found) for wanted, found in zip(shape, array.shape[1:], strict=True)
    )
    if not fits or not array.size:
        raise ValueError(f"{name}: {expected}, got shape {np.shape(value)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: holds NaN or infinite values")
    return array


def _labels(point_labels: ArrayLike, points: np.ndarray) -> np.ndarray:
    labels = np.asarray(point_labels)
    labels = labels[None] if labels.ndim == 1 else labels
    if labels.shape != points.shape[:2]:
        raise ValueError(
            f"point_labels: expected one per point, {_shape(points.shape[:2])}, "
            f"got shape {np.shape(point_labels)}"
        )
    known = np.isin(labels, (FOREGROUND, BACKGROUND, NOT_A_POINT))
    if not known.all():
        raise ValueError(
            f"point_labels: {labels[~known].flat[0]!s} at point {_place(np.argwhere(~known)[0])}; "
            "expected 1 (foreground), 0 (background) or -1 (padding)"
        )
    return labels.astype(np.int32)


def _shape(shape: tuple[int, ...]) -> str:
    """A batch of one is written without its axis, as most users gave it."""
    return f"shape ({shape[1]},)" if shape[0] == 1 else f"shape {shape}"


def _place(index: np.ndarray) -> str:
    """Position of a point: its number, and that of its prompt where there are several."""
    return f"{index[1]}" if index[0] == 0 else f"{index[1]} of prompt {index[0]}"


def _check_inside(points: np.ndarray, counts: np.ndarray, size: tuple[int, int]) -> None:
    limits = np.array([size[1], size[0]]) + TOLERANCE
    outside = ((points < -TOLERANCE) | (points > limits)).any(axis=-1) & counts
    if outside.any():
        index = np.argwhere(outside)[0]
        x, y = points[tuple(index)]
        raise ValueError(
            f"point_coords: point {_place(index)} at (x, y) = ({x:g}, {y:g}) lies outside the "
            f"image, which is {size[1]} wide and {size[0]} high"
        )


def _check_boxes(boxes: np.ndarray, size: tuple[int, int]) -> None:
    for x0, y0, x1, y1 in boxes:
        text = f"box: [{x0:g}, {y0:g}, {x1:g}, {y1:g}]"
        if x1 <= x0 or y1 <= y0:
            raise ValueError(
                f"{text} is empty; expected x0, y0, x1, y1 with x0 < x1 and y0 < y1 "
                "(a box around one pixel is one pixel wide)"
            )
        limits = size[1] + TOLERANCE, size[0] + TOLERANCE
        if min(x0, y0) < -TOLERANCE or x1 > limits[0] or y1 > limits[1]:
            raise ValueError(
                f"{text} does not lie within the image, which is {size[1]} wide and "
                f"{size[0]} high; clip it first if it is meant so"
            )
