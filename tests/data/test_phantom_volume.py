"""Phantom scans: exact labels, seeded, of any shape."""

import numpy as np
import pytest

from samjax.data.phantom_volume import ORGANS, phantom_ct, phantom_mr

ALL = {name: label for label, name in enumerate(ORGANS, start=1)}


@pytest.mark.parametrize("seed", range(5))
def test_ct_has_air_fat_bone_and_every_organ(seed):
    scan, labels = phantom_ct((24, 20, 8), ALL, seed=seed)
    assert (scan.dtype, scan.shape, labels.dtype) == (np.int16, (24, 20, 8), np.uint8)
    assert set(np.unique(labels)) == {0, *ALL.values()}
    corner = scan[:2, :2]
    assert abs(corner.mean() + 1000) < 10
    assert scan.max() > 500
    for name, label in ALL.items():
        values = scan[labels == label]
        assert abs(values.mean() - ORGANS[name].hounsfield) < 5 * 12 / len(values) ** 0.5


def test_mr_parts_are_nested_on_a_background_of_zero():
    signals, labels = phantom_mr((30, 28, 10), 3, (2, 4, 1), seed=1)
    assert (signals.dtype, signals.shape) == (np.int16, (3, 30, 28, 10))
    brain = signals[0] > 0
    assert 0.2 < brain.mean() < 0.8
    for signal in signals:
        np.testing.assert_array_equal(signal > 0, brain)
    assert brain[labels > 0].all()
    extents = [np.ptp(np.argwhere(np.isin(labels, ids)), axis=0) for ids in ([1, 4, 2], [1, 4], 1)]
    assert (extents[0] > extents[1]).all()
    assert (extents[1] >= extents[2]).all()


def test_seeds_decide():
    one, again, other = (phantom_ct((9, 8, 3), {"liver": 1}, seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    one, again, other = (phantom_mr((9, 8, 3), seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 1), (5, 1, 7)])
def test_any_shape(shape):
    assert phantom_ct(shape, {"liver": 1})[0].shape == shape
    signals, labels = phantom_mr(shape, 2, (1, 2))
    assert signals.shape == (2, *shape)
    assert labels.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: phantom_ct((4, 4, 4), {"heart": 1}), "organs .*heart.*: expected labels 1 to 255"),
        (lambda: phantom_ct((4, 4, 4), {"liver": 256}), "expected labels 1 to 255"),
        (lambda: phantom_ct((4, 4, 0), {"liver": 1}), "three lengths of at least 1"),
        (lambda: phantom_mr((4, 4, 4), 0), "modalities 0"),
        (lambda: phantom_mr((4, 4, 4), 1, ()), r"nested \(\): expected at least one"),
        (lambda: phantom_mr((4, 4), 1), "three lengths"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
