"""Your own data by a table: a CSV with a row for each picture or volume.

Columns: `image` (a path, relative to the table's folder), and where you like `mask`, `patient`,
`split` and `name`. Commas part the fields, UTF-8.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from samjax.data.datasets.base import Case, Pictures, Scans, wrong_tree
from samjax.data.datasets.image_folder import names_of, read_classes
from samjax.data.folder import IMAGE_SUFFIXES
from samjax.data.images import DataError
from samjax.data.intensity import Intensity, Percentiles

TREE = """
    table.csv              image,mask,patient,split,name
                           images/a.png,masks/a.png,p1,train,a
                           images/b.png,,p2,test,b             (an empty mask: not labelled)
    images/a.png …         paths are relative to the table; pictures, or volumes (.nii.gz, .nrrd,
                           .mha, folders of DICOM files), not both
"""
_COLUMNS = ("image", "mask", "patient", "split", "name")
_VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")


class _Row(NamedTuple):
    line: int
    split: str
    case: Case
    is_volume: bool


def csv_table(
    root: str | Path,
    split: str = "train",
    *,
    classes: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    intensity: Intensity | None = None,
) -> Pictures | Scans:
    """Reads the pictures or volumes of a table.

    Args:
        root: the table, or a folder with one .csv.
        split: rows with this word in the column `split`; "all" takes every row. A table without
            that column is all "train".
        classes: the values of the classes in the masks, as in `FolderDataset`. None for binary
            masks: 0 and 1, in pictures also 0 and 255.
        class_names: of the labels 1, 2 …; None for "foreground", or for "class 38" and the like.
        intensity: of volumes, units to grey values; None for percentiles.

    Raises:
        DataError: with table, line and column: no or an unknown column, a row of another length,
            an empty path, a file that is missing or of another format, pictures and volumes
            mixed, a patient in two splits, a name twice.
        ValueError: `classes` are not different whole numbers from 1 to 65535; other than one name
            a class.
    """
    if classes is not None and (len(set(classes)) < len(classes) or not _usable(classes)):
        raise ValueError(f"classes {list(classes)}: expected different whole numbers above 0")
    table = _table(Path(root))
    rows = _rows(table)
    _check_kinds(rows, table)
    _check_patients(rows, table)
    _check_names(rows, table)
    cases = tuple(row.case for row in rows if split in ("all", row.split))
    if not cases:
        splits = ", ".join(sorted({row.split for row in rows}))
        raise DataError(f"{table}: no row of the split {split!r}; found {splits or 'no rows'}")
    names = names_of(classes, class_names)
    values = None if classes is None else tuple(classes)
    if not rows[0].is_volume:
        return Pictures(
            dataset="csv",
            root=table.parent,
            split=split,
            cases=cases,
            class_names=names,
            read_label=partial(read_classes, classes=values),
        )
    return Scans(
        dataset="csv",
        root=table.parent,
        split=split,
        cases=cases,
        class_names=names,
        values={value: label for label, value in enumerate(values or (1,), start=1)},
        intensity=intensity or Percentiles(),
        axis=None,
    )


def _usable(classes: Sequence[int]) -> bool:
    return 1 <= len(classes) <= 255 and all(1 <= value <= 65535 for value in classes)


def _table(root: Path) -> Path:
    if root.is_file():
        return root
    tables = sorted(root.glob("*.csv"))
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise DataError(f"{root}: {len(tables)} tables ({names}); name the one to read")
    if not tables:
        raise wrong_tree(root, "table (.csv)", TREE)
    return tables[0]


def _rows(table: Path) -> list[_Row]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, fields) for fields in reader if any(fields)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{table}: not a CSV in UTF-8 ({error})") from error
    if not lines:
        raise DataError(f"{table}: empty; expected the columns {', '.join(_COLUMNS)}")
    (_, header), *lines = lines
    unknown = [name for name in header if name not in _COLUMNS]
    if unknown or "image" not in header or len(set(header)) < len(header):
        what = f"unknown column {unknown[0]!r}" if unknown else f"columns {', '.join(header)}"
        raise DataError(
            f"{table}, line 1: {what}; expected image and, where you like, "
            f"{', '.join(_COLUMNS[1:])}"
        )
    return [_row(table, line, header, fields) for line, fields in lines]


def _row(table: Path, line: int, header: list[str], fields: list[str]) -> _Row:
    if len(fields) != len(header):
        raise DataError(f"{table}, line {line}: {len(fields)} fields; expected {len(header)}")
    row = dict(zip(header, (field.strip() for field in fields), strict=True))
    for column in ("patient", "split"):
        if row.get(column) == "":
            raise DataError(f"{table}, line {line}, column {column}: is empty")
    image = _path(table, line, "image", row["image"])
    is_volume = _is_volume(table, line, "image", image)
    labels = ()
    if row.get("mask"):
        mask = _path(table, line, "mask", row["mask"])
        if _is_volume(table, line, "mask", mask) != is_volume:
            raise DataError(
                f"{table}, line {line}: one of {image.name} and {mask.name} is a volume"
            )
        labels = (mask,)
    name = row.get("name") or _stem(image)
    case = Case(name, (image,), labels, patient=row.get("patient", ""))
    return _Row(line, row.get("split", "train"), case, is_volume)


def _path(table: Path, line: int, column: str, text: str) -> Path:
    path = table.parent / text
    if not text or not path.exists():
        what = f"{path}: no such file" if text else "is empty"
        raise DataError(f"{table}, line {line}, column {column}: {what}")
    return path


def _is_volume(table: Path, line: int, column: str, path: Path) -> bool:
    if path.is_dir() or path.name.lower().endswith(_VOLUMES):
        return True
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return False
    known = ", ".join((*sorted(IMAGE_SUFFIXES), *_VOLUMES))
    raise DataError(f"{table}, line {line}, column {column}: {path.name}; expected {known}")


def _stem(path: Path) -> str:
    endings = sorted((*IMAGE_SUFFIXES, *_VOLUMES), key=len, reverse=True)  # .nii.gz before .gz
    ending = next((e for e in endings if path.name.lower().endswith(e)), "")
    return path.name[: len(path.name) - len(ending)]


def _check_kinds(rows: list[_Row], table: Path) -> None:
    lines = {row.is_volume: row.line for row in reversed(rows)}
    if len(lines) > 1:
        raise DataError(
            f"{table}: line {lines[False]} has a picture, line {lines[True]} a volume; expected "
            "one kind"
        )


def _check_patients(rows: list[_Row], table: Path) -> None:
    first: dict[str, _Row] = {}
    for row in rows:
        if row.case.patient:
            other = first.setdefault(row.case.patient, row)
            if other.split != row.split:
                raise DataError(
                    f"{table}: the patient {row.case.patient} is in the split {other.split} (line "
                    f"{other.line}) and in {row.split} (line {row.line}); expected one of them"
                )


def _check_names(rows: list[_Row], table: Path) -> None:
    first: dict[str, int] = {}
    for row in rows:
        other = first.setdefault(row.case.name, row.line)
        if other != row.line:
            raise DataError(
                f"{table}, line {row.line}: the name {row.case.name} is that of line {other}; "
                "expected different ones, or a column name"
            )
