"""Resizing equals upstream's; augmentation moves image and mask together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from data_sets import HEIGHT, WIDTH, l_and_blot, painted, read_back
from samjax.data.transforms import (
    PRESETS,
    Augment,
    random_affine,
    random_blur,
    random_colour,
    random_flip,
    random_noise,
    random_rot90,
)
from samjax.frame import pad_to_frame, resize, resize_to_frame, resized_size


@pytest.fixture
def mask() -> np.ndarray:
    return l_and_blot()


def assert_moved_together(image: np.ndarray, mask: np.ndarray, exactly: bool) -> None:
    assert image.dtype == mask.dtype == np.uint8
    assert image.shape == (*mask.shape, 3)
    differs = read_back(image) != mask
    if not exactly:  # the two interpolations may disagree about pixels on a border
        inner = ndimage.minimum_filter(mask, 3) == ndimage.maximum_filter(mask, 3)
        differs = differs & inner
    assert not differs.any()


@given(
    height=st.integers(1, 5000), width=st.integers(1, 5000), side=st.sampled_from([64, 256, 1024])
)
@settings(deadline=None)
def test_size_in_a_square_frame_is_upstreams(height, width, side):
    scale = side * 1.0 / max(height, width)  # ResizeLongestSide.get_preprocess_shape
    upstream = int(height * scale + 0.5), int(width * scale + 0.5)
    assert resized_size((height, width), (side, side)) == tuple(max(x, 1) for x in upstream)


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    frame=st.tuples(st.integers(1, 1024), st.integers(1, 1024)),
)
@settings(deadline=None)
def test_size_fits_any_frame_and_touches_it(height, width, frame):
    size = resized_size((height, width), frame)
    assert size[0] <= frame[0]
    assert size[1] <= frame[1]
    assert size[0] == frame[0] or size[1] == frame[1]


def test_padding_is_at_the_bottom_and_the_right(rng):
    array = rng.integers(1, 256, (3, 5, 2), dtype=np.uint8)
    padded = pad_to_frame(array, (4, 9))
    np.testing.assert_array_equal(padded[:3, :5], array)
    assert padded.dtype == np.uint8
    assert (padded[3:].sum(), padded[:, 5:].sum()) == (0, 0)
    framed, size = resize_to_frame(array[..., 0], (8, 10))
    assert (framed.shape, size) == ((8, 10), (6, 10))
    assert framed[:6].all()
    assert not framed[6:].any()


def test_resizing_moves_image_and_labels_together(mask):
    for size in ((24, 35), (96, 140), (33, 50)):
        labels = resize(mask, size)
        assert set(np.unique(labels)) == {0, 1, 2}
        assert_moved_together(resize(painted(mask), size), labels, exactly=False)


@pytest.mark.parametrize("seed", range(8))
def test_flips_and_turns_are_exact(mask, seed):
    rng = np.random.default_rng(seed)
    assert_moved_together(*random_flip(painted(mask), mask, rng), exactly=True)
    assert_moved_together(*random_rot90(painted(mask), mask, rng), exactly=True)


def test_flips_follow_their_probabilities(mask, rng):
    never, always = {"horizontal": 0.0, "vertical": 0.0}, {"horizontal": 1.0, "vertical": 1.0}
    np.testing.assert_array_equal(random_flip(painted(mask), mask, rng, **never)[1], mask)
    np.testing.assert_array_equal(
        random_flip(painted(mask), mask, rng, **always)[1], mask[::-1, ::-1]
    )
    only = random_flip(painted(mask), mask, rng, horizontal=1.0, vertical=0.0)[1]
    np.testing.assert_array_equal(only, mask[:, ::-1])


def test_quarter_turns_only_where_they_fit(mask, rng):
    def shapes(frame_size):
        pairs = (random_rot90(painted(mask), mask, rng, frame_size=frame_size) for _ in range(40))
        return {turned.shape for _, turned in pairs}

    assert shapes((WIDTH, WIDTH)) == {(HEIGHT, WIDTH), (WIDTH, HEIGHT)}
    assert shapes((HEIGHT, WIDTH)) == {(HEIGHT, WIDTH)}


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    rotate=st.floats(0, 180),
    scale=st.floats(0, 0.5),
    shift=st.floats(0, 0.3),
)
def test_affine_moves_image_and_mask_together(seed, rotate, scale, shift):
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[8:36, 10:18] = 1
    labels[10:22, 44:58] = 2
    rng = np.random.default_rng(seed)
    image, moved = random_affine(
        painted(labels), labels, rng, rotate=rotate, scale=scale, shift=shift
    )
    assert_moved_together(image, moved, exactly=False)


def test_affine_without_strength_changes_nothing(mask, rng):
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    same_image, same_mask = random_affine(image, mask, rng)
    np.testing.assert_array_equal(same_image, image)
    np.testing.assert_array_equal(same_mask, mask)


class Drawn:
    """A generator that draws what the test tells it."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, low, high, size=None):
        return np.array(self.values.pop(0)) if size else self.values.pop(0)


def centre(mask: np.ndarray) -> np.ndarray:
    return np.array(ndimage.center_of_mass(mask))


def test_affine_rotates_scales_and_shifts_as_it_says():
    blot = np.zeros((101, 101), np.uint8)
    blot[10:21, 45:56] = 1  # above the centre (50, 50) by 35
    image = painted(blot)

    def moved(angle, factor, shift):
        draws = Drawn(angle, factor, shift)
        return random_affine(image, blot, draws, rotate=180.0, scale=1.0, shift=1.0)[1]

    shifted = moved(0.0, 0.0, [0.2, -0.1])  # of the height, of the width
    np.testing.assert_allclose(centre(shifted), [15 + 20.2, 50 - 10.1], atol=1)
    turned = moved(90.0, 0.0, [0.0, 0.0])  # clockwise as one sees it
    np.testing.assert_allclose(centre(turned), [50, 85], atol=1)
    small = moved(0.0, -1.0, [0.0, 0.0])  # half
    np.testing.assert_allclose(centre(small), [50 - 17.5, 50], atol=1)
    assert small.sum() == pytest.approx(blot.sum() / 4, rel=0.2)
    outside = moved(0.0, 0.0, [-0.3, 0.0])
    assert not outside.any()


def test_what_affine_draws_in_from_outside_is_black_background(rng):
    image = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    labels = np.ones((HEIGHT, WIDTH), np.uint8)
    black = 0
    for _ in range(10):
        moved, moved_mask = random_affine(image, labels, rng, rotate=40, scale=0.2, shift=0.2)
        assert set(np.unique(moved)) <= {0, 200}
        np.testing.assert_array_equal(moved[..., 0] == 200, moved_mask == 1)
        black += (moved_mask == 0).sum()
    assert black


def test_colour_changes_are_what_they_say(rng):
    image = rng.integers(60, 190, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)

    def changed(**strength):
        return random_colour(image, mask, rng, **strength)[0].astype(int)

    np.testing.assert_array_equal(changed(), image)
    offsets = [changed(brightness=0.2) - image for _ in range(20)]
    assert all(np.ptp(offset) == 0 and abs(offset[0, 0, 0]) <= 51 for offset in offsets)
    assert len({offset[0, 0, 0] for offset in offsets}) > 5
    spread = changed(contrast=0.5).std() / image.std()
    assert 1 / 1.5 - 0.02 < spread < 1.52
    gains = changed(colour=0.3).reshape(-1, 3).mean(0) / image.reshape(-1, 3).mean(0)
    assert np.ptp(gains) > 0.01
    assert ((gains > 1 / 1.31) & (gains < 1.31)).all()
    curve = random_colour(np.array([[[0, 128, 255]]], np.uint8), mask, rng, gamma=0.5)[0][0, 0]
    assert (curve[0], curve[2]) == (0, 255)
    assert 0 < abs(int(curve[1]) - 128) < 60


def test_noise_and_blur_are_what_they_say(rng):
    flat = np.full((200, 300, 3), 120, np.uint8)
    mask = np.zeros((200, 300), np.uint8)
    stds = [random_noise(flat, mask, rng, std=8.0)[0].std() for _ in range(8)]
    assert max(stds) < 8.5
    assert min(stds) < 0.6 * max(stds)
    sharp = rng.integers(0, 256, (200, 300, 3), dtype=np.uint8)
    assert random_blur(sharp, mask, rng, sigma=2.0)[0].std() < 0.7 * sharp.std()
    black = np.zeros_like(flat)
    assert random_noise(black, mask, rng, std=8.0)[0].max() < 60  # clipped, not wrapped round


def test_augment_none_changes_nothing_and_draws_nothing(mask, rng):
    image = painted(mask)
    state = rng.bit_generator.state
    for augment in (Augment(), Augment.preset("none")):
        same_image, same_mask = augment(image, mask, rng)
        assert same_image is image
        assert same_mask is mask
    assert rng.bit_generator.state == state


@pytest.mark.parametrize("name", ["light", "strong"])
def test_presets_move_image_and_mask_together_and_vary(mask, name):
    augment = Augment.preset(name)
    # Geometry alone, so that colours still tell the label.
    still = {"brightness": 0, "contrast": 0, "gamma": 0, "colour": 0, "blur": 0, "noise": 0}
    geometry = Augment(**{**vars(augment), **still})
    before = painted(mask)
    seen = set()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        image, moved = geometry(painted(mask), mask, rng, (WIDTH, WIDTH))
        assert_moved_together(image, moved, exactly=False)
        full_image, full_mask = augment(before, mask, np.random.default_rng(seed), (WIDTH, WIDTH))
        again, _ = augment(before, mask, np.random.default_rng(seed), (WIDTH, WIDTH))
        np.testing.assert_array_equal(full_image, again)
        assert full_image.shape == (*full_mask.shape, 3)
        assert set(np.unique(full_mask)) <= {0, 1, 2}
        seen.add(full_image.tobytes())
    assert len(seen) > 25
    np.testing.assert_array_equal(before, painted(mask))  # cached examples must not change


def test_presets_by_name():
    assert set(PRESETS) == {"none", "light", "strong"}
    with pytest.raises(
        ValueError, match="augmentation 'huge': expected one of none, light, strong"
    ):
        Augment.preset("huge")


def test_pillow_still_centres_pixels_as_upstreams_does():
    """What the affine matrix relies on: Pillow's coordinates are those of pixel corners."""
    ramp = Image.fromarray(np.arange(0, 200, 10, dtype=np.uint8)[None].repeat(3, 0))
    moved = ramp.transform(
        ramp.size, Image.Transform.AFFINE, (1, 0, 0.5, 0, 1, 0), Image.Resampling.BILINEAR
    )
    assert np.array(moved)[1, 4] == 45
