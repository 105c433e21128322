"""Laying an image into the frame, and coordinates with it."""

import numpy as np
import pytest

from samjax.frame import pad_to_frame, resize, resize_to_frame, resized_size, scale_coords


@pytest.mark.parametrize(
    ("original", "frame", "expected"),
    [
        ((1200, 1800), (1024, 1024), (683, 1024)),  # 682.67 is rounded, not cut
        ((1800, 1200), (1024, 1024), (1024, 683)),
        ((534, 800), (1024, 1024), (684, 1024)),  # 683.52
        ((37, 53), (1024, 1024), (715, 1024)),
        ((1, 5000), (1024, 1024), (1, 1024)),
        ((100, 200), (96, 128), (64, 128)),
        ((200, 100), (96, 128), (96, 48)),
    ],
)
def test_resized_size(original: tuple, frame: tuple, expected: tuple):
    assert resized_size(original, frame) == expected


def test_resize_to_frame_pads_bottom_and_right(rng: np.random.Generator):
    image = rng.integers(1, 256, (40, 30, 3), np.uint8)
    framed, size = resize_to_frame(image, (96, 128))
    assert framed.shape == (96, 128, 3)
    assert size == (96, 72)
    assert np.array_equal(framed[:96, :72], resize(image, (96, 72)))
    assert not framed[:, 72:].any()


def test_label_maps_keep_their_values():
    mask = np.zeros((10, 10), np.uint8)
    mask[3:7, 2:8] = 5
    assert set(np.unique(resize(mask, (33, 33)))) == {0, 5}
    assert pad_to_frame(mask, (12, 16)).sum() == mask.sum()


def test_scale_coords_scales_x_and_y_apart():
    # 37 x 53 becomes 715 x 1024: the rounding makes the two factors differ.
    coords = scale_coords(np.array([[53, 37], [0, 0], [10, 20]]), (37, 53), (1024, 1024))
    assert np.allclose(coords, [[1024, 715], [0, 0], [10 * 1024 / 53, 20 * 715 / 37]])
    assert coords.dtype == np.float64
