"""Medical Segmentation Decathlon: ten tasks in one layout, CT and MR.

Antonelli et al., Nature Communications 13, 2022 (arXiv:1902.09063), http://medicaldecathlon.com,
CC BY-SA 4.0. The labels of imagesTs are not published, and the labelled part has no official
split: `samjax.data.split` parts it by patient (a scan each). Other data sets in this layout are
read too; nnU-Net's own, with a file a channel, is for `nnunet`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from samjax.data.datasets.base import Case, Scans, find_files, one_of
from samjax.data.images import DataError
from samjax.data.intensity import Intensity, Percentiles, Window
from samjax.data.volumes import Volume, read_volume

TREE = """
    imagesTr/hippocampus_001.nii.gz …      labelled scans
    labelsTr/hippocampus_001.nii.gz …      their labels 0..k
    imagesTs/…                             scans without labels (for split="test" only)
    dataset.json                           names of classes and modalities (may be missing)
"""


def msd(
    root: str | Path,
    split: str = "train",
    *,
    class_names: Sequence[str] | None = None,
    modalities: Sequence[str] | None = None,
    intensity: Intensity | None = None,
) -> Scans:
    """Reads the folder of one task, such as Task04_Hippocampus.

    Files of macOS (`._hippocampus_001.nii.gz`) are no scans and are passed over.

    Args:
        root: see ``TREE``.
        split: "train" for all labelled scans, "test" for those of imagesTs, without labels.
        class_names: of the labels 1 to k; None for those of dataset.json.
        modalities: names of the volumes of a 4-D file (Task01: FLAIR, T1w, t1gd, T2w), or of the
            only one; None for those of dataset.json, or "image" where there is no such file.
        intensity: None for -125 to 275 Hounsfield units where dataset.json says CT, percentiles
            elsewhere.

    Raises:
        DataError: another tree; a broken dataset.json; none, and no ``class_names``.
        ValueError: another split.
    """
    root = Path(root)
    one_of("split", split, ("train", "test"))
    about = read_dataset_json(root)
    if class_names is None:
        if about is None:
            raise DataError(f"{root}: no dataset.json; expected it, or class_names to be given")
        class_names = _numbered(root, about, "labels")[1:]
    if modalities is None:
        modalities = ("image",) if about is None else _numbered(root, about, "modality")
    if intensity is None:
        is_ct = all(name.upper() == "CT" for name in modalities)
        intensity = Window(-125, 275) if is_ct else Percentiles()
    pattern = "imagesTr/*.nii.gz" if split == "train" else "imagesTs/*.nii.gz"
    cases = []
    for image in find_files(root, pattern, TREE):
        labels = (root / "labelsTr" / image.name,) if split == "train" else ()
        name = image.name.removesuffix(".nii.gz")
        cases.append(Case(name, (image,) * len(modalities), labels))
    return (Scans if len(modalities) == 1 else _FourD)(
        dataset="msd",
        root=root,
        split=split,
        cases=tuple(cases),
        class_names=tuple(class_names),
        modalities=tuple(modalities),
        intensity=intensity,
    )


class _FourD(Scans):
    """Scans whose modalities are the volumes of one file."""

    def volumes(self, index: int, modalities: Iterable[int]) -> tuple[Volume, ...]:
        return tuple(self.volume(index, modality) for modality in modalities)

    def volume(self, index: int, modality: int = 0) -> Volume:
        return read_volume(self._there(self.cases[index].images[modality]), volume=modality)


def read_dataset_json(root: Path) -> dict[str, Any] | None:
    """The dataset.json of a task; None where there is none, ``DataError`` where it is broken."""
    file = root / "dataset.json"
    if not file.exists():
        return None
    try:
        about = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not readable ({error})") from error
    if not isinstance(about, dict):
        raise DataError(f"{file}: a {type(about).__name__}; expected an object")
    return about


def _numbered(root: Path, about: dict[str, Any], key: str) -> tuple[str, ...]:
    """The names in {"0": name, "1": name, …}, in that order."""
    names = about.get(key)
    if not isinstance(names, dict) or set(names) != {str(n) for n in range(len(names))}:
        raise DataError(f'{root / "dataset.json"}: {key} is {names}; expected names by "0", "1", …')
    return tuple(str(names[str(n)]) for n in range(len(names)))
