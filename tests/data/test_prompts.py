"""Simulated prompts: where the points and boxes lie, and how the slots are filled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from samjax.data import num_slots, sample_prompt
from samjax.data.prompts import BOX_RULES
from samjax.models.prompt_encoder import merge_prompts
from samjax.prompt_labels import BACKGROUND, FOREGROUND, INVALID, NOT_A_POINT

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))


@pytest.fixture
def mask() -> np.ndarray:
    """Columns 3..17, rows 5..8: x and y cannot be taken for one another."""
    mask = np.zeros((20, 30), bool)
    mask[5:9, 3:18] = True
    return mask


def test_no_prompt_has_no_slots(mask, rng):
    coords, labels = sample_prompt(mask, "none", rng)
    assert (coords.shape, labels.shape) == ((0, 2), (0,))
    assert (coords.dtype, labels.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize(
    ("modes", "counts", "slots"),
    [
        ("none", (1, 0), 0),
        ("box", (4, 4), 2),
        ("points", (1, 0), 2),
        ("points", (3, 2), 6),
        (("none", "box"), (1, 0), 2),
        (("box", "points", "none"), (1, 3), 5),
        ("points+box", (5, 0), 7),
        (("points", "points+box"), (2, 1), 5),
    ],
)
def test_every_mode_fills_the_same_number_of_slots(mask, rng, modes, counts, slots):
    assert num_slots(modes, *counts) == slots
    for _ in range(10):
        coords, labels = sample_prompt(
            mask, modes, rng, num_points=counts[0], num_negatives=counts[1]
        )
        assert (coords.shape, labels.shape) == ((slots, 2), (slots,))
        assert (coords[labels == INVALID] == 0).all()


def test_points_lie_where_their_labels_say_and_end_with_the_pad_point(mask, rng):
    coords, labels = sample_prompt(mask, "points", rng, num_points=40, num_negatives=30)
    np.testing.assert_array_equal(labels, [FOREGROUND] * 40 + [BACKGROUND] * 30 + [NOT_A_POINT])
    x, y = coords.astype(int).T
    assert (coords == coords.astype(int)).all()
    assert mask[y[:40], x[:40]].all()
    assert not mask[y[40:70], x[40:70]].any()
    np.testing.assert_array_equal(coords[70], [0, 0])


def test_points_cover_the_mask_evenly(mask, rng):
    coords, _ = sample_prompt(mask, "points", rng, num_points=6000)
    counts = np.zeros(mask.shape, int)
    np.add.at(counts, tuple(coords[:-1].astype(int).T[::-1]), 1)
    assert (counts[mask] > 60).all()  # 100 expected
    assert (counts[mask] < 150).all()


def test_tight_box_includes_its_last_row_and_column(mask, rng):
    coords, labels = sample_prompt(mask, "box", rng, box_jitter=0.0)
    np.testing.assert_array_equal(coords, [[3, 5], [17, 8]])
    np.testing.assert_array_equal(labels, [2, 3])


def test_box_jitter_is_a_fraction_of_the_sides(mask, rng):
    boxes = np.stack([sample_prompt(mask, "box", rng, box_jitter=0.2)[0] for _ in range(300)])
    moves = np.abs(boxes - [[3, 5], [17, 8]]).max(axis=0)
    np.testing.assert_allclose(moves, [[3, 0.8], [3, 0.8]], rtol=0.1)  # 15 wide, 4 high


@settings(deadline=None)
@given(mask=masks, seed=st.integers(0, 2**32 - 1), jitter=st.floats(0, 0.49))
def test_a_box_is_ordered_and_inside_the_image(mask, seed, jitter):
    coords, labels = sample_prompt(mask, "box", np.random.default_rng(seed), box_jitter=jitter)
    if mask.any():
        np.testing.assert_array_equal(labels, [2, 3])
        assert (coords[0] <= coords[1]).all()
        assert (coords >= 0).all()
        assert (coords <= np.array(mask.shape[::-1]) - 1).all()
    else:
        np.testing.assert_array_equal(labels, [INVALID, INVALID])


@settings(deadline=None)
@given(mask=masks, seed=st.integers(0, 2**32 - 1))
def test_points_of_any_mask(mask, seed):
    coords, labels = sample_prompt(
        mask, "points", np.random.default_rng(seed), num_points=2, num_negatives=2
    )
    x, y = coords.astype(int).T
    assert mask[y[labels == FOREGROUND], x[labels == FOREGROUND]].all()
    assert not mask[y[labels == BACKGROUND], x[labels == BACKGROUND]].any()
    assert (labels == NOT_A_POINT).sum() == 1
    assert (labels == FOREGROUND).sum() == (2 if mask.any() else 0)


def test_a_mask_without_foreground(rng):
    empty = np.zeros((4, 6), bool)
    labels = sample_prompt(empty, "points", rng, num_points=3, num_negatives=1)[1]
    np.testing.assert_array_equal(labels, [BACKGROUND, NOT_A_POINT, INVALID, INVALID, INVALID])
    assert (sample_prompt(empty, ("box",), rng)[1] == INVALID).all()


def test_a_mask_without_background_gives_no_background_points(rng):
    labels = sample_prompt(np.ones((4, 6), bool), "points", rng, num_points=1, num_negatives=2)[1]
    np.testing.assert_array_equal(labels, [FOREGROUND, NOT_A_POINT, INVALID, INVALID])


def test_the_defaults_draw_what_they_always_drew(mask):
    """Seeds of earlier runs keep their meaning."""
    rng = np.random.default_rng(5)
    options = {"num_points": 2, "num_negatives": 1}
    drawn = [sample_prompt(mask, ("points", "box"), rng, **options) for _ in range(4)]
    assert [labels.tolist() for _, labels in drawn] == [
        *([2, 3, -2, -2], [2, 3, -2, -2], [1, 1, 0, -1], [2, 3, -2, -2]),
    ]
    np.testing.assert_allclose(drawn[0][0][:2], [[3.924, 5.012], [16.357, 7.643]], atol=5e-4)
    np.testing.assert_array_equal(drawn[2][0], [[17, 8], [14, 5], [22, 13], [0, 0]])
    np.testing.assert_allclose(drawn[3][0][:2], [[2.805, 5.379], [18.193, 8.275]], atol=5e-4)


@pytest.mark.parametrize("mode", ["points", "box", "points+box"])
def test_a_prompt_is_in_sams_order(mask, rng, mode):
    coords, labels = sample_prompt(mask, mode, rng, num_points=3, num_negatives=2, box_jitter=0.0)
    points, kinds = (coords[None, :5], labels[None, :5]) if "points" in mode else (None, None)
    box = np.array([[3, 5, 17, 8]]) if "box" in mode else None
    for found, expected in zip((coords, labels), merge_prompts(points, kinds, box), strict=True):
        np.testing.assert_array_equal(found, expected[0])


def test_points_and_a_box_of_an_empty_mask_are_one_background_point(rng):
    labels = sample_prompt(np.zeros((4, 6), bool), "points+box", rng, num_points=2)[1]
    np.testing.assert_array_equal(labels, [BACKGROUND, NOT_A_POINT, INVALID, INVALID])


def test_sam2loras_box_is_pushed_out_on_all_sides_by_one_draw(mask, rng):
    assert BOX_RULES["sam2lora"] == 0.02
    boxes = [
        sample_prompt(np.kron(mask, np.ones((10, 10), bool)), "box", rng, box_rule="sam2lora")[0]
        for _ in range(300)
    ]
    eroded = np.array([[31, 51], [179, 89]])  # the first row and column are gone
    pushes = (np.stack(boxes) - eroded) * [[-1], [1]]
    assert np.ptp(pushes, axis=(1, 2)).max() < 1e-4
    assert pushes.min() > 0
    assert 0.95 * 0.02 * 300 < pushes.max() < 0.02 * 300  # of the longest side
    assert 0.45 < pushes.mean() / (0.02 * 300) < 0.55
    still, _ = sample_prompt(mask, "box", rng, box_rule="sam2lora", box_jitter=0.0)
    np.testing.assert_array_equal(still, [[4, 6], [17, 8]])
    whole, _ = sample_prompt(np.ones((8, 9), bool), "box", rng, box_rule="sam2lora", box_jitter=0.4)
    np.testing.assert_array_equal(whole, [[0, 0], [8, 7]])


def test_points_come_from_the_region_and_bear_its_label(mask, rng):
    for mode in ("points", "points+box"):
        options = {"num_points": 50, "num_negatives": 3}
        coords, labels = sample_prompt(mask, mode, rng, region="density_released", **options)
        x, y = coords[:50].astype(int).T
        assert (labels[:50] == FOREGROUND).all()
        assert mask[y, x].mean() < 0.5  # four rows do not outlast 15x15
        coords, labels = sample_prompt(mask, mode, rng, region="general", **options)
        x, y = coords[:50].astype(int).T
        assert (x.min(), y.min()) == (4, 6)
        x, y = coords[50:53].astype(int).T
        assert not mask[y, x].any()


def test_of_several_modes_each_is_drawn_as_often(mask, rng):
    first = [sample_prompt(mask, ("none", "points", "box"), rng)[1][0] for _ in range(600)]
    for label in (INVALID, FOREGROUND, 2):
        assert 150 < first.count(label) < 250


def test_wrong_arguments_are_named(mask, rng):
    with pytest.raises(ValueError, match="prompt modes boxes: expected none, points, box, points"):
        sample_prompt(mask, ("box", "boxes"), rng)
    with pytest.raises(ValueError, match=r"prompt modes \(none given\)"):
        num_slots(())
    with pytest.raises(ValueError, match="0 foreground and 0 background points"):
        num_slots("points", 0)
    with pytest.raises(ValueError, match="region 'rim': expected one of foreground"):
        sample_prompt(mask, "box", rng, region="rim")
    with pytest.raises(ValueError, match="box_rule 'loose': expected one of sides, sam2lora"):
        sample_prompt(mask, "points", rng, box_rule="loose")
    for jitter in (-0.1, 0.5, float("nan")):
        with pytest.raises(ValueError, match="box_jitter"):
            sample_prompt(mask, "box", rng, box_jitter=jitter)
