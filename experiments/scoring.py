"""Scores of predicted logits: per picture, in the frame or at its own size, and per volume.

A way of scoring is a function ``(predictions, dataset, objective) -> records``; ``predictions`` are
those of ``segmentation.Evaluator.predictions``, in any order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from experiments.objectives import Objective
from experiments.segmentation import labels_at, to_labels
from samjax.data import SegmentationDataset, Slices, Subset
from samjax.data.slices import Place
from samjax.data.subsets import patients_of
from samjax.metrics import CaseScore, score_case

Prediction = tuple[int, np.ndarray, np.ndarray]  # index, logits, truth: in the frame, unpadded
Score = Callable[[Iterable[Prediction], SegmentationDataset, Objective], list[CaseScore]]


def score_pictures(
    predictions: Iterable[Prediction],
    dataset: SegmentationDataset,
    objective: Objective,
    *,
    at: Literal["original", "frame"] = "original",
    **options: Any,
) -> list[CaseScore]:
    """One record a picture and class.

    At the picture's ``original`` size, or in the model's ``frame`` as SAM2LoRA does; there also by
    "auc", where the metrics name it or the convention has it, of the masks' probabilities.
    ``options`` go to ``samjax.metrics.score_case``.
    """
    with_auc = "auc" in (options.get("metrics") or ()) or (
        options.get("convention") == "sam2lora" and options.get("metrics") is None
    )
    if with_auc and at != "frame":
        raise ValueError("auc is measured in the frame: the logits are there")
    patients = patients_of(dataset)
    scores = []
    for index, logits, truth in predictions:
        example = dataset[index]
        labels = to_labels(logits)
        if at == "original":
            truth = example["mask"]
            labels = labels_at(logits, truth.shape)
        scores += score_case(
            labels,
            truth,
            num_classes=objective.num_classes,
            probabilities=probabilities(logits) if with_auc else None,
            case=example["name"],
            patient=patients[index],
            **options,
        )
    return scores


def score_volumes(
    predictions: Iterable[Prediction],
    dataset: SegmentationDataset,
    objective: Objective,
    **options: Any,
) -> list[CaseScore]:
    """One record a volume and class, of its slices put together again.

    Slices that the data set leaves out are left out of the volume as well.  Distances are in mm,
    where the convention of ``options`` (see ``samjax.metrics.score_case``) knows a spacing.

    Raises ``ValueError`` if the data set has no slices of volumes.
    """
    slices, places = _places(dataset)
    patients = patients_of(dataset)
    volumes: dict[Any, dict[int, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)
    patient_of = {}
    for index, logits, _ in predictions:
        place, truth = places[index], dataset[index]["mask"]
        case = (place.case, place.modality)
        volumes[case][place.slice] = (labels_at(logits, truth.shape), truth)
        patient_of[case] = patients[index]
    several = len({modality for _, modality in volumes}) > 1
    scores = []
    for (case, modality), by_slice in sorted(volumes.items()):
        predicted, truth = (
            np.stack(maps)
            for maps in zip(*(by_slice[number] for number in sorted(by_slice)), strict=True)
        )
        spacing = None
        if options.get("convention", "standard") == "standard":
            spacing = slices.spacing_of(case)
        name = slices.scans.cases[case].name
        scores += score_case(
            predicted,
            truth,
            num_classes=objective.num_classes,
            spacing=spacing,
            case=f"{name}_{modality[0]}" if several else name,
            patient=patient_of[case, modality],
            **options,
        )
    return scores


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Of the classes beside the background: ``(h, w)`` of one mask, or ``(h, w, k)``."""
    if logits.ndim == 2:
        return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))  # the sigmoid, without overflow
    powers = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    return (powers / powers.sum(-1, keepdims=True))[..., 1:]


def _places(dataset: SegmentationDataset) -> tuple[Slices, Sequence[Place]]:
    if isinstance(dataset, Subset):
        slices, places = _places(dataset.dataset)
        return slices, [places[index] for index in dataset.indices]
    if not isinstance(dataset, Slices):
        raise ValueError(f"{type(dataset).__name__} has no slices of volumes to put together")
    return dataset, dataset.places


# SAMed's, H-SAM's, SAMora's and MedSAGa's code; and the same volumes without its allowances.
score_as_samed = partial(score_volumes, convention="samed")
score_as_sam2lora = partial(score_pictures, at="frame", convention="sam2lora")
