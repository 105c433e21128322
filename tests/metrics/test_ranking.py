import math

import numpy as np
import pytest

from samjax.metrics import auc


def test_by_hand():
    truth = np.array([True, True, False, False])
    assert auc(np.array([0.9, 0.8, 0.2, 0.1]), truth) == 1
    assert auc(np.array([0.1, 0.2, 0.8, 0.9]), truth) == 0
    assert auc(np.array([0.9, 0.4, 0.4, 0.1]), truth) == 3.5 / 4
    assert auc(np.full(4, 0.5), truth) == 0.5


@pytest.mark.parametrize("decimals", [1, 2, 16])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_against_scikit_learn(rng, decimals, kind):
    """Rounded probabilities have ties, a few or hundreds of them."""
    metrics = pytest.importorskip("sklearn.metrics")
    for share in (0.002, 0.1, 0.9):
        truth = rng.random((37, 41)) < share
        truth.flat[0] = True
        values = np.clip(rng.normal(0.4, 0.2, truth.shape) + 0.1 * truth, 0, 1)
        values = values.round(decimals).astype(kind)
        expected = metrics.roc_auc_score(truth.ravel(), values.ravel())
        assert auc(values, truth) == pytest.approx(expected, rel=1e-9)


def test_only_the_order_counts(rng):
    truth = rng.random((9, 11)) < 0.3
    logits = rng.normal(size=truth.shape)
    assert auc(logits, truth) == auc(1 / (1 + np.exp(-logits)), truth)
    assert auc(np.where(truth, np.inf, -np.inf), truth) == 1


@pytest.mark.parametrize("kind", [False, True])
def test_a_truth_of_one_kind_has_nothing_to_rank(kind):
    assert math.isnan(auc(np.zeros((2, 3)), np.full((2, 3), kind)))


@pytest.mark.parametrize(
    ("probabilities", "truth", "message"),
    [
        (np.array([0.5, math.nan]), np.array([True, False]), "1 of 2 probabilities are NaN"),
        (np.zeros((2, 3)), np.zeros((3, 2), bool), r"shape \(2, 3\), truth \(3, 2\)"),
        (np.zeros(2, int), np.zeros(2, bool), "probabilities are int64"),
        (np.zeros(2), np.zeros(2, int), "truth is int64"),
    ],
)
def test_bad_input(probabilities, truth, message):
    with pytest.raises(ValueError, match=message):
        auc(probabilities, truth)
