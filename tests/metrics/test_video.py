import numpy as np
import pytest

from samjax.metrics import (
    TrackScore,
    boundary_measure,
    region_similarity,
    score_track,
    summarise_tracks,
)


def border_by_loops(mask):
    """Pixel by pixel: unlike the next one to the right, below, or (inside the frame) diagonally."""
    height, width = mask.shape
    border = np.zeros(mask.shape, bool)
    for y in range(height):
        for x in range(width):
            steps = [(0, 1), (1, 0), (1, 1)]
            ahead = [(y + b, x + a) for b, a in steps if y + b < height and x + a < width]
            border[y, x] = any(mask[place] != mask[y, x] for place in ahead)
    return border


def f_by_dilation(ours, theirs):
    """The published way: of two (boundary, dilated boundary), what of each the other covers."""
    (border, grown), (their_border, their_grown) = ours, theirs
    if not border.any() or not their_border.any():
        return 1.0 if border.any() == their_border.any() else 0.0
    precision, recall = their_grown[border].mean(), grown[their_border].mean()
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def blob(rng, shape):
    y, x = np.indices(shape)
    middle = rng.uniform(0, 1, 2) * shape  # often cut by the edge
    radii = rng.uniform(2, 9, 2)
    return ((y - middle[0]) / radii[0]) ** 2 + ((x - middle[1]) / radii[1]) ** 2 < 1


@pytest.mark.parametrize("share", [0.008, 0.05, 0.1])
def test_f_against_dilation_by_a_disk(rng, share):
    morphology = pytest.importorskip("skimage.morphology")
    shape = (23, 37)
    disk = morphology.disk(np.ceil(share * np.linalg.norm(shape)))
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    shapes = [empty, full, rng.random(shape) < 0.1, *(blob(rng, shape) for _ in range(9))]
    borders = [border_by_loops(mask) for mask in shapes]
    grown = [(border, morphology.dilation(border, disk)) for border in borders]
    values = set()
    for prediction, ours in zip(shapes, grown, strict=True):
        for truth, theirs in zip(shapes, grown, strict=True):
            expected = f_by_dilation(ours, theirs)
            assert boundary_measure(prediction, truth, share) == pytest.approx(expected, abs=1e-12)
            values.add(expected)
    assert len(values) > 20


def test_j_against_scikit_learn(rng):
    metrics = pytest.importorskip("sklearn.metrics")
    for _ in range(5):
        prediction, truth = blob(rng, (19, 21)), blob(rng, (19, 21)) | (rng.random((19, 21)) < 0.1)
        expected = metrics.jaccard_score(truth.ravel(), prediction.ravel())
        assert region_similarity(prediction, truth) == pytest.approx(expected)


def test_empty_and_full_frames():
    empty, full, some = np.zeros((3, 8, 9), bool)
    full[:] = some[2:5, 3:6] = True
    assert region_similarity(empty, empty) == boundary_measure(empty, empty) == 1
    for one, other in ((some, empty), (empty, some)):
        assert region_similarity(one, other) == boundary_measure(one, other) == 0
    # What fills the frame has no boundary, no more than nothing has.
    assert region_similarity(full, empty) == 0
    assert boundary_measure(full, empty) == 1


def test_the_radius_in_pixels(rng):
    prediction, truth = rng.random((2, 40, 30)) < 0.01
    share = boundary_measure(prediction, truth, 0.05)  # 2.5 pixels, so 3
    assert share == boundary_measure(prediction, truth, 3)
    assert share > boundary_measure(prediction, truth, 2) > 0


def test_a_clip_object_by_object_and_frame_by_frame(rng):
    truth, prediction = rng.integers(0, 3, (2, 5, 12, 14)) * 4  # objects 4 and 8
    score = score_track(prediction, truth)
    assert score.objects == (4, 8)
    assert score.frames == (1, 2, 3)
    for row, number in enumerate((4, 8)):
        for column, frame in enumerate((1, 2, 3)):
            pair = prediction[frame] == number, truth[frame] == number
            assert score.j[row, column] == region_similarity(*pair)
            assert score.f[row, column] == boundary_measure(*pair)
    np.testing.assert_allclose(score.j_and_f, (score.j.mean(1) + score.f.mean(1)) / 2)
    everything = score_track(prediction, truth, skip_ends=False)
    assert everything.frames == (0, 1, 2, 3, 4)
    np.testing.assert_array_equal(everything.j[:, 1:-1], score.j)
    only = score_track(prediction == 8, truth == 8)
    assert only.objects == (1,)
    np.testing.assert_array_equal(only.f[0], score.f[1])


def test_an_object_that_was_lost_scores_nothing():
    truth = np.zeros((4, 9, 9), int)
    truth[:, 1:4, 1:4], truth[:, 5:8, 5:8] = 1, 2
    score = score_track(np.where(truth == 1, 1, 0), truth)
    np.testing.assert_array_equal(score.j, [[1, 1], [0, 0]])
    np.testing.assert_array_equal(score.f, [[1, 1], [0, 0]])
    np.testing.assert_array_equal(score.j_and_f, [1, 0])


def test_the_mean_counts_each_object_once():
    short = TrackScore((1,), (1,), np.array([[0.0]]), np.array([[1.0]]))
    long = TrackScore((1, 2), (1, 2), np.array([[1, 0.5], [1, 1]]), np.array([[0.5, 0.5], [0, 0]]))
    summary = summarise_tracks([short, long])
    assert summary.n_objects == 3
    assert summary.j == pytest.approx((0 + 0.75 + 1) / 3)
    assert summary.f == pytest.approx((1 + 0.5 + 0) / 3)
    assert summary.j_and_f == pytest.approx((summary.j + summary.f) / 2)


CLIP = np.ones((3, 4, 5), int)


@pytest.mark.parametrize(
    ("prediction", "truth", "options", "message"),
    [
        (CLIP, CLIP[:, :3], {}, r"shape \(3, 4, 5\), truth \(3, 3, 5\)"),
        (CLIP[0], CLIP[0], {}, r"expected frames \(t, h, w\)"),
        (CLIP / 2, CLIP, {}, "prediction is float64"),
        (CLIP[:2], CLIP[:2], {}, "2 frames, of which none"),
        (CLIP, 0 * CLIP, {}, r"objects are \[\]"),
        (CLIP, CLIP, {"objects": [1, 1]}, r"objects are \[1, 1\]"),
        (7 * CLIP, CLIP, {}, r"the prediction has objects \[7\], expected \[1\]"),
        (CLIP, CLIP, {"bound_th": 0}, "bound_th is 0"),
    ],
)
def test_bad_clips(prediction, truth, options, message):
    with pytest.raises(ValueError, match=message):
        score_track(prediction, truth, **options)


def test_bad_frames():
    with pytest.raises(ValueError, match="one frame"):
        region_similarity(np.zeros((2, 3, 4), bool), np.zeros((2, 3, 4), bool))
    with pytest.raises(ValueError, match="no tracks"):
        summarise_tracks([])
