"""Your own pictures with instances in a COCO json, as annotation tools export them.

The format: Lin et al., ECCV 2014, https://cocodataset.org/#format-data. Polygons and both kinds of
run lengths are drawn by pycocotools, COCO's own code: `pip install 'samjax[coco]'`.

Instances become one label map: of those that overlap, the one with fewer pixels lies on top.
Crowd regions (`iscrowd`) are pixels of their class too; they lie below all instances. The
annotations stay in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from samjax.data.datasets.base import Case, Pictures, wrong_tree
from samjax.data.images import DataError

TREE = """
    annotations/instances_train.json       or annotations/train.json, or instances_train2017.json
    train/NAME.jpg …                       named like the json after "instances_"; or in images/
"""
_SHOWN = 8  # files in an error


class _Region(NamedTuple):
    """An annotation of a picture."""

    number: int
    label: int
    crowd: bool
    drawn: Any  # polygons, or run lengths


class _Drawing(NamedTuple):
    """What the json says of a picture."""

    size: tuple[int, int]  # (h, w)
    regions: tuple[_Region, ...]


def coco(
    root: str | Path,
    split: str = "train",
    *,
    categories: Sequence[str] | None = None,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
) -> Pictures:
    """Reads pictures and the instances of a COCO json. Pictures without any are all background.

    Args:
        root: see ``TREE``.
        split: which json.
        categories: names; the first is label 1, and so on, and all others are background. None
            for all, in order of their ids.
        annotations: the json, relative to root, where it lies elsewhere.
        images: the folder of the pictures, relative to root, where it lies elsewhere.

    Raises:
        DataError: another tree, a json without the keys of COCO, ids that point nowhere, image
            files that are missing; at an example, a picture of another size than the json says
            (as it is after its EXIF rotation), polygons or run lengths that are damaged.
        ValueError: a category that the json does not have.
        ImportError: at an example, pycocotools is not installed.
    """
    root = Path(root)
    file = _json_file(root, split, annotations)
    described = _described(file)
    of_category, class_names = _labels(described["categories"], categories, file)
    folder = _folder(root, file, images)
    drawings: dict[str, _Drawing] = {}
    cases = []
    regions = _regions(described, of_category, file)
    for image in described["images"]:
        name = str(Path(image["file_name"]).with_suffix("")).replace("/", "_")
        path = folder / image["file_name"]
        own = tuple(regions[image["id"]])
        drawings[name] = _Drawing((int(image["height"]), int(image["width"])), own)
        cases.append(Case(name, (path,), (file,) if own else ()))
    missing = [str(case.images[0]) for case in cases if not case.images[0].is_file()]
    if missing:
        more = ", …" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{file}: {len(missing)} image files are missing: {', '.join(missing[:_SHOWN])}{more}"
        )
    return Pictures(
        dataset="coco",
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=class_names,
        read_label=partial(_paint, drawings=drawings),
    )


def _json_file(root: Path, split: str, given: str | Path | None) -> Path:
    if given is not None:
        if not (root / given).is_file():
            raise wrong_tree(root, str(given), TREE)
        return root / given
    folder = root / "annotations"
    names = (f"instances_{split}.json", f"{split}.json", f"instances_{split}20[0-9][0-9].json")
    found = sorted({file for name in names for file in folder.glob(name)})
    if len(found) > 1:
        raise DataError(
            f"{folder}: {', '.join(file.name for file in found)}; name one with annotations="
        )
    if not found:
        raise wrong_tree(root, f"annotations/{names[0]}", TREE)
    return found[0]


def _folder(root: Path, file: Path, given: str | Path | None) -> Path:
    names = (file.stem.removeprefix("instances_"), "images") if given is None else (given,)
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise wrong_tree(root, f"{names[0]}/", TREE)


def _described(file: Path) -> dict[str, Any]:
    try:
        described = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not a JSON file ({error})") from error
    wanted = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "segmentation"),
        "categories": ("id", "name"),
    }
    if not isinstance(described, dict):
        raise DataError(f"{file}: expected an object with the keys {', '.join(wanted)}")
    for key, fields in wanted.items():
        if not isinstance(described.get(key), list):
            raise DataError(f"{file}: no list {key!r}; expected {', '.join(wanted)}")
        ids = set()
        for entry in described[key]:
            lacking = [field for field in fields if field not in entry]
            if lacking:
                number = entry.get("id", "without an id")
                raise DataError(f"{file}: {key}: {number} lacks {', '.join(lacking)}")
            if entry["id"] in ids:
                raise DataError(f"{file}: {key}: the id {entry['id']} is there twice")
            ids.add(entry["id"])
    return described


def _labels(
    categories: list[dict[str, Any]], chosen: Sequence[str] | None, file: Path
) -> tuple[dict[int, int], tuple[str, ...]]:
    """Category id to label (0 where it is not chosen), and the names of the labels 1, 2 …"""
    ordered = sorted(categories, key=lambda category: category["id"])
    names = tuple(str(category["name"]) for category in ordered)
    if len(set(names)) < len(names):
        raise DataError(f"{file}: two categories have one name ({', '.join(sorted(names))})")
    class_names = names if chosen is None else tuple(chosen)
    unknown = [name for name in class_names if name not in names]
    if unknown or len(set(class_names)) < len(class_names):
        raise ValueError(f"categories {', '.join(class_names)}: expected of {', '.join(names)}")
    if not 1 <= len(class_names) <= 255:
        raise DataError(f"{file}: {len(class_names)} categories; expected 1 to 255 (categories=)")
    label_of = {name: label for label, name in enumerate(class_names, start=1)}
    return {c["id"]: label_of.get(str(c["name"]), 0) for c in ordered}, class_names


def _regions(
    described: dict[str, Any], of_category: dict[int, int], file: Path
) -> dict[int, list[_Region]]:
    """Those of each image that have a label."""
    regions: dict[int, list[_Region]] = {image["id"]: [] for image in described["images"]}
    for entry in described["annotations"]:
        where = f"{file}: annotation {entry['id']}"
        if entry["image_id"] not in regions:
            raise DataError(f"{where}: there is no image {entry['image_id']}")
        if entry["category_id"] not in of_category:
            raise DataError(f"{where}: there is no category {entry['category_id']}")
        if not entry["segmentation"]:
            raise DataError(f"{where}: its segmentation is empty; expected more than a box")
        if label := of_category[entry["category_id"]]:
            crowd = bool(entry.get("iscrowd", 0))
            region = _Region(entry["id"], label, crowd, entry["segmentation"])
            regions[entry["image_id"]].append(region)
    return regions


def _paint(case: Case, size: tuple[int, int], *, drawings: Mapping[str, _Drawing]) -> np.ndarray:
    (file,) = case.labels
    drawing = drawings[case.name]
    if drawing.size != size:
        (h, w), (height, width) = drawing.size, size
        raise DataError(
            f"{file}: {case.images[0]} is {width}x{height} pixels (width x height, turned as its "
            f"EXIF orientation says), but the json says {w}x{h}; expected the same size"
        )
    masks = [
        (region, _drawn(region, size, f"{file}: annotation {region.number}"))
        for region in drawing.regions
    ]
    masks.sort(key=lambda pair: (not pair[0].crowd, -int(pair[1].sum())))
    labels = np.zeros(size, np.uint8)
    for region, mask in masks:
        labels[mask] = region.label
    return labels


def _drawn(region: _Region, size: tuple[int, int], where: str) -> np.ndarray:
    """The pixels of an annotation, bool (h, w)."""
    try:
        from pycocotools import mask as masks
    except ImportError as error:
        raise ImportError("COCO needs pycocotools: pip install 'samjax[coco]'") from error
    drawn, (height, width) = region.drawn, size
    if isinstance(drawn, list):
        for polygon in drawn:
            # With four numbers pycocotools would take it for a box.
            if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                raise DataError(f"{where}: a polygon needs x and y of three or more points")
    elif not isinstance(drawn, dict) or not {"size", "counts"} <= set(drawn):
        raise DataError(f"{where}: expected polygons, or run lengths with size and counts")
    elif list(drawn["size"]) != [height, width]:
        raise DataError(f"{where}: run lengths of {drawn['size']} (h, w) for {[height, width]}")
    else:
        counts = drawn["counts"]
        runs = _unpacked(counts) if isinstance(counts, str) else counts
        if not isinstance(runs, list) or sum(runs) != height * width or min(runs) < 0:
            total = sum(runs) if isinstance(runs, list) else "no"
            raise DataError(f"{where}: run lengths of {total} pixels; expected {height * width}")
    try:
        packed: Any = drawn
        if isinstance(drawn, list) or isinstance(drawn["counts"], list):
            packed = masks.frPyObjects(packed, height, width)
        return masks.decode(masks.merge(packed) if isinstance(packed, list) else packed) > 0
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{where}: not a region that pycocotools reads ({error})") from error


def _unpacked(text: str) -> list[int]:
    """The run lengths in COCO's packed text, as `rleFrString` in pycocotools' maskApi.c reads it.

    Only to add them up: pycocotools draws a text that is cut short without a word.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
