"""The one result format of all experiments: what a run writes, and what the report reads.

A run has a folder with `result.json` and one CSV of per-case scores for each data set, prompt and
stage that it was scored on. The JSON says what was run, on which data, by which versions on which
device, and holds the means of all scores; the CSVs hold the scores themselves, exactly. Pictures
may lie beside them.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data_hashes import sha256_of
from samjax import __version__
from samjax.atomic import write_json
from samjax.metrics import CaseScore, read_cases, summarise_cases, write_cases

SCHEMA = 1
RESULT = "result.json"
STAGES = ("before", "after")
_LIBRARIES = ("jax", "flax", "optax", "numpy")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one data set under one kind of prompt."""

    data_set: str  # "CHASEDB1"
    prompt: str  # "none", "1 point", "5 points", "box", "5 points+box", …
    cases: list[CaseScore]
    class_names: tuple[str, ...]  # of the labels 1, 2, …
    stage: str = "after"  # "before" for the untuned model


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run: a method with its settings and seed, and everything that was measured of it."""

    experiment: str  # "sam2lora"
    table: str  # the table it belongs to, such as "vessel"
    method: str  # row label: "SAM2LoRA r=64", "zero-shot SAM 2", …; runs of other seeds share it
    run: str  # folder name, unique within the experiment
    smoke: bool  # phantoms and a tiny model: says nothing about the method
    settings: dict[str, Any]  # what JSON can hold; tuples come back as lists
    seed: int
    data: dict[str, Any]  # by part, "train", "test", …: what `data_hashes.describe_data` says
    parameters: dict[str, int]  # {"trainable": …, "total": …}
    memory: dict[str, int]  # bytes: planned_peak, weights, gradients, state, …; what is known
    seconds: float
    images_per_second: float | None
    history: list[dict[str, float]]  # of the training, each with its "step"
    scores: list[Scores]
    notes: tuple[str, ...] = ()  # what differs from the paper in this run


@dataclass(frozen=True)
class Stored:
    """A record as it was found."""

    record: Record
    folder: Path
    environment: dict[str, Any]  # what `environment` said in the run


def environment() -> dict[str, Any]:
    """Versions, devices and host of this process, as they go into the JSON."""
    import jax

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "versions": {"samjax": __version__, **{name: version(name) for name in _LIBRARIES}},
        "device": {"kind": devices[0].device_kind, "count": len(devices)},
        "host_cores": os.cpu_count(),
    }


def write_record(folder: Path, record: Record) -> Path:
    """Writes `folder/result.json` and the CSVs that it names; returns the path of the JSON.

    The CSVs come first, under names that hold a digest of their scores, and the JSON last: whatever
    interrupts it, a JSON in the folder names files that are there and are its own. CSVs of a
    record that was there before go at the end.

    Raises:
        ValueError: a field with a value that the format cannot hold, named; scores of one data
            set, prompt and stage twice, without cases, or with other classes than are named.
        OSError: a file cannot be written.
    """
    content = {"schema": SCHEMA, **_fields_of(record), "environment": environment(), "scores": []}
    files = {}
    for number, scores in enumerate(record.scores):
        where = f"scores of {scores.data_set}, {scores.prompt}, {scores.stage}"
        _check_classes(scores.cases, scores.class_names, where)
        try:
            summary = summarise_cases(scores.cases)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        words = (f"{number:02d}", scores.data_set, scores.prompt, scores.stage)
        name = "_".join(re.sub(r"\W+", "-", word) for word in words)
        name = f"cases_{name}_{_digest(scores.cases)}.csv"
        files[name] = scores.cases
        described = _described(scores) | {"cases": name}
        described["summary"] = {metric: found.as_json() for metric, found in summary.items()}
        content["scores"].append(described)
    for name, cases in files.items():
        write_cases(folder / name, cases)
    write_json(folder / RESULT, content)
    for old in folder.glob("cases_*.csv"):
        if old.name not in files:
            old.unlink()
    return folder / RESULT


def read_records(folder: Path) -> list[Record]:
    """The records of every `result.json` below a folder, by path; see `read_stored`."""
    return [found.record for found in read_stored(folder)]


def read_stored(folder: Path) -> list[Stored]:
    """The same with where they lie and what they ran on.

    Raises:
        ValueError: no such folder; a file that is broken or not of this format, with its name and
            the key; two records of one experiment with the same run.
        OSError: a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = [_read(file) for file in sorted(folder.rglob(RESULT))]
    by_run: dict[tuple[str, str], Path] = {}
    for stored in found:
        key = (stored.record.experiment, stored.record.run)
        if key in by_run:
            raise ValueError(
                f"{stored.folder / RESULT}: run {key[1]!r} of {key[0]} is in {by_run[key]} too; "
                "expected a name of its own for each run"
            )
        by_run[key] = stored.folder / RESULT
    return found


def _digest(cases: Sequence[CaseScore]) -> str:
    """Eight digits of the scores as a CSV holds them."""
    return sha256_of(
        f"{[c.case, c.patient or '', c.label, c.present, *c.values]} "
        f"{[float(value) for value in c.values.values()]}\n"
        for c in cases
    )[:8]


# Fields of the JSON: what each must be, in words, and the test. bool is an int to Python.
def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and math.isfinite(value)


def _is_counts(value: Any) -> bool:
    return _is_named(value) and all(_is_whole(v) and v >= 0 for v in value.values())


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_step(value: Any) -> bool:
    return _is_named(value) and all(_is_number(v) or v in _NOT_FINITE for v in value.values())


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(of(entry) for entry in value)


_NOT_FINITE = ("nan", "inf", "-inf")
_TEXT = ("a text", _is_text)
_COUNTS = ("whole numbers by name", _is_counts)
_NAMED = ("values by name", _is_named)
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("experiment", "table", "method", "run"), _TEXT),
    "smoke": ("true or false", lambda value: isinstance(value, bool)),
    "settings": _NAMED,
    "seed": ("a whole number", _is_whole),
    "data": (
        "descriptions by part",
        lambda value: _is_named(value) and all(_is_named(part) for part in value.values()),
    ),
    "parameters": _COUNTS,
    "memory": _COUNTS,
    "seconds": ("a number", _is_number),
    "images_per_second": ("a number or nothing", lambda v: v is None or _is_number(v)),
    "history": ("a list of numbers by name", lambda value: _is_list(value, _is_step)),
    "notes": ("texts", lambda value: _is_list(value, _is_text)),
}
_OF_SCORES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "data_set": _TEXT,
    "prompt": _TEXT,
    "class_names": ("one or more texts", lambda v: _is_list(v, _is_text) and len(v) > 0),
    "stage": (f"one of {', '.join(STAGES)}", lambda value: value in STAGES),
}


def _fields_of(record: Record) -> dict[str, Any]:
    """A record's fields as JSON has them, without the scores, which are only checked."""
    content = {key: getattr(record, key) for key in _FIELDS}
    content["history"] = [
        {key: _to_json(value) for key, value in entry.items()} for entry in record.history
    ]
    for key in _FIELDS:
        try:
            content[key] = json.loads(json.dumps(content[key], allow_nan=False, default=_plain))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}: {error}") from error
    _check(content, _FIELDS)
    for scores in record.scores:
        _check(_described(scores), _OF_SCORES, "scores: ")
    keys = Counter((scores.data_set, scores.prompt, scores.stage) for scores in record.scores)
    for key, times in keys.items():
        if times > 1:
            raise ValueError(f"scores: {times} of {', '.join(key)}; expected one")
    return content


def _described(scores: Scores) -> dict[str, Any]:
    described = {key: getattr(scores, key) for key in _OF_SCORES}
    return described | {"class_names": list(scores.class_names)}


def _plain(value: Any) -> Any:
    """What JSON has instead of a path or a numpy number."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is nothing that JSON holds")


def _to_json(value: Any) -> Any:
    """JSON has no word for what is not finite; it becomes the text that float() reads."""
    is_float = isinstance(value, float | np.floating)
    return str(float(value)) if is_float and not math.isfinite(value) else value


def _check(
    content: Mapping[str, Any], fields: Mapping[str, tuple[str, Callable]], where: str = ""
) -> None:
    for key, (expected, fits) in fields.items():
        if key not in content:
            raise ValueError(f"{where}no key {key!r}")
        if not fits(content[key]):
            shown = repr(content[key])[:80]
            raise ValueError(f"{where}{key} is {shown}, expected {expected}")


def _check_classes(cases: Iterable[CaseScore], names: Sequence[str], where: str) -> None:
    labels = sorted({case.label for case in cases})
    if labels != list(range(1, len(names) + 1)):
        raise ValueError(
            f"{where}: classes {labels}, expected 1 to {len(names)} for {', '.join(names)}"
        )


def _read(file: Path) -> Stored:
    try:
        content = json.loads(file.read_text("utf-8"))
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"no key 'schema' with the value {SCHEMA}: not a result of samjax")
        wanted = {"scores": ("a list", lambda v: _is_list(v, _is_named)), "environment": _NAMED}
        _check(content, _FIELDS | wanted)
        history = [
            {key: value if _is_number(value) else float(value) for key, value in entry.items()}
            for entry in content["history"]
        ]
        scores = [_read_scores(file.parent, described) for described in content["scores"]]
    except ValueError as error:  # of which JSON's and Unicode's errors are kinds
        raise ValueError(f"{file}: {error}") from error
    fields = {key: content[key] for key in _FIELDS}
    fields |= {"history": history, "scores": scores, "notes": tuple(content["notes"])}
    return Stored(Record(**fields), file.parent, content["environment"])


def _read_scores(folder: Path, described: Mapping[str, Any]) -> Scores:
    _check(described, _OF_SCORES | {"cases": ("a file name", _is_text)}, "scores: ")
    file = folder / described["cases"]
    if file.parent != folder or not file.is_file():
        raise ValueError(f"scores: cases: there is no file {described['cases']!r} beside it")
    cases = read_cases(file)
    if not file.stem.endswith(f"_{_digest(cases)}"):
        raise ValueError(f"scores: cases: {file.name} does not hold the scores that were written")
    _check_classes(cases, described["class_names"], f"scores: cases: {file.name}")
    fields: dict[str, Any] = {key: described[key] for key in _OF_SCORES}
    return Scores(**fields | {"cases": cases, "class_names": tuple(described["class_names"])})
