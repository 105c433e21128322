"""Predicted logits to records, by picture and by volume."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from experiments.objectives import LabelMap, SingleMask
from experiments.scoring import (
    probabilities,
    score_as_sam2lora,
    score_as_samed,
    score_pictures,
    score_volumes,
)
from samjax.data import Slices, Subset
from samjax.data.datasets import READERS
from samjax.data.layouts.volumes import write_brats_men, write_msd
from samjax.metrics import score_case


class Pictures:
    """Two pictures whose frame is half their size."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.masks = rng.integers(0, 2, (2, 16, 24), dtype=np.uint8)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        mask = self.masks[index]
        return {"image": np.stack([mask] * 3, -1), "mask": mask, "name": f"eye{index}"}


def predicted(dataset, size, channels=None, seed=0):
    rng = np.random.default_rng(seed)
    shape = size if channels is None else (*size, channels)
    for index in reversed(range(len(dataset))):
        truth = rng.integers(0, 2, size, dtype=np.uint8)
        yield index, rng.normal(size=shape).astype(np.float32), truth


def test_pictures_are_scored_at_their_own_size():
    found = score_pictures(predicted(Pictures(), (8, 12)), Pictures(), SingleMask())
    assert [score.case for score in found] == ["eye1", "eye0"]
    assert all(0 < score.values["dice"] < 1 for score in found)


def test_sam2lora_scores_probabilities_in_the_frame():
    made = list(predicted(Pictures(), (8, 12)))
    found = score_as_sam2lora(iter(made), Pictures(), SingleMask())
    for score, (_, logits, truth) in zip(found, made, strict=True):
        hit = ((logits > 0) & (truth > 0)).sum()
        assert score.values["dice"] == pytest.approx(2 * hit / ((logits > 0).sum() + truth.sum()))
        expected = roc_auc_score(truth.ravel(), logits.ravel())
        assert score.values["auc"] == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match="auc is measured in the frame"):
        score_pictures(iter(made), Pictures(), SingleMask(), metrics=("auc",))


def test_probabilities_of_one_mask_and_of_classes():
    logits = np.array([[-800.0, 0.0, 800.0]], np.float32)
    np.testing.assert_allclose(probabilities(logits), [[0, 0.5, 1]])
    two = np.log(np.array([[[1.0, 2.0, 5.0]]], np.float32))
    np.testing.assert_allclose(probabilities(two), [[[0.25, 0.625]]], rtol=1e-6)


def test_slices_become_volumes_again(tmp_path):
    write_msd(tmp_path)
    slices = Slices(READERS["msd"](tmp_path, "train"))
    some = Subset(slices, [i for i, place in enumerate(slices.places) if place.slice != 2])
    frame = slices[0]["mask"].shape
    made = list(predicted(some, frame, channels=3))
    objective = LabelMap(num_classes=2)
    found = score_volumes(iter(made), some, objective)
    assert [score.case for score in found[::2]] == [case.name for case in slices.scans.cases]
    labels = {index: logits.argmax(-1) for index, logits, _ in made}
    for case, name in enumerate(slices.scans.names):
        own = [i for i, at in enumerate(some.indices) if slices.places[at].case == case]
        stack = np.stack([labels[i] for i in own]).astype(np.uint8)
        truth = np.stack([some[i]["mask"] for i in own])
        expected = score_case(stack, truth, num_classes=2, spacing=slices.spacing_of(case))
        assert [s.values for s in found if s.case == name] == [s.values for s in expected]
    samed = score_as_samed(iter(made), some, objective)
    assert set(samed[0].values) == {"dice", "hd95"}
    with pytest.raises(ValueError, match="Pictures has no slices"):
        score_volumes(iter(made), Pictures(), objective)


def test_each_modality_is_a_volume_of_its_own(tmp_path):
    write_brats_men(tmp_path)
    slices = Slices(READERS["brats_men"](tmp_path, "validation"))
    made = predicted(slices, slices[0]["mask"].shape)
    found = score_volumes(made, slices, SingleMask(), metrics=("dice",))
    cases = len(slices.scans)
    assert len(found) == 4 * cases
    assert len({score.case for score in found}) == 4 * cases
    assert len({score.patient for score in found}) == len(set(slices.scans.patients))


@pytest.mark.parametrize(("rows", "axis"), [("first", 2), ("second", 2), ("second", 0)])
def test_spacing_follows_the_picture(tmp_path, rows, axis):
    import SimpleITK as sitk

    write_msd(tmp_path, cases=(1, 3))
    for folder in ("imagesTr", "labelsTr"):
        for file in (tmp_path / folder).glob("*.nii.gz"):
            image = sitk.ReadImage(str(file))
            image.SetSpacing((0.5, 0.7, 3.0))
            sitk.WriteImage(image, str(file))
    slices = Slices(READERS["msd"](tmp_path, "train"), rows=rows, axis=axis)
    expected = {
        ("first", 2): (3.0, 0.5, 0.7),
        ("second", 2): (3.0, 0.7, 0.5),
        ("second", 0): (0.5, 3.0, 0.7),
    }[rows, axis]
    assert slices.spacing_of(0) == pytest.approx(expected)
