"""The pixels of a resized image are those that upstream's predictor would see (needs torch)."""

import importlib

import numpy as np
import pytest

from convert.reference import import_segment_anything
from samjax.data import resize_to_frame

pytest.importorskip("torch")


@pytest.mark.parametrize("shape", [(60, 97), (97, 60), (32, 32), (20, 11)])
def test_pixels_are_upstreams(rng, shape):
    try:
        import_segment_anything()
        upstream = importlib.import_module("segment_anything.utils.transforms")
    except ImportError as error:
        pytest.skip(str(error))
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    expected = upstream.ResizeLongestSide(32).apply_image(image)
    framed, size = resize_to_frame(image, (32, 32))
    assert size == expected.shape[:2]
    np.testing.assert_array_equal(framed[: size[0], : size[1]], expected)
