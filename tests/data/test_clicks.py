"""Corrective clicks: pixel for pixel SAM 2's, and always on an error."""

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from convert.reference import import_sam2
from samjax.data.clicks import next_click


@pytest.fixture(scope="module")
def upstream():
    """`sam2.modeling.sam2_utils`, with a distance transform where OpenCV is not installed."""
    torch = pytest.importorskip("torch")
    if find_spec("sam2") is None:
        pytest.skip("sam2 is not installed")
    import_sam2()
    from sam2.modeling import sam2_utils

    def distances(region, *_):
        inside, outside = (torch.from_numpy(np.argwhere(region == v)).double() for v in (1, 0))
        found = np.zeros(region.shape, np.float32)
        if len(inside):
            exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
            found[region == 1] = torch.cdist(inside, outside, **exact).min(dim=1).values.numpy()
        return found

    with pytest.MonkeyPatch.context() as patch:
        if find_spec("cv2") is None:
            stand_in = SimpleNamespace(distanceTransform=distances, DIST_L2=2)
            patch.setitem(sys.modules, "cv2", stand_in)
        yield sam2_utils


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A truth and a prediction that overlap, run over the rim and have holes."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.normal(size=(3, 40, 53)), (0, 3, 3))
    return fields[0] + fields[1] > 0.02, fields[0] + fields[2] > 0.02


def asked(function, mask, prediction):
    import torch

    pair = (None if m is None else torch.from_numpy(m)[None, None] for m in (mask, prediction))
    points, labels = function(*pair)
    return points[0, 0].tolist(), int(labels[0, 0])


def answer(mask, prediction, rng, method):
    point, label = next_click(mask, prediction, rng, method)
    assert point.dtype == np.float32
    return point.tolist(), label


FULL, EMPTY = np.ones((6, 9), bool), np.zeros((6, 9), bool)
EDGES = [(FULL, EMPTY), (EMPTY, FULL), (FULL, FULL), (EMPTY, EMPTY), (FULL, None), (EMPTY, None)]


def test_the_centre_is_upstreams(upstream, rng):
    clicked = set()
    for mask, prediction in [blobs(seed) for seed in range(40)] + EDGES:
        expected = asked(upstream.sample_one_point_from_error_center, mask, prediction)
        assert answer(mask, prediction, rng, "center") == expected
        clicked.add(expected[1])
    assert clicked == {0, 1}
    for number in (1, 4, 9):  # ties: two squares of a size, one missed and one too much
        mask, prediction = np.zeros((2, 30, 30), bool)
        mask[2 : 2 + number, 2 : 2 + number] = True
        prediction[15 : 15 + number, 15 : 15 + number] = True
        expected = asked(upstream.sample_one_point_from_error_center, mask, prediction)
        assert answer(mask, prediction, rng, "center") == expected
        assert expected[1] == 0


def test_where_nothing_is_wrong_it_is_upstreams_fallback(upstream, rng):
    mask, _ = blobs(0)
    for _ in range(20):
        for point, label in (
            answer(mask, mask, rng, "uniform"),
            asked(upstream.sample_random_points_from_errors, mask, mask),
        ):
            assert label == 0
            assert not mask[int(point[1]), int(point[0])]
    expected = asked(upstream.sample_random_points_from_errors, FULL, FULL)
    assert expected == ([0, 0], 0)
    assert answer(FULL, FULL, rng, "uniform") == expected


shapes = st.shared(array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), key="shape")


@settings(deadline=None)
@given(
    mask=arrays(bool, shapes),
    prediction=arrays(bool, shapes),
    seed=st.integers(0, 2**32 - 1),
    method=st.sampled_from(["uniform", "center"]),
)
def test_a_click_lies_on_an_error_and_says_which(mask, prediction, seed, method):
    (x, y), label = answer(mask, prediction, np.random.default_rng(seed), method)
    if (mask != prediction).any():
        assert mask[int(y), int(x)] != prediction[int(y), int(x)]
        assert label == mask[int(y), int(x)]
    else:
        assert label == 0


def test_every_error_is_as_likely_as_another(rng):
    mask, prediction = np.zeros((2, 8, 11), bool)
    mask[1:4, 2:6] = True
    prediction[2:6, 4:9] = True
    counts = np.zeros(mask.shape, int)
    for _ in range(100 * 24):
        (x, y), _ = next_click(mask, prediction, rng)
        counts[int(y), int(x)] += 1
    np.testing.assert_array_equal(counts > 0, mask ^ prediction)
    assert counts[mask ^ prediction].min() > 65  # 100 expected, standard deviation 10
    assert counts.max() < 140


def test_without_a_prediction_everything_is_missed(rng):
    mask, _ = blobs(3)
    for _ in range(10):
        (x, y), label = next_click(mask, None, rng)
        assert label == 1
        assert mask[int(y), int(x)]


def test_wrong_arguments_are_named(rng):
    mask = np.ones((4, 5), bool)
    with pytest.raises(ValueError, match="method 'random': expected one of uniform, center"):
        next_click(mask, mask, rng, "random")
    for other in (mask[:3], mask.astype(np.uint8), mask[None], mask.astype(float)):
        with pytest.raises(ValueError, match="expected two bool arrays"):
            next_click(mask, other, rng)
