"""A slice in several modalities as one example: its pictures together, one mask, one prompt.

SAM takes one picture.  SAMSEG (Chikumbu, University of Cape Town, 2024) gives it the modalities of
a slice one after the other with the same box, and joins the answers.  ``SETS`` are the data,
``load`` makes batches, ``OfModalities`` trains on them and reads the answers.  With one modality
all is as usual.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.objectives import Objective, valid_pixels
from experiments.scoring import Prediction, Score
from experiments.sets import labelled_msd
from samjax.data import DataError, Loader, SegmentationDataset, Slices, Subset, make_loader, split
from samjax.data.datasets import READERS
from samjax.data.datasets.base import Scans
from samjax.data.layouts import volumes
from samjax.data.pipeline import Batch
from samjax.data.slices import Crop
from samjax.frame import size_in_frame
from samjax.metrics import CaseScore
from samjax.models.mask_decoder import MaskPrediction
from samjax.models.ops import resize_bilinear
from samjax.models.weights import Config
from samjax.training.losses import binary_cross_entropy
from samjax.training.region_losses import squared_dice

GRID, CROP = (240, 240), ((51, 189), (19, 221))  # SAMSEG's crop of BraTS, in voxels
CACHE = 16 * 2**30  # bytes of resized examples that a loader keeps, if they all go into it


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A data set with the patients to train on and those to validate on."""

    title: str  # in the tables
    train: Scans
    validation: Scans
    modalities: tuple[str, ...]
    rows: Literal["first", "second"]
    progress: bool
    notes: tuple[str, ...]
    grids: frozenset[tuple[int, int]]  # voxels of the slices, in the order of the axes

    @property
    def crop(self) -> Crop | None:
        """SAMSEG's, which is made for the grid of BraTS: other slices are taken whole."""
        return CROP if self.grids == {GRID} else None

    @property
    def slice_size(self) -> tuple[int, int] | None:
        """(h, w) of every slice; None where they differ."""
        if len(self.grids) > 1:
            return None
        (size,) = self.grids
        if self.crop is not None:
            (top, bottom), (left, right) = self.crop
            size = (bottom - top, right - left)
        return size if self.rows == "first" else (size[1], size[0])

    def slices(self, part: Literal["train", "validation"], **how: Any) -> Slices:
        """Slices in the first modality; ``how``: arguments of `Slices`, such as ``take``."""
        scans = self.train if part == "train" else self.validation
        return Slices(
            scans,
            modality=self.modalities[0],
            crop=self.crop,
            rows=self.rows,
            progress=self.progress,
            **how,
        )


@dataclass(frozen=True, kw_only=True)
class MrSet:
    """A data set of MR volumes with one class."""

    title: str
    write: Callable[..., None]  # phantoms in its layout
    sides: Callable[[Path, int], tuple[Scans, Scans]]
    rows: Literal["first", "second"]  # of `Slices`
    notes: tuple[str, ...] = ()

    def open(
        self, root: Path, modalities: Sequence[str], split_seed: int, progress: bool = True
    ) -> Opened:
        """Both sides, all files looked for; ``modalities`` empty for all.

        Raises ``DataError`` for another tree, with the expected, and for missing files;
        ``ValueError`` for an unknown modality.
        """
        train, validation = self.sides(root, split_seed)
        if unknown := [name for name in modalities if name not in train.modalities]:
            known = ", ".join(train.modalities)
            raise ValueError(f"--modalities {' '.join(unknown)}: expected some of {known}")
        grids: set[tuple[int, int]] = set()
        for side in (train, validation):
            side.check()
            grids |= {side.shape_of(index)[:2] for index in range(len(side))}
        opened = Opened(
            title=self.title,
            train=train,
            validation=validation,
            modalities=tuple(modalities) or train.modalities,
            rows=self.rows,
            progress=progress,
            notes=self.notes,
            grids=frozenset(grids),
        )
        if opened.crop is None:
            notes = (*self.notes, "slices are not cropped: they have not BraTS' 240×240 voxels")
            opened = dataclasses.replace(opened, notes=notes)
        return opened


def _brats_men(root: Path, seed: int) -> tuple[Scans, Scans]:
    train, validation = (
        READERS["brats_men"](root, part, seed=seed) for part in ("train", "validation")
    )
    assert isinstance(train, Scans)
    assert isinstance(validation, Scans)
    return train, validation


def _msd(root: Path, seed: int) -> tuple[Scans, Scans]:
    """A fifth of the patients for validation; all labels are one class."""
    scans = labelled_msd(root)
    values = dict.fromkeys(range(1, scans.num_classes + 1), 1)
    scans = dataclasses.replace(scans, values=values, class_names=("foreground",))
    away = set(split(Slices(scans, take="foreground", progress=False), 0.2, seed)[1].patients)
    cases = list(zip(scans.cases, scans.patients, strict=True))
    train, validation = (
        dataclasses.replace(
            scans, split=part, cases=tuple(case for case, who in cases if (who in away) == held)
        )
        for part, held in (("train", False), ("validation", True))
    )
    return train, validation


_SAME = "the step is chosen by Dice on the cases that are scored: there are no others with labels"
SETS = {
    "brats_men": MrSet(
        title="BraTS-MEN 2023",
        write=volumes.write_brats_men,
        sides=_brats_men,
        rows="first",
        notes=(_SAME,),
    ),
    "msd": MrSet(
        title="MSD hippocampus",
        write=volumes.write_msd,
        sides=_msd,
        rows="second",
        notes=(_SAME, "another data set than the thesis's, in one modality"),
    ),
}


@dataclass(frozen=True)
class JointLoader(Loader):
    """As ``Loader``, but ``image`` is uint8 (b, m, h, w, 3)."""

    loaders: tuple[Loader, ...] = ()  # of each modality

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches; raises ``DataError`` if the modalities come in different orders."""
        for batches in zip(*self.loaders, strict=True):
            first = batches[0]
            if any(not np.array_equal(first["index"], batch["index"]) for batch in batches):
                raise DataError(f"the modalities of {first['index']} are not of one slice")
            yield {**first, "image": np.stack([batch["image"] for batch in batches], axis=1)}


def load(
    dataset: SegmentationDataset, *, modalities: Sequence[str], **arguments: Any
) -> JointLoader:
    """A loader of slices in all of ``modalities``; ``arguments`` are ``make_loader``'s.

    ``dataset`` is `Slices` of one modality, or a subset of one.  Everything random is the same in
    all modalities, since it comes from seed and number.  ``workers`` are for each of them.
    Resized examples are kept in memory only where all of them take no more than ``CACHE``.

    Raises ``ValueError`` for another data set or an unknown modality.
    """
    height, width = arguments["frame_size"]
    small = 4 * height * width * len(dataset) * len(modalities) <= CACHE
    loaders = tuple(
        make_loader(of_modality(dataset, name), **{"cache": small, **arguments})
        for name in modalities
    )
    first = loaders[0]
    return JointLoader(first.num_examples, first.num_batches, first._batches, loaders)


def of_modality(dataset: SegmentationDataset, name: str) -> SegmentationDataset:
    """The same slices in another modality; see ``load`` for errors."""
    if isinstance(dataset, Subset):
        return Subset(of_modality(dataset.dataset, name), dataset.indices)
    if not isinstance(dataset, Slices):
        raise ValueError(f"{type(dataset).__name__} has no modalities; expected slices of volumes")
    known = dataset.scans.modalities
    if name not in known:
        raise ValueError(f"modality {name!r}: expected some of {', '.join(known)}")
    other = copy.copy(dataset)
    other.places = tuple(place._replace(modality=(known.index(name),)) for place in dataset.places)
    return other


@dataclass(frozen=True, kw_only=True)
class OfModalities(Objective):
    """One binary mask of all modalities of a slice, by SAM's single-mask token.

    The loss is Dice with squared denominators + binary cross-entropy, 1:1 for a ``dice_weight`` of
    one half: MONAI's ``DiceCELoss(sigmoid=True, squared_pred=True)``, of each example.
    """

    loss_on: Literal["aggregate", "each"] = "aggregate"
    """The loss of the mean of the logits, or the mean of each modality's loss, as released."""
    slice_size: tuple[int, int] | None = None
    """(h, w) of every slice in its file: the loss is taken there, as released; None: in the frame's
    valid part."""

    def encode(self, module: Any, batch: dict) -> Any:
        """Features (b, m, …) of images (b, m, h, w, 3)."""
        images = batch["image"]
        count, several = images.shape[:2]
        sizes = jnp.repeat(batch["size"], several, axis=0)
        features = module.encode_image(images.reshape(-1, *images.shape[2:]), sizes)
        return _grouped(features, count, several)

    def answer(
        self, module: Any, features: Any, batch: dict, key: jax.Array | None
    ) -> MaskPrediction:
        """The model's prediction of each modality, every array (b, m, …)."""
        del key
        count, several = jax.tree.leaves(features)[0].shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), features)
        prompts = (jnp.repeat(batch[name], several, axis=0) for name in ("coords", "labels"))
        return _grouped(module.answer(flat, *prompts), count, several)

    def logits(self, config: Config, prediction: MaskPrediction, *, train: bool) -> jax.Array:
        """``(b, h, w, 2)``: the modalities' mean, and their maximum, the union of their masks."""
        logits = resize_bilinear(prediction.low_res_logits[:, :, 0], config.image_size)  # b m h w
        return jnp.stack([logits.mean(1), logits.max(1)], axis=-1)

    def main(self, logits: np.ndarray) -> np.ndarray:
        """The mean."""
        return logits[..., 0]

    def loss(self, config: Config, prediction: MaskPrediction, batch: dict) -> jax.Array:
        """Of each example, ``(b,)``."""
        low = prediction.low_res_logits[:, :, 0]
        if self.loss_on == "aggregate":
            low = low.mean(1, keepdims=True)
        logits = resize_bilinear(low, config.image_size)
        mask, valid = batch["mask"], valid_pixels(config, batch["size"])
        if self.slice_size is not None:
            size = size_in_frame(self.slice_size, config.image_size, config.fit)
            logits = resize_bilinear(logits[..., : size[0], : size[1]], self.slice_size)
            rows, columns = (
                ((np.arange(old) + 0.5) * (new / old)).astype(np.int32)
                for old, new in zip(self.slice_size, size, strict=True)
            )
            mask, valid = mask[:, rows][:, :, columns], None
        share = self.dice_weight

        def of_one(logits: jax.Array) -> jax.Array:
            entropy = binary_cross_entropy(logits, mask, valid)
            return 2 * ((1 - share) * entropy + share * squared_dice(logits, mask, valid))

        return jax.vmap(of_one, in_axes=1)(logits).mean(0)


def of_reading(score: Score, reading: int) -> Score:
    """A way of scoring for the mean (0) or the maximum (1) of ``OfModalities.logits``."""

    def scored(
        predictions: Iterable[Prediction], dataset: SegmentationDataset, objective: Objective
    ) -> list[CaseScore]:
        chosen = ((index, logits[..., reading], truth) for index, logits, truth in predictions)
        return score(chosen, dataset, objective)

    return scored


def _grouped(tree: Any, count: int, several: int) -> Any:
    """Arrays (b m, …) as (b, m, …)."""
    return jax.tree.map(lambda x: x.reshape(count, several, *x.shape[1:]), tree)
