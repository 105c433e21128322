"""Paired augmentation of image and mask.

Augmentations take and return (image uint8 (h, w, 3) RGB, mask uint8 (h, w) label map) of the
resized, not yet padded picture, so that padding stays padding. They draw from the generator they
are given and from nothing else.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageFilter

Pair = tuple[np.ndarray, np.ndarray]


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


def random_flip(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    *,
    horizontal: float = 0.5,
    vertical: float = 0.5,
) -> Pair:
    """Mirrors left-right and top-bottom, each with its own probability."""
    if rng.random() < horizontal:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if rng.random() < vertical:
        image, mask = image[::-1], mask[::-1]
    return image, mask


def random_rot90(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    *,
    frame_size: tuple[int, int] | None = None,
) -> Pair:
    """Turns by 0, 90, 180 or 270 degrees, evenly.

    Where the turned picture would not fit into `frame_size` (h, w), only by 0 or 180.
    """
    height, width = mask.shape
    lies_fit = frame_size is None or (width <= frame_size[0] and height <= frame_size[1])
    turns = int(rng.integers(4)) if lies_fit else 2 * int(rng.integers(2))
    return np.rot90(image, turns), np.rot90(mask, turns)


def random_affine(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    *,
    rotate: float = 0.0,
    scale: float = 0.0,
    shift: float = 0.0,
) -> Pair:
    """Rotates, scales and shifts about the centre in one resampling; the size stays.

    The image is interpolated bilinearly, the mask takes the nearest pixel; what comes from
    outside is black and background.

    Args:
        rotate: largest angle either way, in degrees (a positive draw turns clockwise).
        scale: largest relative enlargement, 0.25 draws factors from 1/1.25 to 1.25.
        shift: largest shift either way, as a fraction of height and width.
    """
    height, width = mask.shape
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

    def warp(array: np.ndarray, method: Image.Resampling) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(array))
        affine = Image.Transform.AFFINE
        return np.array(picture.transform((width, height), affine, matrix, method, fillcolor=0))

    return warp(image, Image.Resampling.BILINEAR), warp(mask, Image.Resampling.NEAREST)


def random_colour(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    gamma: float = 0.0,
    colour: float = 0.0,
) -> Pair:
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
    mean = levels[image[::4, ::4]].mean()  # every 16th pixel is plenty for a mean
    levels = mean + (levels - mean) * factors(contrast, 1)
    table = factors(colour, 3)[:, None] * levels + rng.uniform(-brightness, brightness)
    table = np.clip(np.rint(255.0 * table), 0, 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.array(picture.point(table.ravel().tolist())), mask


def random_blur(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, *, sigma: float = 0.0
) -> Pair:
    """Gaussian blur of a width drawn from 0 to `sigma` pixels. The mask is returned as it is."""
    blur = ImageFilter.GaussianBlur(rng.uniform(0.0, sigma))
    return np.array(Image.fromarray(np.ascontiguousarray(image)).filter(blur)), mask


def random_noise(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, *, std: float = 0.0
) -> Pair:
    """Adds Gaussian noise of a strength drawn from 0 to `std` grey levels. The mask stays."""
    noisy = rng.standard_normal(image.shape, dtype=np.float32)
    noisy *= rng.uniform(0.0, std)  # in place from here on: the arrays are large
    noisy += image
    np.clip(np.rint(noisy, out=noisy), 0, 255, out=noisy)
    return noisy.astype(np.uint8), mask


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

        if applies(self.brightness, self.contrast, self.gamma, self.colour):
            image, mask = random_colour(
                image,
                mask,
                rng,
                brightness=self.brightness,
                contrast=self.contrast,
                gamma=self.gamma,
                colour=self.colour,
            )
        if applies(self.blur):
            image, mask = random_blur(image, mask, rng, sigma=self.blur)
        if applies(self.noise):
            image, mask = random_noise(image, mask, rng, std=self.noise)
        if self.flip_horizontal or self.flip_vertical:
            image, mask = random_flip(
                image, mask, rng, horizontal=self.flip_horizontal, vertical=self.flip_vertical
            )
        if self.rot90:
            image, mask = random_rot90(image, mask, rng, frame_size=frame_size)
        if applies(self.rotate, self.scale, self.shift):
            image, mask = random_affine(
                image, mask, rng, rotate=self.rotate, scale=self.scale, shift=self.shift
            )
        return image, mask


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
