"""Bars by class: several methods side by side, with the intervals of their means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from samjax.atomic import atomic_write

Bar = tuple[float, float, float]  # mean, low, high; NaN where there is none
_GROUP = 0.8  # of the place that a class has, the rest is between classes


def class_bars(
    path: str | Path,
    methods: Mapping[str, Mapping[str, Bar]],
    title: str = "",
    *,
    label: str = "Dice",
    shares: bool = True,
) -> None:
    """Write a chart with a group of bars for each class and a bar for each method.

    Args:
        path: the file to write; its suffix names the format (.png, .pdf, …).
        methods: by method and class the mean with the ends of its interval, as
            `samjax.metrics.summarise_cases` gives them. A mean that is NaN has no bar but says so,
            as does a class that a method lacks; ends that are NaN have no whiskers.
        title: above the chart.
        label: of the axis.
        shares: whether the values are 0..1, and the axis with them; it begins at 0 otherwise.

    Raises:
        ValueError: no method or no class; an interval whose ends are swapped, or a share outside
            0..1, named.
        OSError: the file cannot be written.
    """
    classes = list(dict.fromkeys(name for bars in methods.values() for name in bars))
    if not classes:
        raise ValueError("there are no bars to draw")
    for method, bars in methods.items():
        for name, (mean, low, high) in bars.items():
            if low > high or (shares and (mean < 0 or mean > 1)):
                within = " and a mean between 0 and 1" if shares else ""
                raise ValueError(
                    f"{method}, {name}: mean {mean:g} of {low:g} to {high:g}; expected an interval"
                    f"{within}"
                )
    width = _GROUP / len(methods)
    inches = max(5.0, 1.2 + 0.32 * len(classes) * (len(methods) + 1), 0.9 * len(classes) + 1)
    figure = Figure(figsize=(inches, 4.2), dpi=110, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for number, (method, bars) in enumerate(methods.items()):
        middle = np.arange(len(classes)) - _GROUP / 2 + (number + 0.5) * width
        found = np.array([bars.get(name, (math.nan,) * 3) for name in classes], np.float64)
        mean, low, high = found.T
        axes.bar(middle, np.nan_to_num(mean), 0.92 * width, color=f"C{number % 10}", label=method)
        # By the interval's own middle: of few cases it need not have the mean inside.
        axes.errorbar(
            middle,
            (low + high) / 2,
            (high - low) / 2,
            fmt="none",
            ecolor="0.2",
            elinewidth=1,
            capsize=min(4.0, 14 * width),
        )
        for x in middle[np.isnan(mean)]:
            axes.text(x, 0, " no value", rotation=90, ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(classes)), classes, parse_math=False)
    axes.set_ylabel(label)
    axes.set_xlim(-0.6, len(classes) - 0.4)
    if shares:
        axes.set_ylim(0, 1.02)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize=11, parse_math=False)
    longest = max(len(method) for method in methods)
    columns = max(1, min(len(methods), int(inches / (0.6 + 0.08 * longest))))
    legend = figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    suffix = Path(path).suffix.removeprefix(".") or "png"
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=suffix)
