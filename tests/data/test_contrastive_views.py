"""SimCLR's views and SAMora's: colours against torchvision and colorsys, chance, and refusals.

TensorFlow's definitions are upstream's. Where torchvision has another one (contrast by the mean of
the grey picture, saturation by blending with it), the formula stands here.
"""

import colorsys
import pickle
from collections import Counter
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from convert.reference import import_segment_anything
from samjax.data import contrastive_views
from samjax.data.contrastive_views import (
    GREY,
    change_contrast,
    change_saturation,
    jitter,
    samora_view,
    simclr_view,
    turn_hue,
)
from samjax.data.images import DataError

VIEWS = [simclr_view, samora_view]


@pytest.fixture
def values(rng) -> np.ndarray:
    """Float colours: random ones, and every corner, edge and grey of the cube, where hue jumps."""
    steps = np.array([0, 0.25, 0.5, 1], np.float32)
    cube = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(8, 8, 3)
    return np.concatenate([cube, rng.random((24, 8, 3), np.float32)])


@pytest.fixture
def image(rng) -> np.ndarray:
    return rng.integers(0, 256, (37, 52, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def torchvision():
    """The functional module of torchvision's transforms, on channels-first tensors."""
    pytest.importorskip("torch")
    if find_spec("segment_anything") is None:
        pytest.skip("segment_anything is not installed")
    import_segment_anything()  # makes torchvision importable beside any PyTorch
    from torchvision.transforms import functional

    return functional


def as_tensor(array):
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))


def as_array(tensor):
    return np.moveaxis(tensor.numpy(), 0, -1)


def by_colorsys(values, change):
    """A change of (hue, saturation, value) of each pixel, in float64."""
    flat = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel)))
            for pixel in values.reshape(-1, 3).astype(np.float64).tolist()]  # fmt: skip
    return np.array(flat).reshape(values.shape)


@pytest.mark.parametrize("turn", [0.0, 0.2, -0.2, 0.031, -0.5, 0.5, 1 / 3])
def test_hue_is_colorsyss_and_torchvisions(values, turn, torchvision):
    found = turn_hue(values, turn)
    expected = by_colorsys(values, lambda h, s, v: ((h + turn) % 1, s, v))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    theirs = torchvision.adjust_hue(as_tensor(values), turn)
    np.testing.assert_allclose(found, as_array(theirs), atol=2e-6)
    grey = np.repeat(values[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(turn_hue(grey, turn), grey)


@pytest.mark.parametrize("factor", [0.0, 0.2, 1.0, 1.3, 1.8])
def test_saturation_is_colorsyss(values, factor):
    found = change_saturation(values, factor)
    expected = by_colorsys(values, lambda h, s, v: (h, min(s * factor, 1), v))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if factor == 1:
        np.testing.assert_allclose(found, values, atol=1e-7)
    grey = np.repeat(values[..., :1], 3, axis=-1)
    np.testing.assert_allclose(change_saturation(grey, factor), grey, atol=1e-7)


@pytest.mark.parametrize("factor", [0.0, 0.2, 1.0, 1.8])
def test_contrast_is_about_each_channels_mean(values, factor, torchvision):
    found = change_contrast(values, factor)
    mean = values.astype(np.float64).mean((0, 1))
    np.testing.assert_allclose(found, (values - mean) * factor + mean, atol=1e-6)
    # Of a grey picture torchvision's mean is the same one, but for weights that sum up to 0.9999.
    grey = np.repeat(values[..., :1], 3, axis=-1)
    theirs = as_array(torchvision.adjust_contrast(as_tensor(grey), factor))
    np.testing.assert_allclose(np.clip(change_contrast(grey, factor), 0, 1), theirs, atol=2e-4)


class Fixed:
    """A generator with one order of the four changes and one factor."""

    def __init__(self, order, value):
        self.order, self.value, self.asked = order, value, []

    def permutation(self, count):
        assert count == len(self.order)
        return self.order

    def uniform(self, low, high):
        self.asked.append((low, high))
        return self.value


def test_brightness_is_torchvisions_and_the_order_counts(values, torchvision):
    """Brightness, contrast, saturation, hue are numbers 0 to 3; each result is cut off at 0, 1."""
    tensor = as_tensor(values)
    factor = 1.4
    steps = {
        0: lambda x: as_array(torchvision.adjust_brightness(as_tensor(x), factor)),
        1: lambda x: change_contrast(x, factor),
        2: lambda x: change_saturation(x, factor),
        3: lambda x: turn_hue(x, factor),
    }
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        found = jitter(values, Fixed(order, factor), strength=1.0)
        expected = values
        for number in order:
            expected = np.clip(steps[number](expected), 0, 1)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    bright = as_array(torchvision.adjust_brightness(tensor, 0.3))
    np.testing.assert_allclose(values * np.float32(0.3), bright, atol=1e-6)


@pytest.mark.parametrize(
    ("strength", "low", "high"), [(1.0, 0.2, 1.8), (0.5, 0.6, 1.4), (2, 0, 2.6)]
)
def test_strength_is_that_of_the_published_jitter(values, strength, low, high):
    asked = (fixed := Fixed((3, 0, 1, 2), 1.0)).asked
    jitter(values, fixed, strength)
    assert asked[0] == (-0.2, 0.2), "times the strength afterwards"
    np.testing.assert_allclose(asked[1:], [(low, high)] * 3)
    turned = jitter(values, Fixed((3, 0, 1, 2), 0.0), 0.0)
    assert turned.shape == values.shape


def test_no_jitter_of_strength_0(values, rng):
    np.testing.assert_allclose(jitter(values, rng, 0.0), values, atol=1e-6)


def test_the_jitter_stays_between_0_and_1_and_leaves_its_input(values, rng):
    kept = values.copy()
    for _ in range(50):
        found = jitter(values, rng)
        assert found.dtype == np.float32
        assert found.min() >= 0
        assert found.max() <= 1
    np.testing.assert_array_equal(values, kept)


def test_grey_weights_are_tensorflows():
    """`tf.image.rgb_to_grayscale` (image_ops_impl.py); torchvision's for tensors are the same."""
    np.testing.assert_array_equal(GREY, np.float32([0.2989, 0.587, 0.114]))


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_comes_from_the_generator_alone(view, image):
    kept = image.copy()
    rngs = [np.random.default_rng(3) for _ in range(2)]
    first, again = (view(image, rng, side=40) for rng in rngs)
    assert (first.dtype, first.shape) == (np.uint8, (40, 40, 3))
    np.testing.assert_array_equal(first, again)
    assert rngs[0].random() == rngs[1].random()
    assert (view(image, rngs[0], side=40) != first).any(), "the second view of a picture"
    np.testing.assert_array_equal(image, kept)
    image.setflags(write=False)
    turned = np.asarray(image)[::-1, :, ::-1]
    assert view(turned, rngs[0], side=24).shape == (24, 24, 3)
    sent = pickle.loads(pickle.dumps(partial(view, side=24)))
    np.testing.assert_array_equal(
        sent(image, np.random.default_rng(5)), view(image, np.random.default_rng(5), side=24)
    )


@pytest.mark.parametrize("view", VIEWS)
def test_any_size_of_picture(view, rng):
    for shape in ((1, 1, 3), (2, 90, 3), (90, 2, 3), (7, 5, 3)):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        for side in (1, 33):
            for _ in range(10):
                assert view(image, rng, side=side).shape == (side, side, 3)


def count_steps(monkeypatch, calls, side):
    """How often a view has each step, the blurs' arguments, and the pictures."""
    counts, blurs = Counter(), []

    def recorded(name):
        original = getattr(contrastive_views, name)

        def wrapper(*arguments):
            counts[name] += 1
            if name == "blur":
                blurs.append(arguments[1:])
            return original(*arguments)

        return wrapper

    for name in ("jitter", "blur", "resized_crop"):
        monkeypatch.setattr(contrastive_views, name, recorded(name))
    rng = np.random.default_rng(11)
    # Red and green rise to the right: a mirrored picture shows, and so does one without colour.
    ramp = np.tile(np.arange(20, 116, 4, dtype=np.uint8), (24, 1))
    image = np.stack([ramp, ramp // 2, np.zeros_like(ramp)], axis=-1)
    views = [simclr_view(image, rng, side=side, strength=0.1) for _ in range(calls)]
    return counts, blurs, np.array(views)


def test_how_often_simclr_takes_each_step(monkeypatch):
    """Jitter 8 times of 10, grey 2 of 10, mirrored and blurred half the times; 5 deviations."""
    calls, side = 300, 40
    counts, blurs, views = count_steps(monkeypatch, calls, side)
    values = views.astype(int)
    colourless = (np.ptp(values, axis=-1) == 0).all((1, 2)).sum()
    mirrored = (values[:, side // 2, 1, 0] > values[:, side // 2, -2, 0]).sum()
    found = counts["jitter"], counts["blur"], colourless, mirrored
    for times, share in zip(found, (0.8, 0.5, 0.2, 0.5), strict=True):
        assert abs(times - share * calls) < 5 * (share * (1 - share) * calls) ** 0.5, found
    assert counts["resized_crop"] == calls
    taps, sigmas = np.array(blurs).T
    assert set(taps) == {5}, "a tenth of 40 pixels, and the one in the middle"
    assert 0.1 <= sigmas.min() < 0.2
    assert 1.9 < sigmas.max() <= 2


@pytest.mark.parametrize(("side", "taps"), [(8, 1), (32, 3), (224, 23)])
def test_taps_are_upstreams(monkeypatch, side, taps):
    """`kernel_size = height // 10`, `radius = int(kernel_size / 2)`, `2 * radius + 1` taps."""
    _, blurs, _ = count_steps(monkeypatch, 8, side)
    assert {found for found, _ in blurs} == {taps}


def test_simclr_crops_8_to_100_percent(monkeypatch, rng):
    boxes, original = [], contrastive_views.resized_crop

    def recorded(picture, box, size, method):
        assert method is Image.Resampling.BICUBIC
        boxes.append(box)
        return original(picture, box, size, method)

    monkeypatch.setattr(contrastive_views, "resized_crop", recorded)
    image = np.zeros((60, 80, 3), np.uint8)
    for _ in range(500):
        simclr_view(image, rng, side=8)
    left, top, right, bottom = np.array(boxes).T
    assert min(left.min(), top.min()) >= 0
    assert right.max() <= 80
    assert bottom.max() <= 60
    area, ratio = (right - left) * (bottom - top) / 4800, (right - left) / (bottom - top)
    assert 0.07 < area.min() < 0.12
    assert area.max() > 0.9
    assert 0.7 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 1.4


def test_a_grey_picture_stays_grey(rng):
    image = np.repeat(rng.integers(0, 256, (30, 30, 1), dtype=np.uint8), 3, axis=-1)
    for view in VIEWS:
        for _ in range(40):
            found = view(image, rng, side=16).astype(int)
            assert np.ptp(found, axis=-1).max() <= 1


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 5), np.uint8),
        np.zeros((4, 5, 1), np.uint8),
        np.zeros((4, 5, 3), np.float32),
        np.zeros((0, 5, 3), np.uint8),
    ],
)
def test_views_want_a_picture(view, image, rng):
    with pytest.raises(DataError, match=r"an image of \w+ \([\d, ]+\), expected uint8 \(h, w, 3\)"):
        view(image, rng)


@pytest.mark.parametrize("view", VIEWS)
def test_a_side_is_positive(view, image, rng):
    for side in (0, -3):
        with pytest.raises(ValueError, match=f"side is {side}, expected 1 or more"):
            view(image, rng, side=side)


@pytest.mark.parametrize("strength", [-0.1, float("inf"), float("nan")])
def test_a_strength_is_finite_and_not_negative(image, rng, strength):
    with pytest.raises(ValueError, match=f"strength is {strength}, expected 0 or more"):
        simclr_view(image, rng, strength=strength)
