import math

import numpy as np
import pytest

from samjax.metrics import Case, auc, confusion, score_case, score_cases, score_image
from samjax.metrics import surface_distances as distances_of
from samjax.metrics.cases import SHARES, why_undefined

DISTANCES = ("hd", "hd95", "hd95_pooled", "assd", "masd")
EVERYTHING = ("dice", "iou", "nsd", "sensitivity", "specificity", *DISTANCES)


def volume(rng, classes=3, shape=(5, 14, 11)):
    """Blocks of labels, and a noisy copy of them."""
    blocks = rng.integers(0, classes + 1, [-(-n // 3) for n in shape])
    truth = np.kron(blocks, np.ones((3, 3, 3), int))[tuple(map(slice, shape))]
    noise = rng.random(shape) < 0.2
    return np.where(noise, rng.integers(0, classes + 1, shape), truth), truth


def values(prediction, truth, **options):
    (score,) = score_case(prediction, truth, **options)
    return score.values


def test_each_class_is_scored_as_a_mask_of_its_own(rng):
    prediction, truth = volume(rng)
    spacing, tolerances = (2.0, 0.5, 0.8), (0.6, 1.0, 2.5)
    probabilities = rng.random((*truth.shape, 3)).round(2)
    scores = score_case(
        prediction.astype(np.uint8),
        truth.astype(np.int16),
        num_classes=3,
        spacing=spacing,
        metrics=(*EVERYTHING, "hd80", "auc"),
        tolerance_mm=tolerances,
        probabilities=probabilities,
        case="a",
        patient="p",
    )
    overlap = score_image(prediction, truth, 3)
    for label, score in enumerate(scores, 1):
        assert (score.case, score.patient, score.label) == ("a", "p", label)
        assert score.present == "both"
        pair = prediction == label, truth == label
        found, counts = distances_of(*pair, spacing), confusion(*pair)
        assert score.values == {
            "dice": overlap.dice[label - 1],
            "iou": overlap.iou[label - 1],
            "nsd": found.surface_dice(tolerances[label - 1]),
            "sensitivity": counts.sensitivity,
            "specificity": counts.specificity,
            "hd": found.hausdorff(100),
            "hd95": found.hausdorff(95),
            "hd95_pooled": found.hausdorff(95, pooled=True),
            "assd": found.average(),
            "masd": found.average(pooled=False),
            "hd80": found.hausdorff(80),
            "auc": auc(probabilities[..., label - 1], pair[1]),
        }


def test_the_counts_against_medpy(pairs):
    binary = pytest.importorskip("medpy.metric.binary")
    checked = 0
    for prediction, truth, _ in pairs:
        counts = confusion(prediction, truth)
        assert sum(counts) == truth.size
        for name, other in {"dice": "dc", "iou": "jc"}.items() | {(n, n) for n in SHARES[:2]}:
            ours = getattr(counts, name)
            if not math.isnan(ours):
                assert ours == pytest.approx(getattr(binary, other)(prediction, truth), rel=1e-12)
                checked += 1
    assert checked > 700


def test_an_image_and_a_bool_mask(rng):
    prediction, truth = rng.random((2, 9, 12)) < 0.4
    assert values(prediction, truth) == values(prediction.astype(int), truth.astype(np.uint16))
    assert list(values(prediction, truth)) == ["dice", "iou", "hd95", "assd"]
    expected = distances_of(prediction, truth, (2, 3)).hausdorff()
    assert values(prediction, truth, spacing=(2, 3))["hd95"] == expected


NAN = math.nan
RULES = {  # (what is there, rule): overlap, distance
    ("truth", "undefined"): (0, NAN),
    ("truth", "worst"): (0, 50),
    ("truth", "perfect"): (0, 50),
    ("neither", "undefined"): (NAN, NAN),
    ("neither", "worst"): (NAN, NAN),
    ("neither", "perfect"): (1, 0),
}


@pytest.mark.parametrize(("there", "empty"), RULES)
def test_the_rule_for_empty_regions(there, empty):
    """The diagonal of 10 × 30 pixels of 3 mm and 4/3 mm is 50 mm."""
    nothing, some = np.zeros((2, 10, 30), bool)
    some[2:5, 3:7] = there == "truth"
    options = {"metrics": EVERYTHING, "spacing": (3, 4 / 3), "tolerance_mm": 1, "empty": empty}
    overlap, distance = RULES[there, empty]
    expected = dict.fromkeys(("dice", "iou", "nsd"), overlap) | dict.fromkeys(DISTANCES, distance)
    missed, alarm = values(nothing, some, **options), values(some, nothing, **options)
    for found in (missed, alarm):
        for metric, value in expected.items():
            assert found[metric] == pytest.approx(value, nan_ok=True), metric
    assert missed["sensitivity"] == pytest.approx(0 if there == "truth" else NAN, nan_ok=True)
    assert missed["specificity"] == 1
    assert math.isnan(alarm["sensitivity"])
    assert alarm["specificity"] == (1 - 12 / 300 if there == "truth" else 1)
    (score,) = score_case(nothing, some)
    assert score.present == there
    (score,) = score_case(some, nothing)
    assert score.present == {"truth": "prediction", "neither": "neither"}[there]


def test_a_truth_without_background():
    full = np.ones((4, 5), bool)
    options = {"metrics": ("auc", "specificity"), "probabilities": np.zeros((4, 5))}
    for prediction in (full, ~full):
        found = values(prediction, full, **options)
        assert all(math.isnan(value) for value in found.values())
    assert why_undefined("auc", "both") == why_undefined("specificity", "truth") == "no background"
    assert why_undefined("auc", "prediction") == why_undefined("sensitivity", "neither")
    assert why_undefined("hd95", "truth") == "no prediction"
    assert why_undefined("assd", "prediction") == "no truth"
    assert why_undefined("dice", "neither") == "both empty"


def with_empty_classes(rng):
    """Volumes in which each of both, truth only, prediction only and neither comes about."""
    for missing in ((), (1,), (2,), (3,), (1, 2), (2, 3)):
        prediction, truth = volume(rng)
        prediction[np.isin(prediction, missing)] = 0
        truth[np.isin(truth, [4 - label for label in missing])] = 0
        yield prediction, truth


def test_samed_against_its_released_function(rng):
    """Restated: binary masks, two branches, and zeros for all else; means as its test script's."""
    binary = pytest.importorskip("medpy.metric.binary")

    def released(prediction, truth):
        if prediction.sum() > 0 and truth.sum() > 0:
            return binary.dc(prediction, truth), binary.hd95(prediction, truth)
        return (1, 0) if prediction.sum() > 0 and truth.sum() == 0 else (0, 0)

    present = set()
    for prediction, truth in with_empty_classes(rng):
        for score in score_case(prediction, truth, num_classes=3, convention="samed"):
            expected = released(prediction == score.label, truth == score.label)
            assert list(score.values) == ["dice", "hd95"]
            np.testing.assert_allclose([*score.values.values()], expected, rtol=1e-12)
            present.add(score.present)
    assert present == {"both", "truth", "prediction", "neither"}


def test_sam2lora_against_its_released_function(rng):
    """Restated: zeros for 0/0, the diagonal when medpy raises, AUC by scikit-learn."""
    binary = pytest.importorskip("medpy.metric.binary")
    metrics = pytest.importorskip("sklearn.metrics")

    def released(probabilities, truth):
        prediction = probabilities > 0.5
        both, either = (prediction & truth).sum(), (prediction | truth).sum()
        total = prediction.sum() + truth.sum()
        wrong = (prediction & ~truth).sum()
        try:
            hd95 = binary.hd95(prediction, truth)
        except RuntimeError:
            hd95 = math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)
        return {
            "dice": 2 * both / total if total else 0,
            "iou": both / either if either else 0,
            "auc": metrics.roc_auc_score(truth.ravel(), probabilities.ravel())
            if 0 < truth.sum() < truth.size
            else NAN,
            "hd95": hd95,
            "sensitivity": both / truth.sum() if truth.any() else 0,
            "specificity": 1 - wrong / (~truth).sum() if (~truth).any() else 0,
        }

    shape = (12, 17)
    for threshold in (0.1, 0.6, 1.0, -1.0):  # the last two: no truth, no background
        for scale in (1.0, 0.4):  # the second predicts nothing
            probabilities = (scale * rng.random(shape)).round(2)
            truth = rng.random(shape) > threshold
            found = values(
                probabilities > 0.5, truth, convention="sam2lora", probabilities=probabilities
            )
            expected = released(probabilities, truth)
            assert list(found) == list(expected)
            np.testing.assert_allclose(
                [*found.values()], [*expected.values()], rtol=1e-9, equal_nan=True
            )


def test_many_cases(rng):
    pairs = [volume(rng) for _ in range(3)]
    spacings = [(1, 1, 1), (2, 1, 1), None]
    cases = (
        Case(f"case {i}", *pair, spacing, patient=f"p{i}")
        for i, (pair, spacing) in enumerate(zip(pairs, spacings, strict=True))
    )
    scores = score_cases(cases, num_classes=3, metrics=("hd95",))
    assert [(s.case, s.patient, s.label) for s in scores] == [
        (f"case {i}", f"p{i}", label) for i in range(3) for label in (1, 2, 3)
    ]
    alone = score_case(*pairs[1], num_classes=3, metrics=("hd95",), spacing=spacings[1])
    assert [s.values for s in scores[3:6]] == [s.values for s in alone]
    with pytest.raises(ValueError, match="'a' comes twice"):
        score_cases([Case("a", *pairs[0])] * 2, num_classes=3)
    with pytest.raises(ValueError, match=r"case 'a': truth has values \[2, 3\]"):
        score_cases([Case("a", 0 * pairs[0][0], pairs[0][1])], num_classes=1)


LABELS = np.array([[0, 1], [2, 0]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": np.zeros((2, 3), int)}, r"prediction has shape \(2, 3\)"),
        ({"prediction": LABELS[:0], "truth": LABELS[:0]}, "at least one pixel"),
        ({"prediction": 5 * LABELS}, r"prediction has values \[5, 10\]"),
        ({"prediction": LABELS / 2}, "prediction is float64"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"spacing": (1, 1, 1)}, "spacing is .* for 2 dimensions"),
        ({"spacing": (1, 0)}, "expected positive sizes"),
        ({"metrics": ("dice", "hd101")}, "unknown metric 'hd101'"),
        ({"metrics": ("F1",)}, "unknown metric 'F1': 'standard' has dice, iou"),
        ({"metrics": "dice"}, "expected one or more names"),
        ({"metrics": ("dice", "dice")}, "once each"),
        ({"metrics": ()}, "one or more names"),
        ({"metrics": ("nsd",)}, "nsd needs tolerance_mm"),
        ({"metrics": ("nsd",), "tolerance_mm": (1, 2, 3)}, "3 values for 2 classes"),
        ({"metrics": ("nsd",), "tolerance_mm": -1}, "tolerance is -1"),
        ({"metrics": ("auc",)}, "auc needs probabilities"),
        ({"metrics": ("auc",), "probabilities": np.zeros((2, 2))}, r"expected \(2, 2, 2\)"),
        ({"metrics": ("auc",), "probabilities": np.full((2, 2, 2), NAN)}, "4 of 4 .* are NaN"),
        ({"convention": "medpy"}, "convention is 'medpy'"),
        ({"empty": "zero"}, "empty is 'zero'"),
        ({"convention": "samed", "empty": "worst"}, "a rule of its own"),
        ({"convention": "samed", "spacing": (1, 1)}, "measures in voxels"),
        ({"convention": "samed", "metrics": ("assd",)}, "'samed' has dice, hd95"),
    ],
)
def test_bad_arguments(options, message):
    arguments = {"prediction": LABELS, "truth": LABELS, "num_classes": 2} | options
    with pytest.raises(ValueError, match=message):
        score_case(**arguments)
