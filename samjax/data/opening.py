"""A data set by name: its reader, the reader's own options, and slices where it has volumes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tyro

from samjax.data.datasets import READERS
from samjax.data.datasets.base import Pictures, Scans
from samjax.data.images import DataError
from samjax.data.intensity import Window
from samjax.data.slices import Crop, Slices, Take
from samjax.data.subsets import SegmentationDataset, without_bad

Reader = Callable[..., Pictures | Scans]


@dataclass(frozen=True, kw_only=True)
class SliceOptions:
    """How volumes become slices; see `samjax.data.Slices`."""

    take: Take = "all"
    """Volumes: which slices of each."""
    every: int = 1
    """Volumes: only every so-many-th of these slices."""
    count: int = 1
    """Volumes: how many, for --take random."""
    take_seed: int = 0
    """Volumes: of --take random."""
    axis: Literal[0, 1, 2] | None = None
    """Volumes: voxel axis across the slices; None for the data set's."""
    modality: str = "each"
    """Volumes: the name of one, or of three with commas, which become red, green and blue."""
    rows: Literal["first", "second"] = "second"
    """Volumes: which of the two axes beside --axis runs down the picture."""
    crop: Crop | None = None
    """Volumes: first, end, first, end voxel of these two axes."""
    window: tuple[float, float] | None = None
    """Volumes: the values that become black and white; None for the data set's rule."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions(SliceOptions):
    """Which data set, and how its volumes become slices."""

    dataset: str
    """Name of its reader, as in samjax.data.datasets.READERS."""
    source: Path
    """The folder as its owners publish it."""
    split: str = "train"
    """The part of it."""
    skip_bad: Path | None = None
    """Leave out examples that cannot be used, and list them in this file. They are an error
    otherwise."""


_OWN = {field.name for field in dataclasses.fields(SourceOptions)}
_OF_VOLUMES = {field.name: field.default for field in dataclasses.fields(SliceOptions)}


def open_source(options: SourceOptions, reader_args: Sequence[str] = ()) -> SegmentationDataset:
    """Opens a data set, and looks whether all its files are there.

    With ``skip_bad`` it decodes every example instead. A case whose labels choose the slices
    (any ``take`` but "all") must be readable all the same.

    Args:
        reader_args: of the command line, for the reader; see `reader_options`.

    Returns:
        What the reader returns where that is `Pictures`; `Slices` of `Scans`; with ``skip_bad`` a
        `Subset` of either.

    Raises:
        DataError: no such folder, another tree, missing files.
        ValueError: an unknown name or option; options of volumes for a data set of pictures.
    """
    reader = find_reader(options.dataset)
    chosen = reader_options(options.dataset, reader_args)
    if not options.source.exists():
        raise DataError(f"{options.source}: no such folder; expected the {options.dataset} set")
    found = reader(options.source, options.split, **chosen)
    if not isinstance(found, Scans) and (wrong := _for_volumes(options)):
        raise ValueError(f"{wrong}: for volumes only, and {options.dataset} has pictures")
    if options.skip_bad is None:
        found.check()
    dataset = _sliced(found, options) if isinstance(found, Scans) else found
    return dataset if options.skip_bad is None else without_bad(dataset, options.skip_bad)


def find_reader(name: str) -> Reader:
    """The reader of a data set; ``ValueError`` with the known names if there is none."""
    if name not in READERS:
        raise ValueError(f"data set {name!r}: expected one of {', '.join(sorted(READERS))}")
    return READERS[name]


def reader_options(name: str, args: Sequence[str]) -> dict[str, Any]:
    """The keyword arguments of a reader from a command line, defaults included.

    Argument `drawn_by` is the option `--drawn-by`; an argument with a name that `SourceOptions`
    uses, such as `modality`, is `--reader-modality`.

    Raises:
        ValueError: an option that the reader does not have, with those that it has.
        SystemExit: a value that the option cannot have; tyro prints why.
    """
    parameters = {
        f"reader_{parameter.name}" if parameter.name in _OWN else parameter.name: parameter
        for parameter in inspect.signature(find_reader(name), eval_str=True).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    fields = [
        (
            option,
            parameter.annotation,
            dataclasses.field(
                default=dataclasses.MISSING
                if parameter.default is inspect.Parameter.empty
                else parameter.default
            ),
        )
        for option, parameter in parameters.items()
    ]
    options = dataclasses.make_dataclass(name, fields, frozen=True, kw_only=True)
    parsed, unknown = tyro.cli(options, args=list(args), prog=name, return_unknown_args=True)
    if unknown:
        known = "".join(f"\n  {_described(option, p)}" for option, p in parameters.items())
        raise ValueError(
            f"{' '.join(unknown)}: unknown; the options of {name} are{known or ' none'}"
        )
    return {parameter.name: getattr(parsed, option) for option, parameter in parameters.items()}


def settings_of(options: SourceOptions, reader_args: Sequence[str] = ()) -> dict[str, Any]:
    """All that decides about the examples, JSON-able; not where the files lie."""
    chosen = {name: getattr(options, name) for name in sorted(_OF_VOLUMES)}
    own = reader_options(options.dataset, reader_args)
    return {"reader": _plain(own), "slices": _plain(chosen)}


def names_of(dataset: SegmentationDataset) -> tuple[str, ...] | None:
    """Name of each example, without reading any; None where the data set does not know."""
    return getattr(dataset, "names", None)


def class_names_of(dataset: SegmentationDataset) -> tuple[str, ...] | None:
    """Label i + 1 is the i-th of these; None where the data set does not know."""
    return getattr(dataset, "class_names", None)


def _for_volumes(options: SourceOptions) -> str:
    """The options of volumes that were given."""
    given = [name for name, default in _OF_VOLUMES.items() if getattr(options, name) != default]
    return ", ".join(f"--{name.replace('_', '-')}" for name in given)


def _sliced(scans: Scans, options: SourceOptions) -> Slices:
    return Slices(
        scans,
        take=options.take,
        every=options.every,
        count=options.count,
        seed=options.take_seed,
        axis=options.axis,
        modality=options.modality,
        intensity=None if options.window is None else Window(*options.window),
        crop=options.crop,
        rows=options.rows,
    )


def _described(option: str, parameter: inspect.Parameter) -> str:
    kind = parameter.annotation
    choices = f" {'|'.join(map(str, get_args(kind)))}" if get_origin(kind) is Literal else ""
    required = parameter.default is inspect.Parameter.empty
    default = "required" if required else f"default: {parameter.default}"
    return f"--{option.replace('_', '-')}{choices} ({default})"


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON would give it back."""

    def plain(value: Any) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [plain(item) for item in value]
        return value if value is None or isinstance(value, bool | int | float | str) else str(value)

    return {name: plain(value) for name, value in options.items()}
