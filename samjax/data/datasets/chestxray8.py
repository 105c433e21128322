"""ChestX-ray8: 112,120 frontal chest radiographs of 30,805 patients, with CheXmask's organs.

Images: Wang et al., CVPR 2017, NIH Clinical Center, https://nihcc.app.box.com/v/ChestXray-NIHCC.
Masks: Gaggion et al., CheXmask, Scientific Data 2024, CC BY 4.0,
https://physionet.org/content/chexmask-cxr-segmentation-data. They were not drawn by people but
predicted by HybridGNet, and come with an estimate of their quality, "Dice RCA (Mean)"; PhysioNet's
data dictionary recommends to use those of at least 0.7.

The split is NIH's own, by patient: `train_val_list.txt` (86,524 images) and `test_list.txt`
(25,596). `Data_Entry_2017.csv` is not read: a patient is the first eight digits of a file name.

A mask is text in the CSV, pairs "start length": pixels are counted row by row, and the first one
is number 1 (`get_mask_from_RLE` in DataPostprocessing/utils.py of ngaggion/CheXmask-Database). The
CSV has 2.2 GB, so only the places of its rows are kept in memory: making the data set reads the
file once, an example reads its own row.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from samjax.data.datasets.base import Case, Pictures, one_of, wrong_tree
from samjax.data.images import DataError, check_sizes

TREE = """
    images_001/images/00000001_000.png … images_012/images/…     (or all of them in images/)
    train_val_list.txt, test_list.txt                            NIH's split, a file name a line
    ChestX-Ray8.csv                                              CheXmask's (or in
                                                                 OriginalResolution/)
"""
_ORGANS = ("left lung", "right lung", "heart")  # a later one lies over an earlier one
_COLUMNS = ("Left Lung", "Right Lung", "Heart")
_QUALITY = "Dice RCA (Mean)"
_NAMES = ("Image Index", "Image ID")  # the first in the file, the second in its documentation
_LISTS = {"train": ("train_val_list.txt",), "test": ("test_list.txt",)}
_SHOWN = 5  # names in an error


class _Place(NamedTuple):
    """Where a row of the CSV lies, in bytes."""

    offset: int
    length: int


def chestxray8(
    root: str | Path,
    split: str = "train",
    *,
    min_quality: float = 0.7,
    masks: str | Path | None = None,
    partial_copy: bool = False,
) -> Pictures:
    """Reads ChestX-ray8 with CheXmask's lungs and heart.

    Args:
        root: see ``TREE``.
        split: "train" (train_val_list.txt), "test" or "all".
        min_quality: images whose "Dice RCA (Mean)" is below it, or no number, are left out; 0 to 1.
        masks: CheXmask's CSV, where it lies elsewhere.
        partial_copy: take the listed images that are there, instead of insisting on all.

    Raises:
        DataError: another tree, a listed image that is missing or has no row in the CSV; at an
            example, RLE that is no pairs of numbers or reaches beyond the picture.
        ValueError: an argument that is not among those above.
    """
    root = Path(root)
    one_of("split", split, ("train", "test", "all"))
    if not 0 <= min_quality <= 1:
        raise ValueError(f"min_quality {min_quality}: expected between 0 and 1")
    table = _table(root, masks)
    files = {file.name: file for file in root.glob("images*/**/*.png")}
    if not files:
        raise wrong_tree(root, "images*/**/*.png", TREE)
    lists = sum(_LISTS.values(), ()) if split == "all" else _LISTS[split]
    listed = [name for file in lists for name in _listed(root, file)]
    if partial_copy:
        listed = [name for name in listed if name in files]
    _must_be_there(root, "have no file", [name for name in listed if name not in files])
    rows = _index(table)
    _must_be_there(table, "have no row", [name for name in listed if name not in rows])
    chosen = [name for name in listed if rows[name][0] >= min_quality]
    cases = tuple(Case(n[:-4], (files[n],), (table,), patient=n[:8]) for n in chosen)
    places = {name[:-4]: rows[name][1] for name in chosen}
    return Pictures(
        dataset="chestxray8",
        root=root,
        split=split,
        cases=cases,
        class_names=_ORGANS,
        read_label=partial(_organs, places=places),
    )


def _table(root: Path, masks: str | Path | None) -> Path:
    folders = (root, root / "OriginalResolution")
    tables = [folder / "ChestX-Ray8.csv" for folder in folders] if masks is None else [Path(masks)]
    for table in tables:
        if table.is_file():
            return table
    raise wrong_tree(root, str(tables[0].name if masks is None else masks), TREE)


def _listed(root: Path, name: str) -> list[str]:
    file = root / name
    if not file.is_file():
        raise wrong_tree(root, name, TREE)
    names = file.read_text("utf-8").split()
    strange = [name for name in names if not re.fullmatch(r"\d{8}_\d{3}\.png", name)]
    if strange:
        raise DataError(f"{file}: {strange[0]!r} is no name like 00000001_000.png")
    return names


def _must_be_there(where: Path, complaint: str, names: list[str]) -> None:
    if names:
        more = ", …" if len(names) > _SHOWN else ""
        raise DataError(
            f"{where}: {len(names)} listed images {complaint}: {', '.join(names[:_SHOWN])}{more} "
            "(partial_copy=True takes the images that are there)"
        )


def _index(table: Path) -> dict[str, tuple[float, _Place]]:
    """Image to its quality and the place of its row."""
    records = _records(table)
    header = _header(next(records, (0, 0, b""))[2], table)
    name_at = next(header.index(name) for name in _NAMES if name in header)
    quality_at = header.index(_QUALITY)
    needed = max(name_at, quality_at) + 1
    found: dict[str, tuple[float, _Place]] = {}
    for line, offset, record in records:
        # The rest of a row is long. A plain comma parts the first fields where none is quoted.
        fields = [str(f, "utf-8", "replace") for f in record.split(b",", needed)[:needed]]
        if any('"' in field for field in fields):
            fields = _fields(record, table, line)
        try:
            name, quality = fields[name_at], float(fields[quality_at].strip() or "nan")
        except (ValueError, IndexError) as error:
            raise DataError(f"{table}, line {line}: {_QUALITY} is no number") from error
        if name in found:
            raise DataError(f"{table}, line {line}: a second row of {name}")
        found[name] = quality, _Place(offset, len(record))
    return found


def _records(table: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line, offset in bytes, bytes) of each record.

    As RFC 4180 has it: a line break between two double quotes does not end a record.
    """
    with table.open("rb") as file:
        offset, first, parts, quotes = 0, 1, [], 0
        for number, line in enumerate(file, start=1):
            parts.append(line)
            quotes += line.count(b'"')
            if quotes % 2 == 0:
                record = b"".join(parts)
                if record.strip():
                    yield first, offset, record
                offset += len(record)
                first, parts, quotes = number + 1, [], 0
        if parts:
            raise DataError(f"{table}, line {first}: a quote that does not end")


def _header(record: bytes, table: Path) -> list[str]:
    header = _fields(record.removeprefix(b"\xef\xbb\xbf"), table, 1)
    wanted = (_QUALITY, *_COLUMNS, "Height", "Width")
    lacking = [name for name in wanted if name not in header]
    if not any(name in header for name in _NAMES):
        lacking.insert(0, " or ".join(_NAMES))
    if lacking:
        raise DataError(
            f"{table}: no column {', '.join(lacking)}; found {', '.join(header[:12])}; expected "
            "the columns of CheXmask"
        )
    return header


def _fields(record: bytes, table: Path, line: int) -> list[str]:
    try:
        (fields,) = csv.reader([record.decode("utf-8")], strict=True)
    except (csv.Error, ValueError) as error:
        raise DataError(f"{table}, line {line}: not a row of a CSV ({error})") from error
    return fields


def _organs(case: Case, size: tuple[int, int], *, places: Mapping[str, _Place]) -> np.ndarray:
    """The label map of a case, uint8 (h, w) of the size that the CSV says."""
    (table,) = case.labels
    row = _row(table, case.name, places[case.name])
    where = f"{table}, {case.name}.png"
    try:
        height, width = int(float(row["Height"])), int(float(row["Width"]))
    except ValueError as error:
        raise DataError(f"{where}: Height and Width are no whole numbers") from error
    check_sizes(case.images[0], size, where, (height, width))
    labels = np.zeros(height * width, np.uint8)
    for label, column in enumerate(_COLUMNS, start=1):
        for start, end in _runs(row[column], labels.size, f"{where}, column {column}"):
            labels[start:end] = label
    return labels.reshape(height, width)


def _row(table: Path, name: str, place: _Place) -> dict[str, str]:
    if not table.is_file():
        raise DataError(f"{table}: no such file; expected by the chestxray8 data set")
    header = _header(next(_records(table))[2], table)
    with table.open("rb") as file:
        file.seek(place.offset)
        record = file.read(place.length)
    changed = f"{table}: the row of {name}.png is not where it was; the file has changed"
    try:
        (fields,) = csv.reader([record.decode("utf-8")], strict=True)
    except (csv.Error, ValueError) as error:
        raise DataError(changed) from error
    row = dict(zip(header, fields, strict=False))
    if len(fields) != len(header) or f"{name}.png" not in fields:
        raise DataError(changed)
    return row


def _runs(rle: str, pixels: int, where: str) -> list[tuple[int, int]]:
    """(start, end) of the runs, counted from 0."""
    try:
        numbers = [int(word) for word in rle.split()]
    except ValueError as error:
        raise DataError(f"{where}: {str(error)[-40:]}; expected pairs 'start length'") from error
    if len(numbers) % 2:
        raise DataError(f"{where}: {len(numbers)} numbers; expected pairs 'start length'")
    runs = [
        (start - 1, start - 1 + length)
        for start, length in zip(numbers[::2], numbers[1::2], strict=True)
    ]
    for start, end in runs:
        if start < 0 or end <= start or end > pixels:
            raise DataError(
                f"{where}: a run of {end - start} from pixel {start + 1} is not within the "
                f"picture's {pixels} pixels (counted from 1)"
            )
    return runs
