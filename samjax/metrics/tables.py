"""Tables of scores: CSV files, and means over cases with their spread and a bootstrap interval.

`write_cases` and `read_cases` keep the records of samjax/metrics/cases.py; `summarise_cases` takes
the mean of each metric and class over cases, and then over classes, as the papers report it.
"""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import numpy as np

from samjax.atomic import atomic_write
from samjax.metrics.cases import CaseScore, Present, why_undefined
from samjax.metrics.overlap import Summary, mean_over_classes, summarise

_COLUMNS = ("case", "patient", "class", "present")
_NOTHING = (math.nan, math.nan)


@dataclass(frozen=True)
class ClassSummary(Summary):
    """One metric of one class over cases, and how many cases had nothing to measure.

    `mean`, population `std`, and `n` are over the cases in which the metric has a value;
    `n_undefined` is the number of the others, and `undefined` counts these by reason.
    """

    low: float  # bootstrap interval of the mean; NaN with values of fewer than two patients
    high: float
    undefined: dict[str, int]
    # All cases by which of truth and prediction have the class. Where that is not "both", the
    # value is one that the rule for empty regions gave, if it has one.
    present: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """The fields, with None for NaN."""
        interval = {"low": _or_none(self.low), "high": _or_none(self.high)}
        counts = {"undefined": self.undefined, "present": self.present}
        return super().as_json() | interval | counts


@dataclass(frozen=True)
class MetricSummary:
    """One metric: its classes, and the mean of the classes' means with its bootstrap interval.

    Classes without any value are left out of the mean, which is NaN if all are.
    """

    classes: dict[int, ClassSummary]  # by class, from 1
    mean: float
    low: float
    high: float

    def as_json(self) -> dict[str, Any]:
        """The fields, with None for NaN, and the classes' numbers as text."""
        return {
            "mean": _or_none(self.mean),
            "low": _or_none(self.low),
            "high": _or_none(self.high),
            "classes": {str(label): found.as_json() for label, found in self.classes.items()},
        }


def summarise_cases(
    scores: Sequence[CaseScore],
    *,
    interval: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, MetricSummary]:
    """Mean, spread and interval of each metric, by class and over classes.

    The interval is the percentile bootstrap of the mean (Efron 1979): whole cases are drawn with
    replacement, with all their classes, and the same draws serve all metrics. Where the records
    name patients, patients are drawn, each with all of its cases, since the cases of one patient
    resemble each other; the mean stays that over cases. A draw in which nothing has a value is left
    out. With few patients such an interval is too narrow, as any bootstrap's.

    Args:
        scores: the records of `score_cases` or `read_cases`, each case with the same classes.
        interval: the share of draws between low and high, in (0, 1).
        resamples: number of draws.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ValueError: no record, records with different metrics or classes, a class that comes twice
            in a case, patients named for some cases only, an interval or number of draws that
            cannot be.
    """
    if not 0 < interval < 1:
        raise ValueError(f"interval is {interval}, expected a share between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, expected at least 1")
    table = _by_case(scores)
    labels = list(next(iter(table.values())))
    members = _members(table)
    count = len(members)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    summaries = {}
    for metric in metrics_of(scores):
        values = np.array(
            [[row[label].values[metric] for label in labels] for row in table.values()]
        )
        means = _drawn_means(values, members, draws)
        classes = {}
        for column, (label, base) in enumerate(zip(labels, summarise(values), strict=True)):
            records = [row[label] for row in table.values()]
            reasons = [
                why_undefined(metric, record.present)
                for record in records
                if math.isnan(record.values[metric])
            ]
            low, high = _interval(
                means[:, column : column + 1], values[:, [column]], members, interval
            )
            classes[label] = ClassSummary(
                base.mean,
                base.std,
                base.n,
                base.n_undefined,
                low=low,
                high=high,
                undefined=dict(sorted(Counter(reasons).items())),
                present=dict(sorted(Counter(record.present for record in records).items())),
            )
        low, high = _interval(means, values, members, interval)
        summaries[metric] = MetricSummary(classes, mean_over_classes(classes.values()), low, high)
    return summaries


def write_cases(path: str | os.PathLike[str], scores: Sequence[CaseScore]) -> None:
    """Writes records as CSV, atomically: case, patient, class, present, then each metric.

    Numbers are written so that they read back exactly; what is undefined is an empty cell. UTF-8.

    Raises:
        ValueError: no record, or records with different metrics.
        OSError: the file cannot be written.
    """
    metrics = metrics_of(scores)
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_COLUMNS, *metrics])
        for score in scores:
            values = [float(score.values[metric]) for metric in metrics]
            cells = ["" if math.isnan(value) else repr(value) for value in values]
            writer.writerow([score.case, score.patient or "", score.label, score.present, *cells])


def read_cases(path: str | os.PathLike[str]) -> list[CaseScore]:
    """Reads what `write_cases` wrote.

    Raises:
        ValueError: a file with other columns, or a line with values that cannot be; both name it.
        OSError: the file cannot be read.
    """
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if tuple(header[: len(_COLUMNS)]) != _COLUMNS or len(header) == len(_COLUMNS):
            raise ValueError(f"{path}: columns {header}, expected {list(_COLUMNS)} and metrics")
        records = []
        for row in reader:
            try:
                records.append(_record(header[len(_COLUMNS) :], row))
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
        return records


def metrics_of(scores: Sequence[CaseScore]) -> tuple[str, ...]:
    """The metrics that the records have, in their order.

    Raises:
        ValueError: no record, or records with different metrics.
    """
    if not scores:
        raise ValueError("there are no scores")
    metrics = tuple(scores[0].values)
    for score in scores:
        if tuple(score.values) != metrics:
            raise ValueError(
                f"case {score.case!r} has the metrics {list(score.values)}, "
                f"case {scores[0].case!r} {list(metrics)}"
            )
    return metrics


def _record(metrics: Sequence[str], row: Sequence[str]) -> CaseScore:
    if len(row) != len(_COLUMNS) + len(metrics):
        raise ValueError(f"{len(row)} cells, expected {len(_COLUMNS) + len(metrics)}")
    case, patient, label, present, *cells = row
    if present not in get_args(Present):
        raise ValueError(f"present is {present!r}, expected one of {get_args(Present)}")
    values = [float(cell) if cell else math.nan for cell in cells]
    return CaseScore(
        case,
        patient or None,
        int(label),
        cast(Present, present),
        dict(zip(metrics, values, strict=True)),
    )


def _by_case(scores: Sequence[CaseScore]) -> dict[str, dict[int, CaseScore]]:
    """The records by case and class, all cases with the same classes in the same order."""
    metrics_of(scores)
    table: dict[str, dict[int, CaseScore]] = {}
    for score in scores:
        row = table.setdefault(score.case, {})
        if score.label in row:
            raise ValueError(f"case {score.case!r} has class {score.label} twice")
        row[score.label] = score
    first, labels = scores[0].case, sorted(table[scores[0].case])
    for case, row in table.items():
        if sorted(row) != labels:
            raise ValueError(
                f"case {case!r} has the classes {sorted(row)}, case {first!r} {labels}"
            )
    return {case: {label: row[label] for label in labels} for case, row in table.items()}


def _members(table: dict[str, dict[int, CaseScore]]) -> np.ndarray:
    """bool (patients, cases): whose cases they are; without patients each case is its own."""
    patients = []
    for case, row in table.items():
        named = {record.patient for record in row.values()}
        if len(named) > 1:
            raise ValueError(f"case {case!r} has the patients {sorted(map(str, named))}")
        patients += named
    unnamed = [case for case, patient in zip(table, patients, strict=True) if patient is None]
    if len(unnamed) == len(patients):
        return np.eye(len(patients), dtype=bool)
    if unnamed:
        raise ValueError(f"{len(unnamed)} cases have no patient, the first is {unnamed[0]!r}")
    return np.array(patients) == np.array(sorted(set(patients)))[:, None]


def _drawn_means(values: np.ndarray, members: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mean of each class in each draw, (resamples, classes), NaN where it has no value."""
    defined = ~np.isnan(values)
    sums = members @ np.where(defined, values, 0)  # patients, classes
    counts = members @ defined.astype(np.float64)
    n = draws @ counts
    return np.where(n > 0, draws @ sums / np.where(n > 0, n, 1), np.nan)


def _interval(
    means: np.ndarray, values: np.ndarray, members: np.ndarray, interval: float
) -> tuple[float, float]:
    """The interval of the mean over the classes in `means`, (resamples, classes)."""
    with_value = (members @ (~np.isnan(values)).any(1)).sum()
    if with_value < 2:
        return _NOTHING
    defined = ~np.isnan(means)
    n = defined.sum(1)
    over_classes = np.where(defined, means, 0).sum(1)[n > 0] / n[n > 0]
    tail = 50 * (1 - interval)
    low, high = np.percentile(over_classes, [tail, 100 - tail])
    return float(low), float(high)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
