"""Tables of all results there are, beside what the papers publish, as Markdown and as HTML.

    python -m experiments.report --results runs --out report

Reads every `result.json` below `--results` (experiments/record.py) and writes `report.md`,
`report.html` and, in `pictures`, what pictures lie beside the results. A published value
(experiments/published.py) stands beside the run of the same experiment, table, method, data set,
prompt and metric. Nothing is left out in silence: a cell without a run says "not run", one without
a published value "not published", or "not found" where it is known to be missing.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import tyro

from experiments import published
from experiments.published import BASELINES, HISTORY, MEAN, MEAN_OF_PROMPTS, PROMPTS, Published
from experiments.record import Record, Scores, Stored, read_stored
from experiments.report_page import (
    Block,
    Footnotes,
    Heading,
    Items,
    Paragraph,
    Picture,
    Table,
    as_bytes,
    natural,
    ordered_by,
    placed,
    write_page,
)
from samjax.metrics import CaseScore, summarise_cases

SMOKE = "Smoke runs: phantoms and tiny models; the figures say nothing about the methods"
_WIDEST = 8  # columns of a table of data sets and prompts
_TITLES = {
    **{"dice": "Dice", "iou": "IoU", "auc": "AUC", "nsd": "NSD", "hd95": "HD95"},
    **{"loss": "Training loss", "val_loss": "Validation loss"},
}
_FOUR_DIGITS = ("dice", "iou", "auc", "nsd", "sensitivity", "specificity", *HISTORY)
_FIRST_PICTURES = ("curve.png", "overlays.png", "classes.png")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tables of all results below a folder, beside what the papers publish."""

    results: Path
    """Folder with the folders of the runs."""
    out: Path
    """Folder for report.md and report.html."""


class Key(NamedTuple):
    """What a column is about, and in which metric."""

    data_set: str
    prompt: str
    metric: str
    label: str


class Value(NamedTuple):
    """A mean over cases; low and high are NaN where there is no interval."""

    mean: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0
    undefined: int = 0


class Row(NamedTuple):
    """Runs of one method, which differ in the seed; none where it is only published."""

    label: str
    method: str
    stage: str
    runs: Sequence[Stored]


def report(stored: Sequence[Stored], results: Path, out: Path) -> list[Block]:
    """The page of all results; copies the pictures that lie outside `out` into it."""
    real = [found for found in stored if not found.record.smoke]
    smoke = [found for found in stored if found.record.smoke]
    blocks: list[Block] = [
        Heading(1, "Results"),
        Paragraph(f"Runs: {len(real)}. Smoke runs: {len(smoke)}."),
        Items(
            (
                "A cell has our mean over n cases with its 95 % bootstrap interval, or the mean ± "
                "standard deviation over runs that differ in the seed; then what is published; "
                "then ours − published.",
                "“not run”: there is no such result here. “not published”: no such value is known. "
                "“not found”: it was looked for, and the note says where.",
                "The notes say in what a run differs from the paper: a difference means nothing "
                "without them.",
            )
        ),
    ]
    for experiment in sorted({found.record.experiment for found in real}):
        runs = [found for found in real if found.record.experiment == experiment]
        blocks.append(Heading(2, experiment))
        blocks += _experiment(experiment, runs, results, out, compare=True)
    names = {entry.experiment for entry in published.PUBLISHED} - {BASELINES}
    if missing := sorted(names - {found.record.experiment for found in real}):
        blocks.append(Heading(2, "Not run"))
        blocks.append(Items([f"{name}: not run, or in smoke runs only" for name in missing]))
    if smoke:
        blocks.append(Heading(2, SMOKE))
    for experiment in sorted({found.record.experiment for found in smoke}):
        runs = [found for found in smoke if found.record.experiment == experiment]
        blocks += _experiment(experiment, runs, results, out, compare=False)
    return blocks


def _experiment(
    name: str, runs: Sequence[Stored], results: Path, out: Path, *, compare: bool
) -> list[Block]:
    prefix = "" if compare else f"{name}: "
    known = [e for e in published.PUBLISHED if compare and e.experiment in (name, BASELINES)]
    own = [entry for entry in known if entry.experiment == name]
    tables = [entry.table for entry in own if entry.table != published.SUMMARY]
    blocks: list[Block] = []
    for table in dict.fromkeys([*tables, *(found.record.table for found in runs)]):
        entries = [entry for entry in known if entry.table == table]
        blocks.append(Heading(3, prefix + table))
        of_table = [found for found in runs if found.record.table == table]
        blocks += _tables(of_table, entries, compare)
    # Of the baselines those on a data set that has a table here.
    summary = [e for e in known if e.table == published.SUMMARY]
    if summary := [e for e in summary if e.experiment == name or e.data_set in tables]:
        blocks.append(Heading(3, "Published, about many runs at once"))
        blocks.append(_summary_table(summary))
    blocks.append(Heading(3, f"{prefix}runs"))
    blocks += _runs(runs)
    pictures = [picture for found in runs for picture in _pictures(found, results, out)]
    if pictures:
        blocks += [Heading(3, f"{prefix}pictures"), *pictures]
    return blocks


def _tables(runs: Sequence[Stored], entries: Sequence[Published], compare: bool) -> list[Block]:
    """The tables of one table of the paper: a metric each, wide ones in parts."""
    notes = Footnotes()
    known = {
        (entry.method, Key(entry.data_set, entry.prompt, entry.metric, entry.label)): entry
        for entry in entries
    }
    scored = {id(found): values_of(found.record) for found in runs}
    keys = dict.fromkeys(
        key for by_stage in scored.values() for of in by_stage.values() for key in of
    )
    keys |= dict.fromkeys(key for _, key in known)
    rows = _rows(runs, list(dict.fromkeys(entry.method for entry in entries)))
    metrics = sorted(dict.fromkeys(key.metric for key in keys), key=ordered_by(_TITLES))
    blocks: list[Block] = []
    for metric in metrics:
        for title, columns in _columns([key for key in keys if key.metric == metric]):
            shown = []
            for row in rows:
                cells = []
                for key in columns.values():
                    ours = [_value(found, row.stage, key, scored[id(found)]) for found in row.runs]
                    entry = known.get((row.method, key)) if row.stage == "after" else None
                    cells.append(([value for value in ours if value is not None], entry))
                if any(ours or entry for ours, entry in cells):
                    both = compare and row.stage == "after"
                    texts = [_cell(o, e, metric, notes, compare=both) for o, e in cells]
                    shown.append([row.label, *texts])
            heading = _TITLES.get(metric, metric)
            blocks.append(Table(f"{heading}{title}", ["method", *columns], shown))
    if not blocks:
        blocks.append(Paragraph("These runs have no scores."))
    if texts := [*notes.texts(), *_notes(runs), *_differing(rows)]:
        blocks.append(Items(texts))
    return blocks


def _columns(keys: Sequence[Key]) -> Iterable[tuple[str, dict[str, Key]]]:
    """What tells tables of one metric apart, and their columns by head."""
    pairs = dict.fromkeys((key.data_set, key.prompt) for key in keys)
    plain: list[Key] = []
    for pair in pairs:
        of_pair = [key for key in keys if key[:2] == pair]
        if len(of_pair) == 1 and of_pair[0].label == MEAN:
            plain += of_pair
        else:
            of_pair.sort(key=lambda key: key.label == MEAN)
            yield f", {pair[0]}, prompt: {pair[1]}", {key.label: key for key in of_pair}
    place = ordered_by((MEAN_OF_PROMPTS, *PROMPTS))
    prompts = sorted({key.prompt for key in plain}, key=place)
    if len(prompts) > 1 and len(plain) <= _WIDEST:
        yield "", {f"{key.data_set}, {key.prompt}": key for key in plain}
        return
    for prompt in prompts:
        title = f", {prompt}" if prompt == MEAN_OF_PROMPTS else f", prompt: {prompt}"
        yield title, {key.data_set: key for key in plain if key.prompt == prompt}


def _cell(
    ours: Sequence[Value], entry: Published | None, metric: str, notes: Footnotes, *, compare: bool
) -> tuple[str, ...]:
    digits = 4 if metric in _FOUR_DIGITS else 2
    lines, mean = ["not run"], None
    if ours:
        mean = statistics.fmean(value.mean for value in ours)
        lines = [_ours(ours, mean, digits)]
    if compare and entry is None:
        lines.append("not published")
    elif entry is not None and entry.value is None:
        lines.append(f"not found {notes.mark(entry.cited)}")
    elif entry is not None and entry.value is not None:
        lines.append(f"published {entry.value:g} {notes.mark(entry.cited)}")
        if mean is not None and not math.isnan(mean):
            lines.append(f"difference {mean - entry.value:+.{digits}f}")
    return tuple(lines)


def _ours(values: Sequence[Value], mean: float, digits: int) -> str:
    text = "undefined" if math.isnan(mean) else f"{mean:.{digits}f}"
    first = values[0]
    if len(values) > 1:
        spread = statistics.stdev(value.mean for value in values)
        text += f" ± {spread:.{digits}f} ({len(values)} seeds)"
    elif not math.isnan(first.low):
        text += f" [{first.low:.{digits}f}, {first.high:.{digits}f}]"
    if any(value.n for value in values):
        text += f", n {'/'.join(dict.fromkeys(str(value.n) for value in values))}"
    if undefined := sum(value.undefined for value in values):
        text += f", {undefined} undefined"
    return text


def values_of(record: Record) -> dict[str, dict[Key, Value]]:
    """All means of a record by stage, also those over `PROMPTS` where it has them all.

    Of one class there is the mean over cases, labelled `MEAN`; of several there is each one's, by
    its name, and the mean of these.
    """
    found: dict[str, dict[Key, Value]] = {"before": {}, "after": {}}
    for scores in [*record.scores, *_mean_of_prompts(record.scores)]:
        for metric, summary in summarise_cases(scores.cases).items():
            of_stage = found[scores.stage]
            labels = dict(enumerate(scores.class_names, 1)) if len(scores.class_names) > 1 else {}
            for label, name in labels.items():
                s = summary.classes[label]
                key = Key(scores.data_set, scores.prompt, metric, name)
                of_stage[key] = Value(s.mean, s.low, s.high, s.n, s.n_undefined)
            count = len({score.case for score in scores.cases})
            undefined = 0 if labels else summary.classes[1].n_undefined
            key = Key(scores.data_set, scores.prompt, metric, MEAN)
            mean = (summary.mean, summary.low, summary.high)
            of_stage[key] = Value(*mean, n=count - undefined, undefined=undefined)
    return found


def _mean_of_prompts(scores: Sequence[Scores]) -> Iterable[Scores]:
    """For each data set and stage the cases' means over `PROMPTS`, undefined where one is."""
    for data_set, stage in dict.fromkeys((s.data_set, s.stage) for s in scores):
        by_prompt = {s.prompt: s for s in scores if (s.data_set, s.stage) == (data_set, stage)}
        if not set(PROMPTS) <= set(by_prompt):
            continue
        tables = [{(c.case, c.label): c for c in by_prompt[p].cases} for p in PROMPTS]
        if any(table.keys() != tables[0].keys() for table in tables):
            raise ValueError(f"{data_set}, {stage}: the prompts were scored on different cases")
        cases = []
        for place, first in tables[0].items():
            values = {
                metric: statistics.fmean(table[place].values[metric] for table in tables)
                for metric in first.values
            }
            cases.append(CaseScore(first.case, first.patient, first.label, first.present, values))
        yield replace(by_prompt[PROMPTS[0]], prompt=MEAN_OF_PROMPTS, cases=cases)


def _value(
    found: Stored, stage: str, key: Key, scored: dict[str, dict[Key, Value]]
) -> Value | None:
    """A run's value for a column; of its history where the metric is one of a training."""
    if key.metric not in HISTORY:
        return scored[stage].get(key)
    record = found.record
    values = [entry.get(key.metric, math.nan) for entry in record.history]
    values = [value for value in values if not math.isnan(value)]
    if stage == "before" or not values or key.data_set not in {s.data_set for s in record.scores}:
        return None
    pick = {"first": values[0], "last": values[-1], "lowest": min(values), "highest": max(values)}
    return Value(pick[key.label])


def _rows(runs: Sequence[Stored], first: Sequence[str]) -> list[Row]:
    """The methods of `first` and then the others; runs that are no seeds of one another apart."""
    others = sorted({found.record.method for found in runs} - set(first), key=natural)
    rows = []
    for method in [*first, *others]:
        group = [found for found in runs if found.record.method == method]
        tests = {
            str([(p, about.get("sha256")) for p, about in data.items() if p.startswith("test")])
            for data in (r.record.data for r in group)
        }
        alike = len({r.record.seed for r in group}) == len(group) and len(tests) <= 1
        parts = {method: group} if alike else {f"{method} ({r.record.run})": [r] for r in group}
        for label, of_label in parts.items():
            if any(s.stage == "before" for r in of_label for s in r.record.scores):
                rows.append(Row(f"{label}, before training", method, "before", of_label))
            rows.append(Row(label, method, "after", of_label))
    return rows


def _summary_table(entries: Sequence[Published]) -> Table:
    columns = ("method", "data", "figure", "published", "source")
    rows = [
        (
            e.method,
            e.data_set,
            e.metric,
            "not found" if e.value is None else f"{e.value:g}",
            e.cited,
        )
        for e in entries
    ]
    return Table("No single run answers these", columns, rows)


def _notes(runs: Sequence[Stored]) -> list[str]:
    """What differs from the paper, each note with the runs that have it."""
    of_note: dict[str, list[str]] = {}
    for found in runs:
        for note in found.record.notes:
            of_note.setdefault(note, []).append(found.record.run)
    return [f"Differs from the paper in {', '.join(of)}: {note}" for note, of in of_note.items()]


def _differing(rows: Sequence[Row]) -> list[str]:
    """Settings that are not the same in the runs of a row, which should differ in the seed."""
    texts = []
    for row in rows:
        settings = [found.record.settings for found in row.runs if row.stage == "after"]
        for key in dict.fromkeys(key for of_run in settings for key in of_run):
            values = [repr(of_run.get(key)) for of_run in settings]
            if key not in ("seed", "out") and len(set(values)) > 1:
                texts.append(f"{row.label}: its runs differ in {key}: {', '.join(values)}")
    return texts


def _runs(runs: Sequence[Stored]) -> list[Block]:
    """What the runs were and what they took."""
    rows = []
    for found in sorted(runs, key=lambda found: natural(found.record.run)):
        record, about = found.record, found.environment
        steps = max((entry.get("step", 0) for entry in record.history), default=0)
        trained, total = (record.parameters.get(key) for key in ("trainable", "total"))
        share = f"{trained / total:.2%}" if trained is not None and total else "unknown"
        speed = record.images_per_second
        device = about.get("device", {})
        rows.append(
            (
                *(record.run, record.method, record.table, str(record.seed), f"{steps:g}"),
                (*("unknown" if n is None else f"{n:,}" for n in (trained, total)), share),
                tuple(f"{name} {as_bytes(n)}" for name, n in record.memory.items()) or "unknown",
                "unknown" if speed is None else f"{speed:.3g}",
                f"{record.seconds:.0f}",
                (
                    f"{device.get('count', '?')} × {device.get('kind', 'unknown')}",
                    f"{about.get('host_cores', '?')} cores",
                ),
                tuple(
                    f"{part}: {of.get('name', '?')}, {of.get('count', '?')}, "
                    f"{str(of.get('sha256', 'no hash'))[:12]}"
                    for part, of in record.data.items()
                )
                or "none",
            )
        )
    columns = ("run", "method", "table", "seed", "steps", "trained, total, share", "memory")
    columns += ("images/s", "seconds", "device", "data: part, name, examples, sha256")
    versions = {
        ", ".join(f"{name} {v}" for name, v in found.environment.get("versions", {}).items())
        for found in runs
    }
    table = Table("What they were and what they took", columns, rows)
    return [table, Items([f"Versions: {text or 'unknown'}" for text in sorted(versions)])]


def _pictures(found: Stored, results: Path, out: Path) -> list[Picture]:
    place = ordered_by(_FIRST_PICTURES)
    files = sorted(found.folder.glob("*.png"), key=lambda file: place(file.name))
    name = found.folder.relative_to(results)
    title = f"{found.record.method}, {found.record.run}"
    return [Picture(placed(file, name, out), f"{title}: {file.stem}") for file in files]


def main(argv: list[str] | None = None) -> int:
    """The command; exit code 1 and one clear message without results or on a broken one."""
    try:
        arguments = tyro.cli(Arguments, args=argv, prog="python -m experiments.report")
        stored = read_stored(arguments.results)
        if not stored:
            raise ValueError(f"{arguments.results}: no result.json in it or below")
        path = write_page(arguments.out, report(stored, arguments.results, arguments.out))
    except (ValueError, OSError) as error:
        print(f"experiments.report: error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
