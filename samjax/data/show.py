"""Look at a data set: a contact sheet, its figures, and what looks wrong.

    python -m samjax.data.show --dataset chasedb1 --source DIR --out runs/look

Writes `sheet.png` (each picture, its mask, and two draws of what training would see: augmented,
with a simulated prompt) and `survey.json`, and prints the figures.  Options of the data set's own
reader follow the others: `--dataset chasedb1 --source DIR --observer second`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

from samjax.atomic import atomic_write, write_json
from samjax.data.images import DataError
from samjax.data.opening import SourceOptions, open_source
from samjax.data.paper_augment import augmentation
from samjax.data.pipeline import make_loader
from samjax.data.subsets import SegmentationDataset, Subset
from samjax.data.survey import Survey, survey
from samjax.drawing import overlay
from samjax.prompt_labels import BACKGROUND, BOTTOM_RIGHT, FOREGROUND, TOP_LEFT

_CAPTION, _GAP = 16, 6  # pixels: below a row of pictures, between pictures
_OTHERS = ("train", "validation", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Arguments(SourceOptions):
    """What to show, and how training would see it."""

    out: Path
    """Folder for sheet.png and survey.json."""
    examples: int = 12
    """Pictures on the sheet, evenly from first to last of those with a mask."""
    cell: int = 240
    """Side of a picture on the sheet, in pixels."""
    augment: str = "light"
    """Augmentation of the two draws, as in training."""
    prompt: Literal["points", "box", "none"] = "points"
    """The simulated prompt that is drawn."""
    num_points: int = 3
    """Foreground points of it."""
    num_negatives: int = 2
    """Background points of it."""
    region: str = "foreground"
    """Where its points are drawn; see `samjax.data.regions`."""
    against: Literal["auto", "none"] = "auto"
    """Whether the data set's other splits are read too, for pictures and patients in both."""
    seed: int = 0
    """Of augmentation and prompts."""
    progress: bool = True
    """A bar while reading."""


def contact_sheet(
    dataset: SegmentationDataset, indices: Sequence[int], arguments: Arguments
) -> Image.Image:
    """Rows of picture, picture with mask, and two draws with augmentation and prompt."""
    cell = arguments.cell
    chosen = Subset(dataset, indices)
    loader = make_loader(
        chosen,
        frame_size=(cell, cell),
        batch_size=1,
        seed=arguments.seed,
        augment=augmentation(arguments.augment),
        prompt_modes=arguments.prompt,
        num_points=arguments.num_points,
        num_negatives=arguments.num_negatives,
        region=arguments.region,
        num_epochs=2,
    )
    drawn = [_with_prompt({name: rows[0] for name, rows in batch.items()}) for batch in loader]
    across = 4 if len(indices) < 4 else 8  # two examples side by side
    wide, high = across * (cell + _GAP) + _GAP, cell + _CAPTION
    rows = -(-len(indices) * 4 // across)
    sheet = Image.new("RGB", (wide, rows * (high + _GAP) + _GAP), (24, 24, 24))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number in range(len(indices)):
        example = chosen[number]
        plain = [example["image"], overlay(example["image"], example["mask"])]
        cells = [_fitted(picture, cell) for picture in plain]
        cells += [Image.fromarray(drawn[number + k * len(indices)]) for k in (0, 1)]
        row, column = divmod(4 * number, across)
        top, left = _GAP + row * (high + _GAP), _GAP + column * (cell + _GAP)
        for place, picture in enumerate(cells):
            sheet.paste(picture, (left + place * (cell + _GAP), top))
        height, width = example["mask"].shape
        caption = f"{indices[number]}  {example['name']}  {width}x{height}"
        pen.text((left, top + cell + 1), caption[: cell // 2], (230, 230, 230), font)
    return sheet


def _fitted(picture: np.ndarray, cell: int) -> Image.Image:
    image = Image.fromarray(picture)
    scale = cell / max(image.size)
    size = tuple(max(round(side * scale), 1) for side in image.size)
    smaller = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    return image.resize((size[0], size[1]), smaller)


def _with_prompt(row: dict[str, np.ndarray]) -> np.ndarray:
    """A row of a batch as a picture: mask, points (+ green, - red), box."""
    image = Image.fromarray(overlay(row["image"], row["mask"]))
    pen = ImageDraw.Draw(image)
    points = {label: row["coords"][row["labels"] == label] for label in np.unique(row["labels"])}
    for label, colour in ((FOREGROUND, (0, 255, 0)), (BACKGROUND, (255, 30, 30))):
        for x, y in points.get(label, ()):
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), colour, (0, 0, 0))
    if TOP_LEFT in points:
        corners = (*points[TOP_LEFT][0].tolist(), *points[BOTTOM_RIGHT][0].tolist())
        pen.rectangle(corners, outline=(255, 255, 0), width=2)
    return np.array(image)


def chosen_examples(found: Survey, count: int) -> list[int]:
    """``count`` examples evenly from those with a mask, or from all where none has one."""
    labelled = [i for i, example in enumerate(found.examples) if example.pixels[1:].any()]
    candidates = labelled or list(range(len(found.examples)))
    places = np.linspace(0, len(candidates) - 1, min(count, len(candidates)))
    return [candidates[place] for place in places.round().astype(int)]


def report(found: Survey, title: str) -> str:
    """The figures of a survey as text."""
    known = found.as_json()
    lines = [title, f"  {known['examples']} examples of {known['patients']} patients"]
    for what in ("sizes", "spacings_mm", "orientations"):
        if known[what]:
            listed = ", ".join(f"{value} ({n})" for value, n in list(known[what].items())[:6])
            more = ", …" if len(known[what]) > 6 else ""
            lines.append(f"  {what.replace('_mm', ' in mm')}: {listed}{more}")
    for number, (name, entry) in enumerate(known["classes"].items(), start=1):
        share = 100 * entry["share_of_pixels"]
        lines.append(f"  {number} {name}: in {entry['examples']} examples, {share:.3g} % of pixels")
    lines.append("  suspicious:" if found.suspicious else "  nothing looks suspicious")
    return "\n".join(lines + [f"    {line}" for line in found.suspicious])


def _other_splits(arguments: Arguments, reader_args: Sequence[str]) -> dict[str, Any]:
    """The data set's other splits, as far as it has any."""
    others = {}
    for split in _OTHERS if arguments.against == "auto" else ():
        if split != arguments.split:
            other = replace(arguments, split=split, skip_bad=None)
            try:
                others[split] = open_source(other, reader_args)
            except ValueError as error:  # it has no such split, or its files are not here
                print(f"not compared with the split {split!r}: {str(error).splitlines()[0]}")
    return others


def run(arguments: Arguments, reader_args: Sequence[str] = ()) -> Survey:
    """Reads, prints, writes `sheet.png` and `survey.json`; see `main`."""
    dataset = open_source(arguments, reader_args)
    others = _other_splits(arguments, reader_args)
    found = survey(dataset, others, progress=arguments.progress)
    print(report(found, f"{arguments.dataset}, {arguments.split}: {arguments.source}"))
    sheet = contact_sheet(dataset, chosen_examples(found, arguments.examples), arguments)
    with atomic_write(arguments.out / "sheet.png") as temporary:
        sheet.save(temporary, "png")
    write_json(arguments.out / "survey.json", found.as_json())
    print(f"wrote {arguments.out / 'sheet.png'} and {arguments.out / 'survey.json'}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command; what it does not know goes to the data set's reader."""
    arguments, rest = tyro.cli(
        Arguments,
        args=None if argv is None else list(argv),
        prog="python -m samjax.data.show",
        description=__doc__,
        return_unknown_args=True,
    )
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        run(arguments, rest)
    except (DataError, ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
