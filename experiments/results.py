"""The results of a fine-tuning run: merged models, metrics, curve, overlays, and a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures import Case, curve, overlay_sheet
from experiments.segmentation import Tuning
from samjax.atomic import write_json
from samjax.metrics import ImageScore, summarise
from samjax.models.weights import save_weights
from samjax.trees import Params

Shown = dict[str, list[tuple[dict, np.ndarray]]]  # by prompt mode: (example, predicted label map)
MOST_SHOWN = 12  # images of the overlay sheet


@dataclass(frozen=True)
class Result:
    """What ``run`` found: scores at original resolution, by prompt mode, before and after."""

    before: dict[str, list[ImageScore]]
    after: dict[str, list[ImageScore]]
    best_step: int
    seconds: float
    exported: Path | None  # the merged model for Meta's code
    history: list[dict[str, float]] = field(repr=False)


def write_models(out: Path, tuning: Tuning, best: Params, torch_export: bool) -> Path | None:
    """The tuned model for samjax, and for Meta's code; the path of the latter, if wanted."""
    from convert.families import family_of

    merged = tuning.merged(best)
    save_weights(out / "merged.safetensors", tuning.config, merged)
    if not torch_export:
        return None
    family = family_of(tuning.config)
    path = (out / "merged").with_suffix(family.suffix)
    family.write(path, merged)
    return path


def write_metrics(out: Path, settings: Any, result: Result) -> None:
    """``metrics.json``: the settings (a dataclass), scores before and after, the history."""
    content = {
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "seconds": round(result.seconds, 1),
        "best_step": result.best_step,
        "before": summary(result.before),
        "after": summary(result.after),
        "history": result.history,
    }
    write_json(out / "metrics.json", content)


def write_figures(out: Path, mode: str, result: Result, before: Shown, after: Shown) -> None:
    """The training curve, and the first test images with truth and predictions side by side."""
    curve(out / "curve.png", result.history, title=out.name)
    rows = []
    for i, ((example, now), (_, old)) in enumerate(zip(after[mode], before[mode], strict=True)):
        dice, old_dice = (scores[mode][i].dice.tolist() for scores in (result.after, result.before))
        name, image, truth = example["name"], example["image"], example["mask"]
        rows.append(Case(name, image, truth, now, dice, old, old_dice))
    overlay_sheet(out / "overlays.png", rows, title=f"test images, prompt: {mode}")


def summary(scores: dict[str, Sequence[ImageScore]]) -> dict:
    """Dice and IoU per prompt mode and class, as JSON."""
    return {
        mode: {
            name: [entry.as_json() for entry in summarise(values)]
            for name, values in zip(("dice", "iou"), zip(*rows, strict=True), strict=True)
        }
        for mode, rows in scores.items()
    }


def print_scores(result: Result) -> None:
    """A table for a person: Dice before and after, per prompt mode and class."""
    columns = ("class", "images", "Dice before", "Dice after", "IoU after")
    print(f"{'prompt':<8}" + "".join(f"{column:>13}" for column in columns))
    for mode, rows in result.after.items():
        dice, iou = (summarise(values) for values in zip(*rows, strict=True))
        old = summarise([score.dice for score in result.before[mode]])
        for label, (was, now, overlap) in enumerate(zip(old, dice, iou, strict=True), 1):
            values = "".join(f"{entry.mean:>13.4f}" for entry in (was, now, overlap))
            print(f"{mode:<8}{label:>13}{now.n:>13}{values}")
