"""Views of a picture for contrastive training: SimCLR's, and those of SAMora's image expert.

A view is a function of (image uint8 (h, w, 3), rng) to uint8 (side, side, 3); `rng` is its only
source of chance, and the image is not written into. Call it twice for the two views of a picture.
With options set by `functools.partial` it is picklable, for worker processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from samjax.data.images import DataError
from samjax.data.paper_augment import SamoraViews, _crop_of_area
from samjax.data.warps import BICUBIC, blur, picture_of, resized_crop

GREY = np.array([0.2989, 0.587, 0.114], np.float32)  # TensorFlow's weights of red, green, blue


def simclr_view(
    image: np.ndarray, rng: np.random.Generator, *, side: int = 224, strength: float = 1.0
) -> np.ndarray:
    """A view as SimCLRv2 draws it, uint8 (side, side, 3).

    arXiv 2002.05709, appendix A, with the multiplied brightness of arXiv 2006.10029;
    google-research/simclr@383d414, ``data_util.py``. In this order: a crop of 8 to 100 % of the
    area with sides of 3/4 to 4/3, resized; half the times mirrored left-right; `jitter` 8 times of
    10; grey 2 times of 10; half the times a Gaussian blur over a tenth of the side, sigma 0.1 to 2
    pixels.

    Upstream resizes without a low-pass, blurs beside zeros, and its crops cover 10 % at least (a
    default of TensorFlow's sampler); here Pillow's bicubic filter resizes and the rim is mirrored.

    Args:
        strength: of the jitter; 1 is upstream's for ImageNet.

    Raises:
        DataError: the image is not uint8 (h, w, 3).
        ValueError: a side that is not positive, a strength that is negative.
    """
    _check(image, side)
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength is {strength}, expected 0 or more, and finite")
    height, width, _ = image.shape
    box = _crop_of_area(height, width, rng)
    cut = resized_crop(picture_of(image), box, (side, side), BICUBIC)
    values = np.asarray(cut, np.float32) / 255
    if rng.random() < 0.5:
        values = values[:, ::-1]
    if rng.random() < 0.8:
        values = jitter(values, rng, strength)
    if rng.random() < 0.2:
        values = np.repeat((values @ GREY)[..., None], 3, axis=-1)
    if rng.random() < 0.5:
        taps = 2 * (side // 10 // 2) + 1
        values = blur(values, taps, rng.uniform(0.1, 2.0))
    return np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)


def samora_view(image: np.ndarray, rng: np.random.Generator, *, side: int = 224) -> np.ndarray:
    """A view as SAMora's image expert and its teacher see it, uint8 (side, side, 3).

    `SamoraViews` (arXiv 2511.08626; ShChen233/SAMora, ``datasets/dataset_unlabeled.py``) of the
    whole picture, which is then stretched to the square by Pillow's bicubic filter.

    Raises:
        DataError: the image is not uint8 (h, w, 3).
        ValueError: a side that is not positive.
    """
    _check(image, side)
    nothing = np.zeros(image.shape[:2], np.uint8)
    view, _ = SamoraViews()(image, nothing, rng)
    return np.array(picture_of(view).resize((side, side), BICUBIC))


def jitter(values: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """SimCLR's colour jitter of float32 (h, w, 3) in 0..1, the like.

    Brightness, contrast and saturation times 1 - 0.8 `strength` to 1 + 0.8 `strength`, not below 0,
    and hue turned by 0.2 `strength` of the circle either way: in an order that is drawn as well,
    cut off at 0 and 1 after each. On a grey picture the last two do nothing.
    """

    def factor() -> float:
        return rng.uniform(max(1 - 0.8 * strength, 0), 1 + 0.8 * strength)

    steps: list[Callable[[np.ndarray], np.ndarray]] = [
        lambda x: x * np.float32(factor()),
        lambda x: change_contrast(x, factor()),
        lambda x: change_saturation(x, factor()),
        lambda x: turn_hue(x, rng.uniform(-0.2, 0.2) * strength),
    ]
    for index in rng.permutation(4):
        values = np.clip(steps[index](values), 0, 1)
    return values


def change_contrast(values: np.ndarray, factor: float) -> np.ndarray:
    """Moves float32 (h, w, 3) away from each channel's mean; as ``tf.image.adjust_contrast``."""
    mean = values.mean((0, 1), keepdims=True)
    return mean + np.float32(factor) * (values - mean)


def change_saturation(values: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies the saturation of float32 (h, w, 3) in 0..1, which stays below 1.

    As ``tf.image.adjust_saturation``: hue and value of HSV stay, so that each channel moves away
    from the largest one.
    """
    largest = values.max(-1, keepdims=True)
    chroma = largest - values.min(-1, keepdims=True)
    ratio = np.minimum(np.float32(factor), largest / np.maximum(chroma, np.float32(1e-12)))
    return largest - ratio * (largest - values)


def turn_hue(values: np.ndarray, turn: float) -> np.ndarray:
    """Adds `turn` (1 is the whole circle) to the hue of float32 (h, w, 3) in 0..1.

    As ``tf.image.adjust_hue``: saturation and value of HSV stay.
    """
    red, green, blue = np.moveaxis(values, -1, 0)
    largest = values.max(-1)
    chroma = largest - values.min(-1)
    safe = np.where(chroma > 0, chroma, np.float32(1))
    hue = np.where(
        largest == red,
        (green - blue) / safe,
        np.where(largest == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )  # in sixths of the circle
    # Each channel is on for a third of the circle around its own hue, and ramps over a sixth.
    own = np.array([0, 2, 4], np.float32)
    away = np.abs((hue[..., None] + np.float32(6 * turn) - own + 3) % 6 - 3)
    return largest[..., None] - chroma[..., None] * np.clip(away - 1, 0, 1)


def _check(image: np.ndarray, side: int) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise DataError(f"an image of {image.dtype} {image.shape}, expected uint8 (h, w, 3)")
    if side < 1:
        raise ValueError(f"side is {side}, expected 1 or more pixels")
