"""Where points are drawn: SAM2LoRA's regions, against erosions and orders done another way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageFilter

from samjax.data.regions import REGIONS, draw_points, erode_once

INSIDE = [region for region in REGIONS if region != "density_released"]
masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))


@pytest.fixture
def disc() -> np.ndarray:
    """Radius 20 at (x, y) = (50, 30): x and y cannot be taken for one another."""
    y, x = np.ogrid[:70, :90]
    return (x - 50) ** 2 + (y - 30) ** 2 <= 400


@pytest.fixture
def vessel() -> np.ndarray:
    """Three pixels wide, as across most of a retina."""
    mask = np.zeros((70, 90), bool)
    mask[30:33, 5:80] = True
    return mask


def eroded(mask: np.ndarray, side: int) -> np.ndarray:
    """By ones of this side, anchored as OpenCV does; nothing comes in from the rim."""
    before, after = side // 2, side - 1 - side // 2
    padded = np.pad(mask, ((before, after), (before, after)), constant_values=True)
    return np.asarray(sliding_window_view(padded, (side, side)).all(axis=(2, 3)))


def at(points: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return mask[points[:, 1], points[:, 0]]


def test_our_own_erosion_is_pillows_where_the_side_is_odd(disc, vessel):
    for mask in (disc, vessel, np.roll(disc, 30, axis=1)):
        picture = Image.fromarray(np.uint8(255) * mask)
        for side in (3, 15):
            expected = np.array(picture.filter(ImageFilter.MinFilter(side))) > 0
            np.testing.assert_array_equal(eroded(mask, side), expected)


def test_the_first_erosion_takes_the_upper_and_the_left_rim(disc):
    padded = np.pad(disc, ((1, 0), (1, 0)), constant_values=True)
    expected = padded[1:, 1:] & padded[:-1, 1:] & padded[1:, :-1] & padded[:-1, :-1]
    np.testing.assert_array_equal(erode_once(disc), expected)
    cut = disc[:, 50:]  # what lies outside the picture erodes nothing
    np.testing.assert_array_equal(erode_once(cut)[:, 0], cut[:, 0] & np.roll(cut[:, 0], 1))
    line = np.zeros((5, 9), bool)
    line[2] = True
    np.testing.assert_array_equal(erode_once(line), line)  # or nothing would be left


@settings(deadline=None)
@given(
    mask=masks,
    region=st.sampled_from(INSIDE),
    count=st.integers(0, 7),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_region_but_the_released_one_leaves_the_mask(mask, region, count, seed):
    points = draw_points(mask, count, np.random.default_rng(seed), region)
    assert points.shape == (count if mask.any() else 0, 2)
    assert at(points, mask).all()


@pytest.mark.parametrize(("region", "side"), [("foreground", 1), ("general", 2), ("density", 15)])
def test_every_pixel_of_a_region_is_as_likely_as_another(disc, rng, region, side):
    expected = eroded(disc, side) if side < 3 else eroded(eroded(disc, 2), side)
    counts = np.zeros(disc.shape, int)
    while counts.sum() < 50 * expected.sum():
        np.add.at(counts, tuple(draw_points(disc, 100, rng, region).T[::-1]), 1)
    np.testing.assert_array_equal(counts > 0, expected)
    assert counts[expected].min() > 15  # 50 expected, standard deviation 7
    assert counts.max() < 95


def nearest_first(mask: np.ndarray, count: int, spacing: float, sign: int) -> list[list[int]]:
    """Upstream's rule, one pixel after the other, with y and x in their places."""
    pixels = np.argwhere(eroded(mask, 2))
    distances = np.linalg.norm(pixels - pixels.mean(axis=0), axis=1)
    chosen: list = []
    for place in np.argsort(sign * distances, kind="stable"):
        if all(np.linalg.norm(pixels[place] - other) > spacing for other in chosen):
            chosen.append(pixels[place])
    return [[x, y] for y, x in chosen[:count]]


@pytest.mark.parametrize(("count", "halvings"), [(5, 0), (9, 0), (3, 1), (2, 2)])
def test_central_points_keep_their_distance(disc, rng, count, halvings):
    spacing = max(disc.shape) / count / 2**halvings
    points = draw_points(disc, count, rng, "center").tolist()
    assert points == nearest_first(disc, count, spacing, 1)
    assert halvings == 0 or len(nearest_first(disc, count, 2 * spacing, 1)) < count
    assert np.linalg.norm(np.array(points[0]) - (50.5, 30.5)) < 1


@pytest.mark.parametrize(("count", "halvings"), [(5, 3), (7, 2), (2, 3)])
def test_peripheral_points_lie_at_the_rim_and_apart(disc, rng, count, halvings):
    spacing = 5 * max(disc.shape) / count / 2**halvings
    points = draw_points(disc, count, rng, "periphery").tolist()
    assert points == nearest_first(disc, count, spacing, -1)
    assert len(nearest_first(disc, count, 2 * spacing, -1)) < count
    assert np.linalg.norm(np.array(points[0]) - (50.5, 30.5)) > 18


def test_fewer_pixels_than_points_give_some_again(rng):
    two = np.zeros((6, 6), bool)
    two[2, 1] = two[4, 5] = True
    for region in INSIDE:
        points = draw_points(two, 5, rng, region)
        assert {tuple(point) for point in points.tolist()} <= {(1, 2), (5, 4)}
    assert len({tuple(p) for p in draw_points(two, 5, rng, "center").tolist()}) == 2


@pytest.mark.parametrize("count", [5, 400, 700, 1100])
def test_a_dense_region_is_what_the_largest_erosion_leaves(disc, rng, count):
    core = eroded(disc, 2)
    side = next(side for side in range(15, 0, -1) if eroded(core, side).sum() >= count)
    points = draw_points(disc, count, rng, "density")
    assert at(points, eroded(core, side)).all()
    assert len({tuple(point) for point in points.tolist()}) == count  # without replacement
    assert (side == 15) == (count == 5)


def test_thin_vessels_are_where_the_released_code_goes_wrong(vessel, disc):
    def drawn(region, mask, seed):
        return draw_points(mask, 200, np.random.default_rng(seed), region)

    corrected, released = (drawn(r, vessel, 0) for r in ("density", "density_released"))
    assert at(corrected, vessel).all()
    hits = at(released, vessel).mean()  # of 6300 pixels the vessel has 225
    assert hits < 0.1
    for seed in range(3):  # a thick object gets the same points from both
        np.testing.assert_array_equal(
            drawn("density", disc, seed), drawn("density_released", disc, seed)
        )


def test_the_pictures_rim_is_no_rim_of_the_object(rng):
    whole = np.ones((5, 6), bool)
    for region in ("general", "density"):
        points = np.concatenate([draw_points(whole, 30, rng, region) for _ in range(10)])
        assert len({tuple(point) for point in points.tolist()}) == 30


def test_an_unknown_region_is_named(disc, rng):
    with pytest.raises(ValueError, match="region 'rim': expected one of foreground, general, cent"):
        draw_points(disc, 1, rng, "rim")
