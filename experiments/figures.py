"""Pictures for a person: overlays of masks on images, sheets of them, and training curves.

Drawn with matplotlib's Figure, not with pyplot: no global state, no display. Every file is written
atomically.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from samjax.atomic import atomic_write
from samjax.drawing import COLOURS, Colour, as_labels, as_rgb, overlay

_CELL, _SPACE, _GAP = 2.6, 0.06, 0.25  # inches: picture, between pictures, between cases
_CAPTION, _MARGIN = 0.32, 0.12  # inches: above each picture, around the sheet
_PIXELS = 480  # longest side of a picture on a sheet
_NAME_LENGTH = 34  # letters of a name that fit above a picture


class Case(NamedTuple):
    """One image of a sheet. Masks are label maps of the image's size; Dice in [0, 1], NaN where it
    is undefined, one number or one per class."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    dice: float | Sequence[float]
    before: np.ndarray | None = None  # prediction before the training
    before_dice: float | Sequence[float] | None = None


def overlay_sheet(
    path: str | Path,
    rows: Sequence[Case | tuple[Any, ...]],
    *,
    title: str = "",
    class_names: Sequence[str] = (),
    cases_per_row: int | None = None,
    colours: Sequence[Colour] = COLOURS,
) -> None:
    """Write a sheet: image, truth, (prediction before,) prediction of every case side by side.

    Args:
        path: the file to write; its suffix names the format (.png, .pdf, …).
        rows: cases, or tuples in the order of `Case`'s fields. The column "before" appears when
            any case has one.
        title: above everything.
        class_names: of the classes 1, 2, …: adds a legend.
        cases_per_row: how many cases stand side by side; by default what makes the sheet about
            as wide as high. A name or more than three Dice values that do not fit are shortened.
        colours: of the classes, see `overlay`.

    Raises:
        ValueError: no case, or an image or mask that does not fit (named).
    """
    cases = [row if isinstance(row, Case) else Case(*row) for row in rows]
    cases = [case._replace(image=as_rgb(case.image, f"{case.name}: image")) for case in cases]
    if not cases:
        raise ValueError("there is no case to draw")
    across = cases_per_row or (1 if len(cases) <= 8 else 2 if len(cases) <= 32 else 3)
    with_before = any(case.before is not None for case in cases)
    pictures = [_pictures(case, with_before, colours) for case in cases]

    # All lengths in inches; a line of cases is as high as its tallest picture.
    heights = [_CELL * case.image.shape[0] / case.image.shape[1] for case in cases]
    group_width = (4 if with_before else 3) * (_CELL + _SPACE)
    across = cases_per_row or _best_across(heights, group_width)
    lines = [max(heights[i : i + across]) for i in range(0, len(cases), across)]
    head = _MARGIN + (0.4 if title else 0.0) + (0.35 if class_names else 0.0)
    width = min(across, len(cases)) * (group_width + _GAP) - _GAP + 2 * _MARGIN
    height = head + sum(lines) + len(lines) * _CAPTION + _MARGIN
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    # One Axes with inches as its coordinates: hundreds of small ones take far longer to draw.
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set_axis_off()
    if title:
        sheet.text(width / 2, height - 0.28, title, ha="center", va="center", fontsize=13)
    if class_names:
        _legend(figure, class_names, colours, 1 - head / height)

    line_top = height - head
    for number, columns in enumerate(pictures):
        line, group = divmod(number, across)
        left = _MARGIN + group * (group_width + _GAP)
        top = line_top - _CAPTION
        for column, (caption, picture) in enumerate(columns):
            x = left + column * (_CELL + _SPACE)
            if picture is not None:
                extent = (x, x + _CELL, top - heights[number], top)
                sheet.imshow(picture, extent=extent, aspect="auto", interpolation="antialiased")
            center = x + _CELL / 2
            sheet.text(center, top + 0.04, caption, ha="center", fontsize=8.5, parse_math=False)
        if group == across - 1:
            line_top -= lines[line] + _CAPTION
    sheet.set(xlim=(0, width), ylim=(0, height))
    _save(figure, path)


def curve(
    path: str | Path,
    history: Sequence[Mapping[str, float]],
    *,
    loss: str = "loss",
    dice: str = "val_dice",
    title: str = "",
) -> None:
    """Write a plot of training loss and validation Dice by step.

    Args:
        path: the file to write; its suffix names the format.
        history: records with "step" and any of the keys `loss` and `dice`; others are ignored.
        loss, dice: the keys to draw.
        title: above the plot.

    Raises:
        ValueError: nothing to draw under either key, or a record without "step".
    """
    if any("step" not in record for record in history):
        raise ValueError('history has a record without "step"')
    series = {}
    for key in (loss, dice):
        points = [(record["step"], record[key]) for record in history if key in record]
        if points:
            series[key] = np.array(points, np.float64).T
    if not series:
        raise ValueError(f"history has neither {loss!r} nor {dice!r}: there is nothing to draw")

    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained", facecolor="white")
    left = figure.add_subplot()
    left.set_xlabel("step")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.grid(alpha=0.25)
    if title:
        left.set_title(title, fontsize=11)
    handles = []
    if loss in series:
        steps, values = series[loss]
        left.set_ylabel("training loss", color="tab:blue")
        left.tick_params(axis="y", labelcolor="tab:blue")
        smooth = _running_mean(values)
        if smooth is None:
            handles += left.plot(steps, values, color="tab:blue", label="training loss")
        else:
            left.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
            handles += left.plot(steps, smooth, color="tab:blue", label="training loss (smoothed)")
        low, high = min(0.0, np.nanmin(values)), np.nanmax(values)
        left.set_ylim(low, high + 0.05 * (high - low or 1))
    if dice in series:
        right = left.twinx() if loss in series else left
        handles += _draw_dice(right, *series[dice])
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    _save(figure, path)


def _draw_dice(axes: Axes, steps: np.ndarray, values: np.ndarray) -> list[Line2D]:
    axes.set_ylabel("validation Dice", color="tab:orange")
    axes.tick_params(axis="y", labelcolor="tab:orange")
    axes.set_ylim(0, 1.02)
    label = "validation Dice"
    if not np.isnan(values).all():
        best = int(np.nanargmax(values))
        label += f" (best {values[best]:.3f} at step {steps[best]:g})"
        axes.plot(
            steps[best], values[best], "o", color="tab:orange", markersize=9, fillstyle="none"
        )
    return axes.plot(steps, values, "o-", color="tab:orange", markersize=4, label=label)


def _running_mean(values: np.ndarray) -> np.ndarray | None:
    """Centred mean over a 20th of a long series, less at its ends; None for a short series."""
    reach = values.size // 40
    if reach < 1:
        return None
    window = np.ones(2 * reach + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _best_across(heights: Sequence[float], group_width: float) -> int:
    """The number of cases side by side that comes closest to a square sheet."""
    total = sum(heights) + len(heights) * _CAPTION
    return max(1, min(len(heights), round(math.sqrt(total / (group_width + _GAP)))))


def _pictures(
    case: Case, with_before: bool, colours: Sequence[Colour]
) -> list[tuple[str, np.ndarray | None]]:
    """Caption and picture of each column of a case."""
    image = case.image
    small = max(1, max(image.shape[:2]) / _PIXELS)
    size = max(1, round(image.shape[1] / small)), max(1, round(image.shape[0] / small))

    def shrunk(array: np.ndarray, how: Image.Resampling) -> np.ndarray:
        return array if small == 1 else np.asarray(Image.fromarray(array).resize(size, how))

    def drawn(kind: str, mask: np.ndarray) -> np.ndarray:
        mask = as_labels(mask, f"{case.name}: {kind}", image.shape[:2])
        return overlay(picture, shrunk(mask, Image.Resampling.NEAREST), colours, fill=0.2)

    picture = shrunk(image, Image.Resampling.BOX)
    result: list[tuple[str, np.ndarray | None]] = [
        (_shorten(case.name), picture),
        ("truth", drawn("truth", case.truth)),
    ]
    if case.before is not None:
        result.append((f"before: {_dice_text(case.before_dice)}", drawn("before", case.before)))
    elif with_before:
        result.append(("before: none", None))
    kind = "after" if with_before else "prediction"
    result.append((f"{kind}: {_dice_text(case.dice)}", drawn("prediction", case.prediction)))
    return result


def _dice_text(dice: float | Sequence[float] | None) -> str:
    if dice is None:
        return "no Dice"
    values = np.atleast_1d(np.asarray(dice, np.float64))
    if values.size > 3:  # more numbers than fit
        defined = values[~np.isnan(values)]
        mean = f"{defined.mean():.3f}" if defined.size else "undefined"
        return f"mean Dice {mean} ({defined.size} of {values.size})"
    return "Dice " + " / ".join("undefined" if np.isnan(v) else f"{v:.3f}" for v in values)


def _shorten(name: str) -> str:
    """Keeps both ends of a name that would run into the next column."""
    if len(name) <= _NAME_LENGTH:
        return name
    half = (_NAME_LENGTH - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def _legend(figure: Figure, names: Sequence[str], colours: Sequence[Colour], y: float) -> None:
    handles = [
        Line2D([], [], color="#{:02x}{:02x}{:02x}".format(*colours[i % len(colours)]), linewidth=4)
        for i in range(len(names))
    ]
    legend = figure.legend(
        handles,
        names,
        loc="lower center",
        bbox_to_anchor=(0.5, y),
        ncols=len(names),
        fontsize=9,
        facecolor="0.35",
        labelcolor="white",
        borderaxespad=0,
    )
    legend.get_frame().set_edgecolor("none")


def _save(figure: Figure, path: str | Path) -> None:
    suffix = Path(path).suffix.removeprefix(".") or "png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=suffix)
