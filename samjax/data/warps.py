"""The operations that the papers' augmentations are made of, for given strengths: no chance here.

Geometry takes and returns Pillow pictures; a pixel that comes from outside is black. Pillow and the
libraries of the papers (torchvision, scipy) agree about where pixel centres lie, and about nearly
every pixel; they differ in the rim of one pixel, where Pillow repeats the last pixel for half a
pixel and the others fade or cut.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from scipy import ndimage

NEAREST, BILINEAR, BICUBIC = (
    Image.Resampling.NEAREST,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
)


def picture_of(array: np.ndarray) -> Image.Image:
    """uint8 (h, w) or (h, w, 3), flipped or turned views too, as a Pillow picture."""
    return Image.fromarray(np.ascontiguousarray(array))


def rotate(picture: Image.Image, degrees: float, method: Image.Resampling = NEAREST) -> Image.Image:
    """Turns counter-clockwise about the centre; as ``scipy.ndimage.rotate(reshape=False)``."""
    return picture.rotate(degrees, method)


def affine(
    picture: Image.Image, degrees: float, shift: tuple[int, int], scale: float
) -> Image.Image:
    """Turns clockwise and scales about the centre, then shifts by (x, y) pixels; nearest pixel.

    As ``torchvision.transforms.functional.affine``.
    """
    cos, sin = (f(math.radians(degrees)) / scale for f in (math.cos, math.sin))
    x, y = picture.width / 2, picture.height / 2
    from_x, from_y = x + shift[0], y + shift[1]
    matrix = (
        *(cos, sin, x - cos * from_x - sin * from_y),
        *(-sin, cos, y + sin * from_x - cos * from_y),
    )
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, NEAREST)


def perspective(picture: Image.Image, corners: np.ndarray) -> Image.Image:
    """Moves the corner pixels to `corners` (4, 2), (x, y), clockwise from the top left; bilinear.

    As ``torchvision.transforms.functional.perspective``: pixel indices are taken for points.
    """
    right, bottom = picture.width - 1.0, picture.height - 1.0
    before = np.array([[0.0, 0.0], [right, 0.0], [right, bottom], [0.0, bottom]])
    # Eight unknowns of the way back: before = (a x + b y + c, d x + e y + f) / (g x + h y + 1).
    rows, known = [], []
    for (x, y), (u, v) in zip(corners, before, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        known += [u, v]
    # Least squares: in a picture one pixel high two corners are one.
    coefficients = np.linalg.lstsq(np.array(rows, np.float64), np.array(known), rcond=None)[0]
    kind = Image.Transform.PERSPECTIVE
    return picture.transform(picture.size, kind, tuple(coefficients), BILINEAR)


def resized_crop(
    picture: Image.Image,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    method: Image.Resampling = BILINEAR,
) -> Image.Image:
    """Cuts out `box` (left, top, right, bottom), then resizes that alone to `size` (w, h)."""
    return picture.crop(box).resize(size, method)


def blur(image: np.ndarray, taps: int, sigma: float) -> np.ndarray:
    """Gaussian blur of (h, w, 3) with `taps` pixels either way, mirrored at the rim; float32.

    As OpenCV's and torchvision's ``GaussianBlur``.
    """
    at = np.arange(taps) - (taps - 1) / 2
    weights = np.exp(-0.5 * (at / sigma) ** 2)
    weights /= weights.sum()
    blurred = image.astype(np.float32)
    for axis in (0, 1):
        blurred = ndimage.correlate1d(blurred, weights, axis, mode="mirror")
    return blurred


def shift_hue(picture: Image.Image, turn: float) -> Image.Image:
    """Adds `turn` (1 is the whole circle) to the hue of an RGB picture.

    As ``torchvision.transforms.functional.adjust_hue`` of a Pillow picture, where hue has 256
    steps. Ten times as fast as that of a tensor, from which it differs by a few grey levels.
    """
    hue, saturation, value = picture.convert("HSV").split()
    step = round(256 * turn)
    hue = hue.point([(level + step) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
