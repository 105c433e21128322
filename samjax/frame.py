"""How an image is laid into the model's frame, and what that does to coordinates.

The frame is the model's input size, and there are two ways to fill it. SAM's is "pad": an image is
resized to fit with its aspect kept and padded with zeros at the bottom and the right, as upstream's
`ResizeLongestSide` (segment_anything/utils/transforms.py) does for a square. SAM 2's is "stretch":
it is resized to the frame whatever its aspect. Pixels come from Pillow, as upstream's do.

Training data and the predictor share this file; it imports neither, and no JAX.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

Fit = Literal["pad", "stretch"]


def size_in_frame(
    original_size: tuple[int, int], frame_size: tuple[int, int], fit: Fit
) -> tuple[int, int]:
    """(h, w) in pixels of the part of the frame (h, w) that an image of `original_size` fills."""
    return frame_size if fit == "stretch" else resized_size(original_size, frame_size)


def resized_size(original_size: tuple[int, int], frame_size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) in pixels that an image of `original_size` (h, w) has inside the frame (h, w)."""
    height, width = original_size
    scale = min(frame_size[0] / height, frame_size[1] / width)
    # At least one pixel: upstream would make an empty image of a 1x5000 one.
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image, uint8 (h, w, 3), or a label map, uint8 (h, w), to `size` (h, w) pixels.

    Images by Pillow's antialiased bilinear filter, label maps by the nearest pixel.
    """
    method = Image.Resampling.BILINEAR if array.ndim == 3 else Image.Resampling.NEAREST
    return np.array(Image.fromarray(array).resize((size[1], size[0]), method))


def pad_to_frame(array: np.ndarray, frame_size: tuple[int, int]) -> np.ndarray:
    """Pads an (h, w, …) array with zeros at the bottom and the right to `frame_size` (h, w)."""
    padded = np.zeros((*frame_size, *array.shape[2:]), array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    return padded


def resize_to_frame(
    array: np.ndarray, frame_size: tuple[int, int]
) -> tuple[np.ndarray, tuple[int, int]]:
    """`resize`, aspect kept, to fit `frame_size` (h, w), then `pad_to_frame`.

    Args:
        array: image uint8 (h, w, 3) or label map uint8 (h, w).

    Returns:
        The array of `frame_size`, and the size (h, w) of its part that is not padding.
    """
    size = resized_size(array.shape[:2], frame_size)
    return pad_to_frame(resize(array, size), frame_size), size


def scale_coords(
    coords: np.ndarray, original_size: tuple[int, int], frame_size: tuple[int, int]
) -> np.ndarray:
    """Points (…, 2), (x, y) in pixels of the original image, to pixels of the frame; float64.

    The factors are those of the rounded size, so x and y may be scaled a little differently.
    """
    new_height, new_width = resized_size(original_size, frame_size)
    factors = new_width / original_size[1], new_height / original_size[0]
    return np.asarray(coords, np.float64) * np.array(factors)


def stretch(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image uint8 (h, w, 3) at `size` (h, w) whatever its aspect, float32 of 0..255, unrounded.

    As SAM 2's image predictor resizes: bilinear, antialiased, in floating point
    (sam2/utils/transforms.py, torchvision's `Resize` on a tensor).
    """
    channels = [Image.fromarray(image[..., c].astype(np.float32), mode="F") for c in range(3)]
    resized = [c.resize((size[1], size[0]), Image.Resampling.BILINEAR) for c in channels]
    return np.stack([np.asarray(channel) for channel in resized], axis=-1)


def stretch_video(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame of a clip, uint8 (h, w, 3), at `size` (h, w) whatever its aspect, uint8.

    As SAM 2's video predictor resizes: Pillow's bicubic filter (sam2/utils/misc.py).
    """
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.array(resized)
