"""Small holes and specks."""

import numpy as np

from samjax.predictor.components import clean, small_components


def test_connected_at_corners():
    mask = np.zeros((6, 8), bool)
    mask[0, 0] = mask[1, 1] = True  # one component of two pixels
    mask[3:6, 4:8] = True
    assert small_components(mask, 1).sum() == 0
    assert np.argwhere(small_components(mask, 2)).tolist() == [[0, 0], [1, 1]]
    assert small_components(mask, 12).sum() == 14
    assert not small_components(np.zeros((4, 4), bool), 99).any()


def test_holes_then_specks(rng):
    logits = np.full((2, 12, 12), -5.0, np.float32)
    logits[:, 1:9, 1:9] = 5.0
    logits[0, 4, 4] = -1.0  # a hole
    logits[1, 11, 11] = 2.0  # a speck
    kept = logits.copy()
    found = clean(logits, threshold=0.5, max_hole_area=3, max_sprinkle_area=3)
    assert found[0, 4, 4] == 10.5
    assert found[1, 11, 11] == -9.5
    assert ((found != logits).sum(axis=(1, 2)) == 1).all()
    np.testing.assert_array_equal(logits, kept)
    np.testing.assert_array_equal(clean(logits), logits)
