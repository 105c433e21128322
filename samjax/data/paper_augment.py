"""The augmentations of the papers that samjax reproduces, as their released code has them.

Each is an `Augmentation`: one call draws one version of a picture. They follow the code, not the
text, in order and probabilities. SAMSEG (Chikumbu 2024) has none, which is `none` here.

What differs from upstream in all of them: the picture has already been resized to the frame and
gets back that size, where upstream augments the picture of the file and resizes last; labels are
never mixed, so that no label appears that was not there. Upstream's pictures are all square; what
is drawn for a side here is drawn for height and width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance

from samjax.data.elastic import elastic
from samjax.data.transforms import PRESETS, Augmentation, Pair, random_flip, random_rot90
from samjax.data.warps import (
    BICUBIC,
    BILINEAR,
    NEAREST,
    affine,
    blur,
    perspective,
    picture_of,
    resized_crop,
    rotate,
    shift_hue,
)

FrameSize = tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Sam2LoraAugment:
    """SAM2LoRA's (arXiv 2510.10288; sayanmndl21/SAM2LoRA, ``train.py``), for fundus photographs.

    In this order: mirror left-right, mirror top-bottom; all of the geometry or none of it
    (perspective, crop of 8 to 100 % of the area resized to 1000/1024 of each side, rotation by up
    to 8 degrees, then affine: up to 8 degrees, 20 % shift, scale 0.2 to 0.8); all of the colour or
    none of it (brightness and hue in either order, blur of 3x3 pixels, sharpness half the times);
    back to the size of the picture by the nearest pixel.

    The mask goes through the same interpolations as the image, one picture a label, and the
    strongest label wins. With one label that is upstream's threshold of one half.
    """

    mirror: float = 0.5  # probability of each of the two
    geometry: float = 0.5  # probability of all of it
    colour: float = 0.5  # probability of all of it

    def __call__(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        rng: np.random.Generator,
        frame_size: FrameSize = None,
    ) -> Pair:
        """See `Augmentation`; the size stays."""
        height, width = mask.shape
        image, mask = random_flip(image, mask, rng, horizontal=self.mirror, vertical=self.mirror)
        picture, labels = picture_of(image), picture_of(mask)
        if rng.random() < self.geometry:
            warp = _fundus_geometry(height, width, rng)
            picture, labels = warp(picture), _warp_labels(mask, warp)
        if rng.random() < self.colour:
            picture = _fundus_colour(picture, rng)
        size = (width, height)
        return np.array(picture.resize(size, NEAREST)), np.array(labels.resize(size, NEAREST))


Warp = Callable[[Image.Image], Image.Image]


def _fundus_geometry(height: int, width: int, rng: np.random.Generator) -> Warp:
    steps: list[Warp] = []
    if rng.random() < 0.6:
        far_x, far_y = int(0.1 * (width // 2)), int(0.1 * (height // 2))
        moves = [(rng.integers(far_x + 1), rng.integers(far_y + 1)) for _ in range(4)]
        right, bottom = width - 1, height - 1
        signs = [(0, 0, 1, 1), (right, 0, -1, 1), (right, bottom, -1, -1), (0, bottom, 1, -1)]
        corners = [
            (x + to_x * dx, y + to_y * dy)
            for (x, y, to_x, to_y), (dx, dy) in zip(signs, moves, strict=True)
        ]
        steps.append(partial(perspective, corners=np.array(corners, np.float64)))
    size = max(round(width * 1000 / 1024), 1), max(round(height * 1000 / 1024), 1)
    steps.append(partial(resized_crop, box=_crop_of_area(height, width, rng), size=size))
    steps.append(partial(rotate, degrees=rng.uniform(-8.0, 8.0)))
    degrees = rng.uniform(-8.0, 8.0)
    shift = round(size[0] * rng.uniform(-0.2, 0.2)), round(size[1] * rng.uniform(-0.2, 0.2))
    steps.append(partial(affine, degrees=degrees, shift=shift, scale=rng.uniform(0.2, 0.8)))

    def warp(picture: Image.Image) -> Image.Image:
        for step in steps:
            picture = step(picture)
        return picture

    return warp


def _crop_of_area(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) as torchvision's ``RandomResizedCrop`` draws it."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _box_anywhere(height, width, h, w, rng)
    # The whole picture, or as much from its middle as has an allowed ratio.
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _warp_labels(mask: np.ndarray, warp: Warp) -> Image.Image:
    """Each label's own picture of 0 and 255 is warped; what they leave is background."""
    labels = [label for label in np.unique(mask) if label]
    shares = [np.array(warp(picture_of(np.uint8(255) * (mask == label)))) for label in labels]
    if not shares:
        return warp(picture_of(mask))
    rest = 255 - np.sum(shares, axis=0, dtype=np.int32)
    winner = np.argmax(np.stack([rest, *shares]), axis=0)
    return picture_of(np.array([0, *labels], np.uint8)[winner])


def _fundus_colour(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    brightness_first = rng.random() < 0.5
    factor, turn = rng.uniform(0.9, 1.1), rng.uniform(-0.02, 0.02)
    brighten, recolour = ImageEnhance.Brightness, partial(shift_hue, turn=turn)
    if brightness_first:
        picture = recolour(brighten(picture).enhance(factor))
    else:
        picture = brighten(recolour(picture)).enhance(factor)
    picture = picture_of(
        np.rint(blur(np.array(picture), 3, rng.uniform(0.1, 0.4))).astype(np.uint8)
    )
    return ImageEnhance.Sharpness(picture).enhance(1.2) if rng.random() < 0.5 else picture


@dataclass(frozen=True, kw_only=True)
class SamedAugment:
    """SAMed's (arXiv 2304.13785; hitachinsk/SAMed, ``datasets/dataset_synapse.py``), for CT.

    Half the times a quarter turn (any of four, where it fits the frame) and a mirror along one of
    the axes; else half the times a rotation by a whole number of degrees from -20 to 19, nearest
    pixel. MedSAGa trains with the same.
    """

    turn: float = 0.5  # probability
    rotate: float = 0.5  # probability, where it was not turned

    def __call__(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        rng: np.random.Generator,
        frame_size: FrameSize = None,
    ) -> Pair:
        """See `Augmentation`; the size stays or is turned."""
        if rng.random() < self.turn:
            return _turn_and_mirror(image, mask, rng, frame_size)
        if rng.random() < self.rotate:
            return _rotate_both(image, mask, int(rng.integers(-20, 20)), NEAREST)
        return image, mask


@dataclass(frozen=True, kw_only=True)
class HSamAugment:
    """H-SAM's (CVPR 2024; Cccccczh404/H-SAM, ``datasets/dataset_synapse.py``).

    The first of these that is drawn: a rotation by a whole number of degrees from -20 to 19,
    nearest pixel; a crop of 0.2 to 0.8 of both sides, zoomed back; an elastic deformation.

    Upstream zooms by a cubic spline, here Pillow's bicubic filter does, at a tenth of the time.
    """

    rotate: float = 0.45  # probability
    crop: float = 0.75  # probability, where it was not rotated
    elastic: float = 0.85  # probability, where it was not cropped either

    def __call__(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        rng: np.random.Generator,
        frame_size: FrameSize = None,
    ) -> Pair:
        """See `Augmentation`; the size stays."""
        height, width = mask.shape
        if rng.random() < self.rotate:
            return _rotate_both(image, mask, int(rng.integers(-20, 20)), NEAREST)
        if rng.random() < self.crop:
            box = _crop_of_side(height, width, rng.uniform(0.2, 0.8), rng)
            cut = partial(resized_crop, box=box, size=(width, height))
            zoomed, labels = (
                cut(picture_of(image), method=BICUBIC),
                cut(picture_of(mask), method=NEAREST),
            )
            return np.array(zoomed), np.array(labels)
        if rng.random() < self.elastic:
            side = min(height, width)
            strengths = {"alpha": 2.0 * side, "sigma": 0.08 * side, "alpha_affine": 0.08 * side}
            return elastic(image, mask, rng, **strengths)
        return image, mask


@dataclass(frozen=True, kw_only=True)
class SamoraViews:
    """A view for SAMora's image expert (arXiv 2511.08626; ShChen233/SAMora, ``datasets/``).

    Call it twice for the two views of a picture. Upstream has no masks at this stage; one that is
    given is moved along.

    In this order: a quarter turn and a mirror; a rotation by a whole number of degrees from -20 to
    20, bilinear; a crop of 0.6 to 1 of both sides; always the smallest value to 0 and the largest
    to 1, contrast times 0.85 to 1.15, brightness plus -0.15 to 0.15, cut off at 0 and 1; a blur
    of 3 or 5 pixels; the crop zoomed back.

    Upstream has floats throughout and zooms by a cubic spline; here the result is uint8 again, and
    Pillow's bicubic filter zooms.
    """

    turn: float = 0.5  # probability
    rotate: float = 0.6  # probability
    crop: float = 0.5  # probability
    blur: float = 0.3  # probability

    def __call__(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        rng: np.random.Generator,
        frame_size: FrameSize = None,
    ) -> Pair:
        """See `Augmentation`; the size stays or is turned."""
        if rng.random() < self.turn:
            image, mask = _turn_and_mirror(image, mask, rng, frame_size)
        if rng.random() < self.rotate:
            image, mask = _rotate_both(image, mask, int(rng.integers(-20, 21)), BILINEAR)
        height, width = mask.shape
        if rng.random() < self.crop:
            left, top, right, bottom = _crop_of_side(height, width, rng.uniform(0.6, 1.0), rng)
            image, mask = image[top:bottom, left:right], mask[top:bottom, left:right]
        low, high = float(image.min()), float(image.max())
        values = (image.astype(np.float32) - low) / max(high - low, 1.0)
        contrast, brightness = rng.uniform(0.85, 1.15), rng.uniform(-0.15, 0.15)
        values = np.clip(values * contrast + brightness, 0.0, 1.0)
        if rng.random() < self.blur:
            values = blur(values, int(rng.choice((3, 5))), rng.uniform(0.6, 1.4))
        image = np.rint(255.0 * values).astype(np.uint8)
        if mask.shape == (height, width):
            return image, mask
        size = (width, height)
        zoomed = picture_of(image).resize(size, BICUBIC)
        return np.array(zoomed), np.array(picture_of(mask).resize(size, NEAREST))


def _turn_and_mirror(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, frame_size: FrameSize
) -> Pair:
    image, mask = random_rot90(image, mask, rng, frame_size=frame_size)
    axis = int(rng.integers(2))
    return np.flip(image, axis), np.flip(mask, axis)


def _rotate_both(
    image: np.ndarray, mask: np.ndarray, degrees: int, method: Image.Resampling
) -> Pair:
    turned = rotate(picture_of(image), degrees, method)
    return np.array(turned), np.array(rotate(picture_of(mask), degrees, NEAREST))


def _crop_of_side(
    height: int, width: int, ratio: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) with `ratio` of both sides, anywhere in the picture."""
    h, w = max(int(height * ratio), 1), max(int(width * ratio), 1)
    return _box_anywhere(height, width, h, w, rng)


def _box_anywhere(
    height: int, width: int, h: int, w: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop of h rows and w columns; its top is drawn first."""
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    return left, top, left + w, top + h


PAPERS: dict[str, Augmentation] = {
    "sam2lora": Sam2LoraAugment(),
    "samed": SamedAugment(),
    "hsam": HSamAugment(),
    "samora": SamoraViews(),
}


def augmentation(name: str) -> Augmentation:
    """By name: `none`, `light` or `strong` of `Augment.preset`, or one of `PAPERS`.

    Raises:
        ValueError: another name.
    """
    known = {**PRESETS, **PAPERS}
    if name not in known:
        raise ValueError(f"augmentation {name!r}: expected one of {', '.join(known)}")
    return known[name]
