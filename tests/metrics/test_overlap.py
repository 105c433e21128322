import json
import math

import numpy as np
import pytest

from samjax.metrics import Summary, mean_over_classes, score_image, summarise


def test_by_hand():
    truth = np.array([[1, 1, 0, 2], [1, 0, 0, 2]])
    prediction = np.array([[1, 1, 1, 0], [0, 0, 0, 2]])
    score = score_image(prediction, truth, 2)
    np.testing.assert_allclose(score.dice, [2 * 2 / (3 + 3), 2 * 1 / (1 + 2)])
    np.testing.assert_allclose(score.iou, [2 / 4, 1 / 2])
    assert score.dice.dtype == np.float64


def test_perfect_and_disjoint():
    mask = np.zeros((4, 6), bool)
    mask[:2] = True
    assert score_image(mask, mask) == (1.0, 1.0)
    assert score_image(mask, ~mask) == (0.0, 0.0)


def test_the_rule_for_empty_regions():
    empty, full = np.zeros((3, 5), np.uint8), np.ones((3, 5), np.uint8)
    assert score_image(full, empty) == (0.0, 0.0)
    assert score_image(empty, full) == (0.0, 0.0)
    both = score_image(empty, empty)
    assert np.isnan(both.dice).all()
    assert np.isnan(both.iou).all()


def test_label_maps_of_one_class_may_be_bool_or_integer(rng):
    a, b = rng.integers(0, 2, (2, 6, 7))
    expected = score_image(a.astype(bool), b.astype(bool))
    for kind in (np.uint8, np.int32, np.int64):
        np.testing.assert_array_equal(score_image(a.astype(kind), b.astype(kind)), expected)


def test_against_medpy(rng):
    binary = pytest.importorskip("medpy.metric.binary")
    for classes in (1, 3):
        prediction, truth = rng.integers(0, classes + 1, (2, 31, 17))
        score = score_image(prediction, truth, classes)
        for c in range(1, classes + 1):
            np.testing.assert_allclose(score.dice[c - 1], binary.dc(prediction == c, truth == c))
            np.testing.assert_allclose(score.iou[c - 1], binary.jc(prediction == c, truth == c))


def test_against_monai(rng):
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    classes = 3
    predictions, truths = rng.integers(0, classes + 1, (2, 5, 13, 19))
    truths[0][truths[0] == 2] = 0  # a false alarm
    for maps in (predictions, truths):
        maps[1][maps[1] == 3] = 0  # nothing there, nothing found
    scores = [score_image(p, t, classes) for p, t in zip(predictions, truths, strict=True)]
    one_hot = [
        torch.nn.functional.one_hot(torch.tensor(maps), classes + 1).movedim(-1, 1)
        for maps in (predictions, truths)
    ]
    pairs = {"dice": metrics.compute_dice, "iou": metrics.compute_iou}
    for name, theirs in pairs.items():
        ours = np.stack([getattr(score, name) for score in scores])
        expected = theirs(*one_hot, include_background=False).numpy()
        absent = np.zeros_like(expected, bool)
        absent[0, 1] = absent[1, 2] = True
        np.testing.assert_allclose(ours[~absent], expected[~absent], rtol=1e-6)
        assert np.isnan(expected[absent]).all(), "the docstring says where MONAI differs"
        assert ours[0, 1] == 0
        assert np.isnan(ours[1, 2])


def test_the_summary_counts_what_it_leaves_out():
    scores = [np.array([0.5, np.nan]), np.array([1.0, np.nan]), np.array([np.nan, np.nan])]
    first, second = summarise(scores)
    assert first == Summary(mean=0.75, std=0.25, n=2, n_undefined=1)
    assert math.isnan(second.mean)
    assert math.isnan(second.std)
    assert (second.n, second.n_undefined) == (0, 3)


def test_the_mean_over_classes():
    assert mean_over_classes(summarise([np.array([0.5, 1.0]), np.array([0.7, np.nan])])) == 0.8
    assert mean_over_classes(summarise([np.array([0.5, np.nan])])) == 0.5
    assert math.isnan(mean_over_classes(summarise([np.array([np.nan])])))


def test_the_summary_is_valid_json():
    first, second = summarise([np.array([0.5, np.nan])])
    text = json.dumps([first.as_json(), second.as_json()], allow_nan=False)
    assert json.loads(text) == [
        {"mean": 0.5, "std": 0.0, "n": 1, "n_undefined": 0},
        {"mean": None, "std": None, "n": 0, "n_undefined": 1},
    ]


@pytest.mark.parametrize(
    ("prediction", "truth", "classes", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), 1, r"shape \(2, 3\), truth \(3, 2\)"),
        (np.full((2, 2), 255), np.zeros((2, 2), int), 1, r"prediction has values \[255\]"),
        (np.zeros((2, 2), int), np.array([[0, -1], [4, 1]]), 3, r"truth has values \[-1, 4\]"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), 1, "prediction is float64"),
        (np.zeros((2, 2), int), np.zeros((2, 2), int), 0, "num_classes is 0"),
    ],
)
def test_bad_label_maps_are_named(prediction, truth, classes, message):
    with pytest.raises(ValueError, match=message):
        score_image(prediction, truth, classes)


def test_a_summary_of_nothing_or_of_mixed_lengths_is_refused():
    with pytest.raises(ValueError, match="no scores"):
        summarise([])
    with pytest.raises(ValueError, match="expected one shape"):
        summarise([np.zeros(1), np.zeros(2)])
