"""Paired augmentation of image and mask.

Augmentations take and return (image uint8 (h, w, 3) RGB, mask uint8 (h, w) label map) of the
resized, not yet padded picture, so that padding stays padding. They draw from the generator they
are given and from nothing else.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageFilter

from samjax.data.warps import picture_of

Pair = tuple[np.ndarray, np.ndarray]
Pictures = tuple[Image.Image, Image.Image]


class Augmentation(Protocol):
    """What `make_loader` takes: `Augment`, one of `paper_augment`, or your own.

    Gets image uint8 (h, w, 3) and mask uint8 (h, w), which it must not write into, and returns the
    like, of the same size or any other that fits into `frame_size` (h, w). `rng` is its only source
    of chance. For worker processes it must be picklable.
    """

    def __call__(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        rng: np.random.Generator,
        frame_size: tuple[int, int] | None = None,
        /,
    ) -> Pair: ...


def on_arrays(change: Callable[..., Pictures]) -> Callable[..., Pair]:
    """A change of Pillow pictures as one of arrays, uint8 (h, w, 3) and (h, w).

    `__wrapped__` is the change itself: in a chain of them an array is not made after each, which
    took a fifth of the time.
    """

    @wraps(change)
    def changed(
        image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, **options: Any
    ) -> Pair:
        pictures = change(picture_of(image), picture_of(mask), rng, **options)
        return np.array(pictures[0]), np.array(pictures[1])

    return changed


@on_arrays
def random_flip(
    image: Image.Image,
    mask: Image.Image,
    rng: np.random.Generator,
    *,
    horizontal: float = 0.5,
    vertical: float = 0.5,
) -> Pictures:
    """Mirrors left-right and top-bottom, each with its own probability."""
    for probability, way in (
        (horizontal, Image.Transpose.FLIP_LEFT_RIGHT),
        (vertical, Image.Transpose.FLIP_TOP_BOTTOM),
    ):
        if rng.random() < probability:
            image, mask = image.transpose(way), mask.transpose(way)
    return image, mask


@on_arrays
def random_rot90(
    image: Image.Image,
    mask: Image.Image,
    rng: np.random.Generator,
    *,
    frame_size: tuple[int, int] | None = None,
) -> Pictures:
    """Turns by 0, 90, 180 or 270 degrees, evenly.

    Where the turned picture would not fit into `frame_size` (h, w), only by 0 or 180.
    """
    width, height = mask.size
    lies_fit = frame_size is None or (width <= frame_size[0] and height <= frame_size[1])
    turns = int(rng.integers(4)) if lies_fit else 2 * int(rng.integers(2))
    if turns:
        ways = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
        image, mask = image.transpose(ways[turns - 1]), mask.transpose(ways[turns - 1])
    return image, mask


@on_arrays
def random_affine(
    image: Image.Image,
    mask: Image.Image,
    rng: np.random.Generator,
    *,
    rotate: float = 0.0,
    scale: float = 0.0,
    shift: float = 0.0,
) -> Pictures:
    """Rotates, scales and shifts about the centre in one resampling; the size stays.

    The image is interpolated bilinearly, the mask takes the nearest pixel; what comes from
    outside is black and background.

    Args:
        rotate: largest angle either way, in degrees (a positive draw turns clockwise).
        scale: largest relative enlargement, 0.25 draws factors from 1/1.25 to 1.25.
        shift: largest shift either way, as a fraction of height and width.
    """
    width, height = mask.size
    angle = math.radians(rng.uniform(-rotate, rotate))
    factor = math.exp(rng.uniform(-1.0, 1.0) * math.log1p(scale))
    shift_y, shift_x = rng.uniform(-shift, shift, 2) * (height, width)
    # Pillow wants the way from output to input: undo the shift, turn and shrink about the centre.
    cos, sin = math.cos(angle) / factor, math.sin(angle) / factor
    centre_x, centre_y = width / 2 + shift_x, height / 2 + shift_y
    matrix = (
        *(cos, sin, width / 2 - cos * centre_x - sin * centre_y),
        *(-sin, cos, height / 2 + sin * centre_x - cos * centre_y),
    )

    def warp(picture: Image.Image, method: Image.Resampling) -> Image.Image:
        affine = Image.Transform.AFFINE
        return picture.transform((width, height), affine, matrix, method, fillcolor=0)

    return warp(image, Image.Resampling.BILINEAR), warp(mask, Image.Resampling.NEAREST)


@on_arrays
def random_colour(
    image: Image.Image,
    mask: Image.Image,
    rng: np.random.Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    gamma: float = 0.0,
    colour: float = 0.0,
) -> Pictures:
    """Changes gamma, then contrast about the image's mean, channel gains and brightness.

    All of it in one look-up table a channel, rounded once. The mask is returned as it is.

    Args:
        brightness: largest offset either way, as a fraction of 255.
        contrast: 0.2 draws factors from 1/1.2 to 1.2.
        gamma: 0.2 draws exponents from 1/1.2 to 1.2.
        colour: 0.1 draws one gain a channel, from 1/1.1 to 1.1.
    """

    def factors(strength: float, count: int) -> np.ndarray:
        return np.exp(rng.uniform(-1.0, 1.0, count) * math.log1p(strength))

    levels = (np.arange(256) / 255.0) ** factors(gamma, 1)
    mean = levels[np.asarray(image)[::4, ::4]].mean()  # every 16th pixel is plenty for a mean
    levels = mean + (levels - mean) * factors(contrast, 1)
    table = factors(colour, 3)[:, None] * levels + rng.uniform(-brightness, brightness)
    table = np.clip(np.rint(255.0 * table), 0, 255).astype(np.uint8)
    return image.point(table.ravel().tolist()), mask


@on_arrays
def random_blur(
    image: Image.Image, mask: Image.Image, rng: np.random.Generator, *, sigma: float = 0.0
) -> Pictures:
    """Gaussian blur of a width drawn from 0 to `sigma` pixels. The mask is returned as it is."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.0, sigma))), mask


@on_arrays
def random_noise(
    image: Image.Image, mask: Image.Image, rng: np.random.Generator, *, std: float = 0.0
) -> Pictures:
    """Adds Gaussian noise of a strength drawn from 0 to `std` grey levels. The mask stays."""
    pixels = np.asarray(image)
    noisy = rng.standard_normal(pixels.shape, dtype=np.float32)
    noisy *= rng.uniform(0.0, std)  # in place from here on: the arrays are large
    noisy += pixels
    np.clip(np.rint(noisy, out=noisy), 0, 255, out=noisy)
    return Image.fromarray(noisy.astype(np.uint8)), mask


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Which augmentations, how strong; see the functions of this file. The default does nothing.

    Order: colour, blur, noise, then flip, turn, affine. Geometry comes last so that what it
    draws in from outside stays black.
    """

    flip_horizontal: float = 0.0  # probability
    flip_vertical: float = 0.0  # probability
    rot90: bool = False  # quarter turns
    rotate: float = 0.0  # degrees
    scale: float = 0.0  # relative
    shift: float = 0.0  # fraction of the side
    brightness: float = 0.0  # fraction of 255
    contrast: float = 0.0  # relative
    gamma: float = 0.0  # relative
    colour: float = 0.0  # relative, a channel
    blur: float = 0.0  # sigma in pixels
    noise: float = 0.0  # grey levels
    probability: float = 1.0  # that each of colour, blur, noise and affine is applied

    @classmethod
    def preset(cls, name: str) -> "Augment":
        """`none`, `light` or `strong`.

        Raises:
            ValueError: another name.
        """
        if name not in PRESETS:
            raise ValueError(f"augmentation {name!r}: expected one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def __call__(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        rng: np.random.Generator,
        frame_size: tuple[int, int] | None = None,
    ) -> Pair:
        """Augments image uint8 (h, w, 3) and mask uint8 (h, w) alike.

        The result has the same size, or (w, h) after a quarter turn, which is only made where
        that fits into `frame_size` (h, w).
        """

        def applies(*strengths: float) -> bool:
            return any(strengths) and rng.random() < self.probability

        pictures: Pictures | None = None

        def change(by: Callable[..., Pair], **strengths: Any) -> None:
            nonlocal pictures
            before = pictures or (picture_of(image), picture_of(mask))
            pictures = by.__wrapped__(*before, rng, **strengths)  # type: ignore[attr-defined]

        if applies(self.brightness, self.contrast, self.gamma, self.colour):
            change(
                random_colour,
                brightness=self.brightness,
                contrast=self.contrast,
                gamma=self.gamma,
                colour=self.colour,
            )
        if applies(self.blur):
            change(random_blur, sigma=self.blur)
        if applies(self.noise):
            change(random_noise, std=self.noise)
        if self.flip_horizontal or self.flip_vertical:
            change(random_flip, horizontal=self.flip_horizontal, vertical=self.flip_vertical)
        if self.rot90:
            change(random_rot90, frame_size=frame_size)
        if applies(self.rotate, self.scale, self.shift):
            change(random_affine, rotate=self.rotate, scale=self.scale, shift=self.shift)
        if pictures is None:
            return image, mask
        return np.asarray(pictures[0]), np.asarray(pictures[1])


PRESETS = {
    "none": Augment(),
    # What a second photograph of the same eye would show.
    "light": Augment(
        flip_horizontal=0.5,
        rotate=10.0,
        scale=0.1,
        shift=0.05,
        brightness=0.05,
        contrast=0.1,
        gamma=0.1,
        colour=0.05,
        probability=0.8,
    ),
    # Another camera, another operator; every orientation.
    "strong": Augment(
        flip_horizontal=0.5,
        flip_vertical=0.5,
        rot90=True,
        rotate=30.0,
        scale=0.25,
        shift=0.1,
        brightness=0.15,
        contrast=0.3,
        gamma=0.3,
        colour=0.15,
        blur=1.0,
        noise=8.0,
        probability=0.8,
    ),
}
