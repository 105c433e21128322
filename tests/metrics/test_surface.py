import math
import warnings

import numpy as np
import pytest
from scipy import ndimage

from samjax.metrics import surface_distances
from samjax.metrics.surface import SurfaceDistances, nearest

TOLERANCES = (0.0, 0.7, 1.0, 2.1, 3.0)


def test_by_hand():
    """Two pixels against one: the distances are 0, 3 and 0."""
    prediction, truth = np.zeros((2, 1, 5), bool)
    prediction[0, [1, 2]] = True
    truth[0, 1] = True
    found = surface_distances(prediction, truth, (1.0, 3.0))
    np.testing.assert_array_equal(found.prediction_to_truth, [0, 3])
    np.testing.assert_array_equal(found.truth_to_prediction, [0])
    assert found.hausdorff(100) == 3
    assert found.hausdorff(50) == 1.5
    assert found.hausdorff(50, pooled=True) == 0
    assert found.average() == 1
    assert found.average(pooled=False) == 0.75
    assert found.surface_dice(2.9) == 2 / 3


def test_against_medpy(pairs):
    binary = pytest.importorskip("medpy.metric.binary")
    filled = [pair for pair in pairs if pair.filled]
    assert len(filled) > 150
    for prediction, truth, spacing in filled:
        found = surface_distances(prediction, truth, spacing)
        there, back = (prediction, truth, spacing), (truth, prediction, spacing)
        ours = [
            *(found.hausdorff(100), found.hausdorff(100, pooled=True)),
            *(found.hausdorff(95, pooled=True), found.average(), found.average(pooled=False)),
            *(distances.mean() for distances in found),
        ]
        directed = binary.asd(*there), binary.asd(*back)
        hausdorff = binary.hd(*there)
        theirs = [hausdorff, hausdorff, binary.hd95(*there), binary.assd(*there)]
        np.testing.assert_allclose(ours, [*theirs, np.mean(directed), *directed], rtol=1e-6)


@pytest.mark.parametrize("ndim", [2, 3])
def test_against_monai(pairs, ndim, monkeypatch):
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    # Rounded to float32, the place 0.95 (n - 1) between two distances is off by 1e-5.
    quantile = torch.quantile
    monkeypatch.setattr(torch, "quantile", lambda values, q: quantile(values.double(), q).float())
    here = [pair for pair in pairs if pair.truth.ndim == ndim]
    found = [surface_distances(*pair) for pair in here]

    def compare(name, measure, part=slice(None), *, infinite=True, **options):
        masks = (
            torch.tensor(np.stack([getattr(pair, kind) for pair in here[part]]))[:, None]
            for kind in ("prediction", "truth")
        )
        spacing = [pair.spacing or (1.0,) * ndim for pair in here[part]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a mask is empty
            theirs = getattr(metrics, f"compute_{name}")(
                *masks, include_background=True, spacing=spacing, **options
            )
        theirs = theirs[:, 0].double().numpy()
        if infinite:  # or NaN between two infinite distances; ours is NaN for both
            empty = np.array([not pair.filled for pair in here[part]])
            assert not np.isfinite(theirs[empty]).any()
            theirs[empty] = np.nan
        ours = [measure(distances) for distances in found[part]]
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)

    compare("hausdorff_distance", lambda d: d.hausdorff(), percentile=95)
    compare("average_surface_distance", lambda d: d.average(), symmetric=True)
    for k, tolerance in enumerate(TOLERANCES):
        compare(
            "surface_dice",
            lambda d, tolerance=tolerance: d.surface_dice(tolerance),
            slice(k, None, len(TOLERANCES)),
            infinite=False,
            class_thresholds=[tolerance],
        )


def test_the_box_around_both_changes_nothing():
    """Far from the array's edge the distances are those at the edge: the crop cuts nothing off."""
    small = np.zeros((2, 4, 5), bool)
    small[0, :3, 1:4] = small[1, 1:, 2:] = True
    large = np.pad(small, ((0, 0), (30, 20), (10, 40)))
    for ours, theirs in zip(surface_distances(*small), surface_distances(*large), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_distances_against_the_distance_transform(pairs):
    for prediction, truth, spacing in pairs:
        sizes = spacing or (1.0,) * truth.ndim
        found = nearest(prediction, truth, sizes)
        if truth.any():
            expected = ndimage.distance_transform_edt(~truth, sampling=sizes)[prediction]
            np.testing.assert_allclose(found, expected, rtol=1e-12)
        else:
            assert found.tolist() == [math.inf] * prediction.sum()


def test_an_empty_region():
    """Measures have no value there, but for surface Dice, which misses the whole border."""
    empty, full = np.zeros((2, 4, 4), bool)
    full[1:3, 1:3] = True
    for distances in (surface_distances(full, empty), surface_distances(empty, full)):
        assert np.concatenate(distances).tolist() == [math.inf] * 4
        assert math.isnan(distances.hausdorff())
        assert math.isnan(distances.average())
        assert distances.surface_dice(100) == 0
    neither = surface_distances(empty, empty)
    assert neither.prediction_to_truth.shape == neither.truth_to_prediction.shape == (0,)
    assert math.isnan(neither.hausdorff())
    assert math.isnan(neither.surface_dice(1))


def test_the_tolerance_includes_what_lies_exactly_at_it():
    """3 × 0.1 is more than 0.3 in floating point."""
    prediction, truth = np.zeros((2, 1, 9), bool)
    prediction[0, 1] = truth[0, 4] = True
    found = surface_distances(prediction, truth, (0.1, 0.1))
    assert found.hausdorff() > 0.3
    assert found.surface_dice(0.3) == 1
    assert found.surface_dice(0.2999) == 0


@pytest.mark.parametrize(
    ("prediction", "spacing", "message"),
    [
        (np.zeros((2, 3), bool), None, r"prediction has shape \(2, 3\), truth \(3, 2\)"),
        (np.zeros((3, 2)), None, "prediction is float64"),
        (np.zeros((3, 2), bool), (1.0,), r"spacing is \(1.0,\) for 2 dimensions"),
        (np.zeros((3, 2), bool), (1.0, 0.0), "expected positive sizes"),
        (np.zeros((3, 2), bool), (1.0, -2.0), "expected positive sizes"),
        (np.zeros((3, 2), bool), (1.0, math.nan), "expected positive sizes"),
    ],
)
def test_bad_masks_and_spacings(prediction, spacing, message):
    with pytest.raises(ValueError, match=message):
        surface_distances(prediction, np.zeros((3, 2), bool), spacing)


def test_other_bad_arguments():
    line = np.zeros(3, bool)
    with pytest.raises(ValueError, match="1 dimensions"):
        surface_distances(line, line)
    with pytest.raises(ValueError, match="at least one pixel"):
        surface_distances(line[:0], line[:0])
    distances = SurfaceDistances(np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match="percentile is 101"):
        distances.hausdorff(101)
    for tolerance in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match="tolerance is"):
            distances.surface_dice(tolerance)
