"""The papers' augmentations: against torchvision and scipy, how often, and image with mask."""

import math
import pickle
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from convert.reference import import_segment_anything
from data_sets import HEIGHT, WIDTH, l_and_blot, painted, read_back
from samjax.data import paper_augment, warps
from samjax.data.elastic import elastic, smooth
from samjax.data.paper_augment import (
    PAPERS,
    HSamAugment,
    Sam2LoraAugment,
    SamedAugment,
    SamoraViews,
    augmentation,
)
from samjax.data.transforms import PRESETS
from samjax.data.warps import picture_of


@pytest.fixture
def mask() -> np.ndarray:
    return l_and_blot()


@pytest.fixture
def image() -> np.ndarray:
    """Slow waves, another one in each channel: a wrong pixel shows, a rounded one does not."""
    phase = np.add.outer(np.arange(HEIGHT) / 9, np.arange(WIDTH) / 7)[..., None] + np.arange(3)
    return np.rint(127 + 100 * np.sin(phase)).astype(np.uint8)


@pytest.fixture(scope="module")
def torchvision():
    """The functional module of torchvision's transforms, on channels-first tensors."""
    pytest.importorskip("torch")
    if find_spec("segment_anything") is None:
        pytest.skip("segment_anything is not installed")
    import_segment_anything()  # makes torchvision importable beside any PyTorch
    from torchvision.transforms import functional

    return functional


def as_tensor(array: np.ndarray):
    import torch

    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(array, -1, 0)))


def as_array(tensor) -> np.ndarray:
    return np.moveaxis(tensor.numpy(), 0, -1)


def agreement(ours, theirs, tolerance: float = 2.0) -> float:
    """Share of the pixels, but for a rim of two, that differ by no more than the tolerance."""
    difference = np.abs(np.asarray(ours, np.float32) - theirs)[2:-2, 2:-2]
    return float((difference <= tolerance).mean())


def test_warps_are_torchvisions_and_scipys(image, torchvision):
    picture, tensor = picture_of(image), as_tensor(image).float()
    corners = [[1, 2], [66, 1], [68, 45], [2, 46]]
    before = [[0, 0], [WIDTH - 1, 0], [WIDTH - 1, HEIGHT - 1], [0, HEIGHT - 1]]
    pairs = {
        "rotate": (warps.rotate(picture, 7.3), torchvision.rotate(tensor, 7.3)),
        "affine": (
            warps.affine(picture, -5.5, (3, -4), 0.6),
            torchvision.affine(tensor, -5.5, [3, -4], 0.6, [0.0, 0.0]),
        ),
        "perspective": (
            warps.perspective(picture, np.array(corners)),
            torchvision.perspective(tensor, before, corners),
        ),
        "crop": (
            warps.resized_crop(picture, (5, 3, 40, 30), (50, 37)),
            torchvision.resized_crop(tensor, 3, 5, 27, 35, [37, 50], antialias=True),
        ),
        "blur of 3": (warps.blur(image, 3, 0.3), torchvision.gaussian_blur(tensor, 3, [0.3])),
        "blur of 5": (warps.blur(image, 5, 1.3), torchvision.gaussian_blur(tensor, 5, [1.3])),
        "hue": (
            warps.shift_hue(picture, 5.1 / 256),
            torchvision.adjust_hue(as_tensor(image), 5.1 / 256),
        ),
    }
    tolerances = {"hue": 6.0}  # 256 steps there and back
    found = {
        name: agreement(ours, as_array(theirs), tolerances.get(name, 1.0))
        for name, (ours, theirs) in pairs.items()
    }
    assert min(found.values()) > 0.99, found  # perspective brings the rim in
    for degrees in (-20, 7, 19):
        turned = ndimage.rotate(image, degrees, order=0, reshape=False)
        assert agreement(warps.rotate(picture, degrees), turned, 0.0) > 0.98  # scipy cuts the rim


def torchvision_version(functional, image, mask, rng):
    """SAM2LoRA's transforms on one tensor of image and mask, as its ``train.py`` composes them."""
    joined = np.concatenate([image, 255 * mask[..., None]], axis=-1)
    tensor = as_tensor(joined).float()
    for mirror in (functional.hflip, functional.vflip):
        if rng.random() < 0.5:
            tensor = mirror(tensor)
    if rng.random() < 0.5:
        if rng.random() < 0.6:
            moves = [[rng.integers(4), rng.integers(3)] for _ in range(4)]  # a 20th of 70 and 48
            right, bottom = WIDTH - 1, HEIGHT - 1
            before = [[0, 0], [right, 0], [right, bottom], [0, bottom]]
            corners = [
                [x + (-dx if x else dx), y + (-dy if y else dy)]
                for (x, y), (dx, dy) in zip(before, moves, strict=True)
            ]
            tensor = functional.perspective(tensor, before, corners)
        while True:
            area = HEIGHT * WIDTH * rng.uniform(0.08, 1.0)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w <= WIDTH and h <= HEIGHT:
                break
        top, left = rng.integers(HEIGHT - h + 1), rng.integers(WIDTH - w + 1)
        size = [round(HEIGHT * 1000 / 1024), round(WIDTH * 1000 / 1024)]
        tensor = functional.resized_crop(tensor, int(top), int(left), h, w, size, antialias=True)
        tensor = functional.rotate(tensor, rng.uniform(-8, 8))
        angle = rng.uniform(-8, 8)
        shift = [round(side * rng.uniform(-0.2, 0.2)) for side in size[::-1]]
        scale = rng.uniform(0.2, 0.8)
        tensor = functional.affine(tensor, angle, shift, scale, [0.0, 0.0])
    picture, labels = tensor[:3].byte(), tensor[3:]
    if rng.random() < 0.5:
        brightness_first = rng.random() < 0.5
        factor, turn = rng.uniform(0.9, 1.1), rng.uniform(-0.02, 0.02)
        if brightness_first:
            picture = functional.adjust_brightness(picture, factor)
        picture = functional.adjust_hue(picture, turn)
        if not brightness_first:
            picture = functional.adjust_brightness(picture, factor)
        picture = functional.gaussian_blur(picture, 3, [rng.uniform(0.1, 0.4)])
        if rng.random() < 0.5:
            picture = functional.adjust_sharpness(picture, 1.2)
    nearest = functional.InterpolationMode.NEAREST_EXACT
    whole = [functional.resize(t, [HEIGHT, WIDTH], nearest) for t in (picture, labels)]
    return as_array(whole[0]), as_array(whole[1])[..., 0] > 127.5


def test_sam2lora_is_torchvisions_with_the_same_draws(image, mask, torchvision):
    single = (mask > 0).astype(np.uint8)
    outcomes = set()
    for seed in range(24):
        ours, ours_rng = Sam2LoraAugment(), np.random.default_rng(seed)
        theirs_rng = np.random.default_rng(seed)
        found, found_mask = ours(image, single, ours_rng)
        expected, expected_mask = torchvision_version(torchvision, image, single, theirs_rng)
        assert agreement(found, expected, 7.0) > 0.97, seed
        assert (found_mask == expected_mask).mean() > 0.985, seed
        assert ours_rng.random() == theirs_rng.random(), seed  # as many draws, of the same kinds
        outcomes.add((found != image).any() and found_mask.sum() < single.sum())
    assert outcomes == {True, False}


def count_calls(monkeypatch, augment, calls: int) -> tuple[Counter, list[tuple[str, ...]]]:
    """How often each step is called on a small picture, and the steps of each call in order."""
    names = (
        *("perspective", "resized_crop", "rotate", "affine", "shift_hue", "blur"),
        *("_turn_and_mirror", "_rotate_both", "_crop_of_side", "elastic"),
    )
    order: list[str] = []

    def recorded(name, function):
        def wrapper(*arguments, **options):
            order.append(name)
            return function(*arguments, **options)

        return wrapper

    for name in names:
        original = getattr(paper_augment, name)
        monkeypatch.setattr(paper_augment, name, recorded(name, original))
    rng = np.random.default_rng(7)
    small = rng.integers(0, 256, (16, 12, 3), dtype=np.uint8)
    sequences = []
    for _ in range(calls):
        order.clear()
        augment(small, np.zeros((16, 12), np.uint8), rng, (16, 16))
        sequences.append(tuple(order))
    return Counter(name for sequence in sequences for name in set(sequence)), sequences


PROBABILITIES = {
    "sam2lora": {
        "perspective": 0.5 * 0.6,
        "resized_crop": 0.5,
        "rotate": 0.5,
        "affine": 0.5,
        "shift_hue": 0.5,
        "blur": 0.5,
    },
    "samed": {"_turn_and_mirror": 0.5, "_rotate_both": 0.25},
    "hsam": {
        "_rotate_both": 0.45,
        "_crop_of_side": 0.55 * 0.75,
        "elastic": 0.55 * 0.25 * 0.85,
    },
    "samora": {"_turn_and_mirror": 0.5, "_rotate_both": 0.6, "_crop_of_side": 0.5, "blur": 0.3},
}


@pytest.mark.parametrize("name", PAPERS)
def test_steps_come_as_often_as_in_the_papers_and_in_their_order(monkeypatch, name):
    counts, sequences = count_calls(monkeypatch, augmentation(name), 400)
    for step, probability in PROBABILITIES[name].items():
        spread = math.sqrt(probability * (1 - probability) / 400)
        assert abs(counts[step] / 400 - probability) < 3 * spread, step
    wanted = list(PROBABILITIES[name])
    for sequence in sequences:
        steps = [step for step in dict.fromkeys(sequence) if step in wanted]
        assert steps == sorted(steps, key=wanted.index), sequence
    if name in ("samed", "hsam"):  # one of them or none
        assert all(len([s for s in sequence if s in wanted]) <= 1 for sequence in sequences)


# Colour and blur would hide which label a pixel has.
GEOMETRY = {"sam2lora": Sam2LoraAugment(colour=0.0), "samora": SamoraViews(blur=0.0)}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("frame", [(WIDTH, WIDTH), (HEIGHT, WIDTH)])
def test_image_and_mask_move_together(mask, name, frame):
    augment = {**PAPERS, **GEOMETRY}[name]
    before = painted(mask)
    before.setflags(write=False)
    mask.setflags(write=False)
    seen = set()
    for seed in range(40):
        image, moved = augment(before, mask, np.random.default_rng(seed), frame)
        assert image.dtype == moved.dtype == np.uint8
        assert image.shape == (*moved.shape, 3)
        turned = frame[0] == WIDTH and name in ("samed", "samora")
        allowed = {(HEIGHT, WIDTH), (WIDTH, HEIGHT)} if turned else {(HEIGHT, WIDTH)}
        assert moved.shape in allowed
        assert set(np.unique(moved)) <= {0, 1, 2}
        # Two interpolations may disagree about pixels on a border, the picture's included; SAMora's
        # brightness moves the border as well.
        near = 5 if name == "samora" else 3
        inner = ndimage.minimum_filter(moved, near) == ndimage.maximum_filter(moved, near)
        inner[[0, -1]] = inner[:, [0, -1]] = False
        assert not (inner & (read_back(image) != moved)).any(), seed
        seen.add(moved.tobytes())
    assert len(seen) > 10


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("size", [(16, 12), (7, 90), (1, 1), (1, 9), (2, 3)])
def test_any_size_and_the_same_generator_gives_the_same(name, size):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    labels = rng.integers(0, 4, size, dtype=np.uint8)
    augment = augmentation(name)
    copy = pickle.loads(pickle.dumps(augment))
    assert copy == augment
    for seed in range(20):
        pair = augment(image, labels, np.random.default_rng(seed), (90, 90))
        again = copy(image, labels, np.random.default_rng(seed), (90, 90))
        for one, other in zip(pair, again, strict=True):
            np.testing.assert_array_equal(one, other)
        assert pair[0].shape == (*pair[1].shape, 3)
        assert sorted(pair[1].shape) == sorted(size)
        assert set(np.unique(pair[1])) <= {0, 1, 2, 3}


def test_sam2lora_crops_as_torchvision_does(torchvision):
    import torch
    from torchvision.transforms import RandomResizedCrop

    rng = np.random.default_rng(0)
    boxes = np.array([paper_augment._crop_of_area(480, 700, rng) for _ in range(2000)])
    ours = np.stack(
        [boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank, limits = torch.zeros(1, 480, 700), ([0.08, 1.0], [3 / 4, 4 / 3])
        theirs = np.array([RandomResizedCrop.get_params(blank, *limits) for _ in range(2000)]).T
    for one, other in zip(ours, theirs, strict=True):  # top, left, height, width
        error = math.sqrt(2 / 2000) * other.std()
        assert abs(one.mean() - other.mean()) < 3.5 * error
        np.testing.assert_allclose(one.std(), other.std(), rtol=0.07)


@pytest.mark.parametrize(("shift", "first"), [(0.4, 30), (0.45, 30), (0.55, 31), (0.6, 31)])
def test_a_label_takes_a_pixel_with_half_of_its_weight(shift, first):
    labels = np.zeros((9, 60), np.uint8)
    labels[:, 30:] = 7
    matrix, kind = (1, 0, -shift, 0, 1, 0), Image.Transform.AFFINE
    moved = paper_augment._warp_labels(
        labels, lambda picture: picture.transform((60, 9), kind, matrix, warps.BILINEAR)
    )
    np.testing.assert_array_equal(np.unique(np.array(moved)), [0, 7])
    assert (np.array(moved)[:, 5:] > 0).argmax(axis=1).tolist() == [first - 5] * 9


def test_two_labels_that_touch_leave_no_gap():
    """Between two labels neither has half a pixel's weight alone."""
    labels = np.ones((64, 64), np.uint8)
    labels[:, 30:] = 2
    image = np.zeros((64, 64, 3), np.uint8)
    augment = Sam2LoraAugment(mirror=0.0, geometry=1.0, colour=0.0)
    for seed in range(20):
        moved = augment(image, labels, np.random.default_rng(seed))[1]
        lies, stands = np.flatnonzero((moved > 0).any(0)), np.flatnonzero((moved > 0).any(1))
        inside = moved[stands[0] : stands[-1] + 1, lies[0] : lies[-1] + 1]
        filled = ndimage.binary_fill_holes(inside > 0)
        np.testing.assert_array_equal(filled, inside > 0)


def test_hsam_zooms_a_crop(mask):
    augment = HSamAugment(rotate=0.0, crop=1.0)
    ramp = np.repeat(np.arange(WIDTH, dtype=np.uint8)[None, :, None] * 3, HEIGHT, 0).repeat(3, 2)
    for seed in range(10):
        zoomed, _ = augment(ramp, mask, np.random.default_rng(seed))
        span = np.ptp(zoomed[..., 0].astype(int)) / (3 * (WIDTH - 1))
        assert 0.15 < span < 0.85


def test_samora_uses_the_whole_range_and_keeps_to_it(image, mask):
    still = SamoraViews(turn=0.0, rotate=0.0, crop=0.0, blur=0.0)
    dull = (image // 4 + 40).astype(np.uint8)
    low, high = float(dull.min()), float(dull.max())
    for seed in range(10):
        view, same = still(dull, mask, np.random.default_rng(seed))
        np.testing.assert_array_equal(same, mask)
        rng = np.random.default_rng(seed)
        rng.random(3)  # turn, rotate, crop
        contrast, brightness = rng.uniform(0.85, 1.15), rng.uniform(-0.15, 0.15)
        expected = np.clip((dull - low) / (high - low) * contrast + brightness, 0, 1)
        np.testing.assert_allclose(view, 255 * expected, atol=0.51)
    flat, _ = still(np.full_like(image, 90), mask, np.random.default_rng(0))
    assert np.ptp(flat) == 0


def test_smoothing_is_scipys_gaussian_filter(rng):
    for shape, sigma in (((40, 57), 9.0), ((12, 5), 3.3), ((1, 7), 0.5), ((8, 8), 0.0)):
        field = rng.random(shape)
        expected = ndimage.gaussian_filter(field, sigma)
        np.testing.assert_allclose(smooth(field, sigma), expected, atol=1e-12)


def test_elastic_is_scipys_two_resamplings_in_one(image, mask):
    """As H-SAM has it: an affine map with mirrored borders, then waves with black ones."""
    square, labels = image[:, :HEIGHT], mask[:, :HEIGHT]
    side = HEIGHT
    strengths = {"alpha": 2.0 * side, "sigma": 0.08 * side, "alpha_affine": 0.08 * side}
    for seed in range(4):
        found, moved = elastic(square, labels, np.random.default_rng(seed), **strengths)
        rng = np.random.default_rng(seed)
        centre, third = side // 2, side // 3
        before = np.array([[1, 1], [1, -1], [-1, -1]]) * third + centre
        after = before + rng.uniform(-0.08 * side, 0.08 * side, (3, 2))
        matrix = np.linalg.solve(np.column_stack([after, np.ones(3)]), before).T[::-1]
        way_back, offset = matrix[:, 1::-1], matrix[:, 2]  # of (row, column)
        drawn = [2 * rng.random((side, side)) - 1 for _ in range(2)]
        noise = [ndimage.gaussian_filter(field, 0.08 * side) for field in drawn]
        rows, columns = np.indices((side, side))
        places = rows + 2 * side * noise[1], columns + 2 * side * noise[0]

        def two_steps(array, order, way_back=way_back, offset=offset, places=places):
            straight = ndimage.affine_transform(array, way_back, offset, order=order, mode="mirror")
            return ndimage.map_coordinates(straight, places, order=order, mode="constant")

        expected = np.stack([two_steps(square[..., c].astype(float), 1) for c in range(3)], -1)
        assert agreement(found, expected, 6.0) > 0.97
        assert (moved == two_steps(labels, 0)).mean() > 0.93
        assert 1 < np.abs(2 * side * np.array(noise)).mean() < 8  # pixels, whatever the side


def test_quarter_turns_follow_the_frame(image, mask):
    augment = SamedAugment(turn=1.0)
    versions = {
        augment(image, mask, np.random.default_rng(s), (WIDTH, WIDTH))[1].tobytes()
        for s in range(60)
    }
    group = {
        np.ascontiguousarray(turned).tobytes()
        for k in range(4)
        for turned in (np.rot90(mask, k)[::-1], np.rot90(mask, k)[:, ::-1])
    }
    assert versions == group
    assert len(group) == 4  # a turn and a mirror are always a mirror


def test_augmentations_by_name():
    assert augmentation("strong") is PRESETS["strong"]
    assert augmentation("hsam") == HSamAugment()
    with pytest.raises(
        ValueError,
        match="augmentation 'samseg': expected one of none, light, strong, sam2lora, samed, hsam",
    ):
        augmentation("samseg")
