"""Your own data in the raw layout of nnU-Net v2: volumes, or pictures.

Isensee et al., Nature Methods 2021; documentation/dataset_format.md of MIC-DKFZ/nnUNet.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from samjax.data.datasets.base import Case, Pictures, Scans, one_of, wrong_tree
from samjax.data.images import DataError, read_image, read_mask
from samjax.data.intensity import Intensity, Percentiles, Window

TREE = """
    dataset.json                                     channel_names, labels, numTraining, file_ending
    imagesTr/CASE_0000.nii.gz, CASE_0001.nii.gz …    a file a channel
    labelsTr/CASE.nii.gz
    imagesTs/…, labelsTs/…                           for the split "test"; labelsTs may be missing
"""
_VOLUMES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
_PICTURES = (".png", ".bmp", ".tif", ".tiff")
_SHOWN = 8  # files in an error


def nnunet(
    root: str | Path, split: str = "train", *, intensity: Intensity | None = None
) -> Pictures | Scans:
    """Reads a data set of nnU-Net v2.

    Files with another ending than `file_ending` are not looked at, as in nnU-Net. Pictures have
    one channel, three (red, green, blue) in three files, or an RGB file.

    Args:
        root: see ``TREE``.
        split: "train" (imagesTr) or "test" (imagesTs).
        intensity: of volumes, units to grey values; None for -125 to 275 Hounsfield units where
            all channels have the name CT, else for percentiles.

    Raises:
        DataError: another tree; a dataset.json that lacks a key, or whose labels are regions,
            have a label "ignore" or do not count 0, 1, 2 …; images without labels, labels without
            images, channels that are missing; other than `numTraining` cases.
        ValueError: another split.
    """
    root = Path(root)
    one_of("split", split, ("train", "test"))
    file = root / "dataset.json"
    described = _described(root, file)
    channels, class_names = _channels(described, file), _classes(described, file)
    ending = str(described["file_ending"])
    pictures = ending.lower() in _PICTURES
    if not pictures and ending.lower() not in _VOLUMES:
        raise DataError(
            f"{file}: file_ending {ending!r}; expected one of {', '.join(_VOLUMES + _PICTURES)}"
        )
    cases = _cases(root, split, ending, channels, pictures)
    if split == "train" and described["numTraining"] != len(cases):
        raise DataError(
            f"{file}: numTraining is {described['numTraining']}, but imagesTr and labelsTr have "
            f"{len(cases)} cases"
        )
    if pictures:
        return Pictures(
            dataset="nnunet",
            root=root,
            split=split,
            cases=cases,
            class_names=class_names,
            read_label=partial(_labels, classes=tuple(range(1, len(class_names) + 1))),
            read_picture=_three_files if len(cases[0].images) == 3 else read_image,
        )
    is_ct = all(name.upper() == "CT" for name in channels)
    return Scans(
        dataset="nnunet",
        root=root,
        split=split,
        cases=cases,
        class_names=class_names,
        modalities=channels,
        intensity=intensity or (Window(-125, 275) if is_ct else Percentiles()),
        axis=None,
    )


def _described(root: Path, file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise wrong_tree(root, file.name, TREE)
    try:
        described = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not a JSON file ({error})") from error
    if not isinstance(described, dict):
        raise DataError(f"{file}: a {type(described).__name__}; expected an object with keys")
    wanted = ("channel_names", "labels", "numTraining", "file_ending")
    lacking = [key for key in wanted if key not in described]
    if lacking:
        old = "modality" in described
        hint = " (this is the format of nnU-Net v1 and the Decathlon)" if old else ""
        raise DataError(f"{file}: no key {', '.join(lacking)}{hint}; expected those of nnU-Net v2")
    if "dataset" in described:
        raise DataError(
            f"{file}: lists its files under the key 'dataset', which is not read; expected the "
            "files in imagesTr and labelsTr"
        )
    return described


def _channels(described: dict[str, Any], file: Path) -> tuple[str, ...]:
    names = described["channel_names"]
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(len(names))}:
        raise DataError(f"{file}: channel_names {names}; expected names for 0, 1, 2 …")
    return tuple(str(names[str(i)]) for i in range(len(names)))


def _classes(described: dict[str, Any], file: Path) -> tuple[str, ...]:
    """The names of the labels 1, 2 …"""
    labels = described["labels"]
    if not isinstance(labels, dict):
        raise DataError(f"{file}: labels {labels}; expected names with their numbers")
    regions = [name for name, value in labels.items() if isinstance(value, list)]
    if regions:
        raise DataError(
            f"{file}: the labels {', '.join(regions)} are regions, which overlap; expected one "
            "number a label"
        )
    if "ignore" in labels:
        raise DataError(
            f"{file}: has a label 'ignore', pixels that nobody labelled; expected every pixel to "
            "be background or a class"
        )
    of_value = {value: name for name, value in labels.items() if type(value) is int}
    if set(of_value) != set(range(len(labels))) or not 2 <= len(labels) <= 256:
        raise DataError(
            f"{file}: labels {labels}; expected the numbers 0 (background), 1, 2 … to at most 255"
        )
    return tuple(of_value[value] for value in range(1, len(labels)))


def _cases(
    root: Path, split: str, ending: str, channels: tuple[str, ...], pictures: bool
) -> tuple[Case, ...]:
    short = {"train": "Tr", "test": "Ts"}[split]
    images, labels = root / f"images{short}", root / f"labels{short}"
    found: dict[str, dict[int, Path]] = {}
    for name in sorted(_names(root, images, ending)):
        matched = re.fullmatch(r"(.+)_(\d{4})", name)
        if matched is None:
            raise DataError(f"{images / (name + ending)}: expected a name like CASE_0000{ending}")
        found.setdefault(matched[1], {})[int(matched[2])] = images / (name + ending)
    numbers = {0: set(range(len(channels)))}
    if pictures:
        if len(channels) not in (1, 3):
            raise DataError(f"{root}: pictures of {len(channels)} channels; expected 1 or 3")
        numbers[1] = {0}  # nnU-Net keeps the three channels of an RGB picture in one file
    fitting = [
        wanted for wanted in numbers.values() if all(set(f) == wanted for f in found.values())
    ]
    if not fitting:
        wanted = numbers[0]
        odd = [case for case, files in found.items() if set(files) != wanted]
        raise DataError(
            f"{images}: not the channels {', '.join(f'{i:04d}' for i in sorted(wanted))} of "
            f"{_some(odd)}; expected a file for each of {', '.join(channels)}"
        )
    labelled = not (split == "test" and not labels.is_dir())
    names = set(_names(root, labels, ending)) if labelled else set()
    if labelled and (odd := sorted(names ^ set(found))):
        raise DataError(
            f"{labels}: does not pair up with {images.name}: {_some(odd)} of one of them only"
        )
    return tuple(
        Case(
            case,
            tuple(found[case][i] for i in sorted(fitting[0])),
            (labels / (case + ending),) if labelled else (),
        )
        for case in sorted(found)
    )


def _names(root: Path, folder: Path, ending: str) -> list[str]:
    if not folder.is_dir():
        raise wrong_tree(root, folder.name, TREE)
    files = [f.name for f in folder.iterdir() if f.name.endswith(ending) and f.name[0] != "."]
    return [name.removesuffix(ending) for name in files]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", …" * (len(names) > _SHOWN)


def _labels(case: Case, size: tuple[int, int], *, classes: tuple[int, ...]) -> np.ndarray:
    return read_mask(case.labels[0], classes)


def _three_files(red: Path) -> np.ndarray:
    """The picture (h, w, 3) whose channels are CASE_0000, CASE_0001 and CASE_0002."""
    channels = []
    for number in range(3):
        file = red.with_name(re.sub(r"_0000(?=\.\w+$)", f"_{number:04d}", red.name))
        picture = read_image(file)
        if (picture != picture[..., :1]).any():
            raise DataError(f"{file}: is in colour; expected one of three grey channels")
        if channels and picture.shape[:2] != channels[0].shape:
            raise DataError(f"{file}: not the size of {red.name}")
        channels.append(picture[..., 0])
    return np.stack(channels, axis=-1)
