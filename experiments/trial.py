"""One row of a paper's table: a model, what is trained of it and on what, how it is scored.

A paper's file lists trials; ``run`` trains one, scores it on every test set under every prompt, and
writes ``result.json`` (``experiments.record``), ``adapter.safetensors``, ``curve.png``,
``overlays.png`` and, of several classes, ``classes.png``.  Training is skipped for what is only
measured (zero-shot).  A trial whose result is there is not run again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import segmentation as seg
from experiments.bars import class_bars
from experiments.data_hashes import describe_data
from experiments.figures import Case, curve, overlay_sheet
from experiments.objectives import Objective
from experiments.options import TrainingOptions, is_first_process
from experiments.record import RESULT, Record, Scores, read_records, write_record
from experiments.results import MOST_SHOWN
from experiments.scoring import Prediction, Score, score_pictures
from experiments.training import MakeLoader, MakeOptimizer, base_fingerprint, optimise
from samjax.data import SegmentationDataset, make_loader, num_slots
from samjax.data.opening import class_names_of
from samjax.data.subsets import patients_of
from samjax.metrics import CaseScore, summarise_cases
from samjax.training.checkpoint import CheckpointError
from samjax.training.log import RunLog
from samjax.training.sharding import batch_parts
from samjax.trees import Params, count_bytes, count_values


@dataclass(frozen=True, kw_only=True)
class Test:
    """A data set to score on."""

    name: str  # as the tables call it
    dataset: SegmentationDataset
    prompts: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {"none": {"prompt_modes": "none"}}
    )
    """What the tables call a kind of prompt, and ``make_loader``'s arguments for it."""
    scores: Mapping[str, Score] = field(default_factory=lambda: {"": score_pictures})
    """Ways of scoring, by what is added to the name of the data set: "" for the main one."""
    drawn: str | None = None
    """The kind of prompt that the overlays show, by default the first."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What one run does."""

    experiment: str
    table: str
    method: str  # the row of the table; runs of other seeds share it
    run: str  # folder below ``options.out``
    options: TrainingOptions
    build: Callable[[], seg.Tuning]
    tests: tuple[Test, ...]
    train: SegmentationDataset | None = None  # None: nothing is trained
    val: SegmentationDataset | None = None  # None: the last step is kept
    augment: str = "none"
    prompts: Mapping[str, Any] = field(default_factory=lambda: {"prompt_modes": "none"})
    rank: int = 4  # of GaLore
    optimizer_of: MakeOptimizer | None = None
    loader: MakeLoader = make_loader
    settings: Mapping[str, Any] = field(default_factory=dict)  # beside the options, for the record
    notes: tuple[str, ...] = ()
    smoke: bool = False
    instead: Callable[[Trial, Mesh], Record] | None = None  # a run without a tuning, or scores
    draw: Callable[[Trial, seg.Tuning, Params], None] | None = None  # further pictures, of a result

    @property
    def folder(self) -> Path:
        """Where its results go."""
        return self.options.out / self.run


def run(trial: Trial, mesh: Mesh) -> Record:
    """Trains and scores; returns what was written.

    Raises ``CheckpointError`` if the folder holds a result or a run and ``--resume`` is not given,
    ``TrainingError`` and ``Preempted`` as ``training.optimise`` does.
    """
    folder, options = trial.folder, dataclasses.replace(trial.options, out=trial.folder)
    if (folder / RESULT).exists():
        if not options.resume:
            raise CheckpointError(
                f"{folder} holds a result: choose another --out, or --resume to keep it and go on"
            )
        (found,) = read_records(folder)
        return found
    if trial.instead is not None:
        return trial.instead(trial, mesh)
    started = time.perf_counter()
    tuning = trial.build()
    base = base_fingerprint(tuning)
    tuning = seg.on_mesh(tuning, mesh)
    evaluator = seg.Evaluator(tuning)
    parameters = {
        "trainable": 0 if trial.train is None else count_values(tuning.trainable),
        "total": count_values(tuning.trainable) + count_values(tuning.frozen),
    }
    memory = {"weights": count_bytes(tuning.trainable) + count_bytes(tuning.frozen)}
    speed, history, best = None, [], tuning.trainable
    first = is_first_process()
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    if trial.train is not None:
        memory["gradients"] = count_bytes(tuning.trainable)
        with RunLog(folder, write=first) as log:
            trained = optimise(
                options,
                tuning,
                evaluator,
                trial.train,
                trial.val,
                log,
                rank=trial.rank,
                base=base,
                augment=trial.augment,
                prompts=trial.prompts,
                optimizer_of=trial.optimizer_of,
                loader=trial.loader,
            )
        speed, history = trained.images_per_second, log.history
        memory["state"] = trained.state_bytes
        best = seg.placed_like(trained.best, tuning)
    scores, shown = [], {}
    for test in trial.tests:
        found, pictures = _score(trial, tuning, evaluator, best, test)
        scores += found
        shown.update(pictures)
    peak = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in peak:
        memory["device_peak"] = peak["peak_bytes_in_use"]
    parts = {"train": trial.train, "validation": trial.val}
    data = {part: describe_data(part, found) for part, found in parts.items() if found is not None}
    data |= {f"test {test.name}": describe_data(test.name, test.dataset) for test in trial.tests}
    record = Record(
        experiment=trial.experiment,
        table=trial.table,
        method=trial.method,
        run=trial.run,
        smoke=trial.smoke,
        settings={**options.fixed(), **trial.settings, "tuning": tuning.method, "base": base},
        seed=options.seed,
        data=data,
        parameters=parameters,
        memory=memory,
        seconds=time.perf_counter() - started,
        images_per_second=speed,
        history=history,
        scores=scores,
        notes=trial.notes,
    )
    if first:
        _draw(trial, record, shown)
        if trial.draw is not None:
            trial.draw(trial, tuning, best)
        write_record(folder, record)
    return record


def _score(
    trial: Trial, tuning: seg.Tuning, evaluator: seg.Evaluator, trainable: Params, test: Test
) -> tuple[list[Scores], dict[str, list[Case]]]:
    """The scores on a test set, and cases for the overlays by "data set, prompt"."""
    assert tuning.mesh is not None
    objective, parts = tuning.objective, batch_parts(tuning.mesh)
    names = class_names_of(test.dataset) or ("foreground",)
    patients = patients_of(test.dataset)
    # One program for all kinds of prompts: as many slots for each as the one with most needs.
    slots = max(
        num_slots(p["prompt_modes"], p.get("num_points", 1), p.get("num_negatives", 0))
        for p in test.prompts.values()
    )
    scores, shown = [], {}
    for prompt, arguments in test.prompts.items():
        batches = trial.loader(
            test.dataset,
            frame_size=tuning.config.image_size,
            fit=tuning.config.fit,
            batch_size=-(-min(trial.options.batch_size, len(test.dataset)) // parts) * parts,
            seed=trial.options.seed,
            **{"box_jitter": 0.0, **arguments, "slots": slots},
        )
        seen: list[tuple[int, np.ndarray]] = []
        predictions = _tapped(evaluator.predictions(trainable, batches), seen)
        cases: dict[str, list[CaseScore]] = {name: [] for name in test.scores}
        # Patient by patient: the logits of a whole data set may take tens of gigabytes.
        for _, of_patient in groupby(predictions, lambda found: patients[found[0]]):
            together = list(of_patient)
            for name, score in test.scores.items():
                cases[name] += score(iter(together), test.dataset, objective)
        for name, found in cases.items():
            title = f"{test.name} {name}".strip()
            scores.append(Scores(data_set=title, prompt=prompt, cases=found, class_names=names))
        shown[_title(test, prompt)] = [
            _shown(test.dataset, index, logits, objective) for index, logits in seen
        ]
    return scores, shown


def _title(test: Test, prompt: str) -> str:
    return f"{test.name}, prompt: {prompt}"


def _tapped(
    predictions: Iterable[Prediction], seen: list[tuple[int, np.ndarray]]
) -> Iterator[Prediction]:
    for index, logits, truth in predictions:
        if len(seen) < MOST_SHOWN:
            seen.append((index, logits))
        yield index, logits, truth


def _shown(
    dataset: SegmentationDataset, index: int, logits: np.ndarray, objective: Objective
) -> Case:
    example = dataset[index]
    truth = example["mask"]
    labels = seg.labels_at(objective.main(logits), truth.shape)
    dice = seg.score_image(labels, truth, objective.num_classes).dice
    return Case(example["name"], example["image"], truth, labels, dice.tolist())


def _draw(trial: Trial, record: Record, shown: Mapping[str, list[Case]]) -> None:
    if record.history:
        curve(trial.folder / "curve.png", record.history, title=trial.method)
    test = trial.tests[0]
    title = _title(test, test.drawn or next(iter(test.prompts)))
    overlay_sheet(trial.folder / "overlays.png", shown[title], title=f"{trial.method}: {title}")
    names = record.scores[0].class_names
    if len(names) > 1:
        bars = {
            f"{scores.data_set}, {scores.prompt}": _of_classes(scores) for scores in record.scores
        }
        class_bars(trial.folder / "classes.png", bars, f"{trial.method}: Dice by class")


def _of_classes(scores: Scores) -> dict[str, tuple[float, float, float]]:
    classes = summarise_cases(scores.cases)["dice"].classes
    return {
        scores.class_names[label - 1]: (found.mean, found.low, found.high)
        for label, found in classes.items()
    }
