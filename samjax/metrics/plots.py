"""A picture of a table of scores: every case as a point, by class, with its quartiles and mean.

Drawn with matplotlib's Figure, not with pyplot: no global state, no display.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from samjax.atomic import atomic_write
from samjax.metrics.cases import CaseScore
from samjax.metrics.tables import metrics_of, summarise_cases

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POINT, _BOX, _MEAN = "#3b7dd8", "0.25", "#d1495b"
_SHARES = ("dice", "iou", "nsd", "sensitivity", "specificity", "auc")  # axis 0..1


def plot_cases(
    path: str | os.PathLike[str],
    scores: Sequence[CaseScore],
    metrics: Sequence[str] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    title: str = "",
    unit: str = "mm",
) -> None:
    """Writes a PNG: one panel per metric, one column per class.

    A column shows each case as a point, the quartiles as a box whose whiskers end at the outermost
    cases within 1.5 of its height, and the mean with its 95 % bootstrap interval (see
    `summarise_cases`). Below it stands how many cases have a value and how many have none.

    Args:
        path: the file.
        scores: the records of `score_cases` or `read_cases`.
        metrics: which to draw, from top to bottom; None for all.
        class_names: one name per class, from 1; None for the numbers.
        title: above the panels.
        unit: of distances, for the axis.

    Raises:
        ValueError: what `summarise_cases` refuses; a metric that the records lack; names that are
            not as many as the classes.
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    available = metrics_of(scores)
    metrics = available if metrics is None else tuple(metrics)
    if unknown := [metric for metric in metrics if metric not in available]:
        raise ValueError(f"the scores have no {', '.join(unknown)}, but {', '.join(available)}")
    labels = sorted({score.label for score in scores})
    names = [f"class {label}" for label in labels] if class_names is None else list(class_names)
    if len(names) != len(labels):
        raise ValueError(f"{len(names)} class names for {len(labels)} classes")
    summaries = summarise_cases(scores)
    figure = Figure(
        figsize=(max(4.2, 1.3 + 1.15 * len(labels)), 0.5 + 3.0 * len(metrics)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
    for axes, metric in zip(panels, metrics, strict=True):
        ticks = []
        for x, (label, name) in enumerate(zip(labels, names, strict=True)):
            found = summaries[metric].classes[label]
            values = [score.values[metric] for score in scores if score.label == label]
            _column(axes, x, np.array(values))
            if found.n:
                axes.plot(x + 0.3, found.mean, "D", color=_MEAN, markersize=5, zorder=4)
                axes.plot([x + 0.3] * 2, [found.low, found.high], color=_MEAN, linewidth=1.5)
            missing = f", {found.n_undefined} undefined" if found.n_undefined else ""
            ticks.append(f"{name}\nn = {found.n}{missing}")
        axes.set_xticks(range(len(labels)), ticks, fontsize=8)
        axes.set_xlim(-0.6, len(labels) - 0.4)
        axes.set_ylabel(axis_label(metric, unit))
        if metric in _SHARES:
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.align_ylabels(panels)
    figure.supxlabel("box: quartiles; diamond: mean and its 95 % bootstrap interval", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=11)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def axis_label(metric: str, unit: str = "mm") -> str:
    """A metric's name as the papers write it, with the unit of a distance."""
    shares = {"dice": "Dice", "iou": "IoU", "nsd": "NSD", "auc": "AUC"}
    if metric in _SHARES:
        return shares.get(metric, metric)
    name, *pooled = metric.split("_")
    return f"{name.upper()}{', pooled' if pooled else ''} ({unit})"


def _column(axes: Axes, x: int, values: np.ndarray) -> None:
    """The points of one class beside its box, without the undefined ones."""
    values = values[~np.isnan(values)]
    if not values.size:
        return
    # Always the same scatter: a picture of the same table is the same picture.
    beside = np.random.default_rng(0).uniform(-0.14, 0.14, values.size)
    axes.scatter(x + beside, values, s=14, color=_POINT, alpha=0.6, linewidths=0, zorder=3)
    line = {"color": _BOX, "linewidth": 1.1}
    axes.boxplot(
        values,
        positions=[x],
        widths=0.42,
        showfliers=False,
        manage_ticks=False,
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        medianprops=line | {"linewidth": 2},
    )
