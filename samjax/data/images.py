"""Reads image and mask files strictly: what cannot be used exactly as it stands is an error.

Pillow is lenient where a training set must not be: it cuts 16-bit colours to 8 bits, drops
transparency, takes the first of several frames, and ignores a camera's rotation.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_JPEG_FORMATS = frozenset({"JPEG", "MPO"})
_IMAGE_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr"})
_MASK_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16", "I;16B", "I;16L"})
_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 swap width and height
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257  # tags
_LISTED = 8  # unknown values named in an error
# Everything that Pillow's decoders raise on a damaged file.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class DataError(ValueError):
    """An image, a mask or a folder of them cannot be used; the message names it and says why."""


def read_image(path: str | Path) -> np.ndarray:
    """Reads an image file as uint8 (h, w, 3) RGB, turned as its EXIF orientation says.

    Greyscale becomes three equal channels, palettes are resolved.

    Raises:
        DataError: unreadable or truncated file, 16-bit or float pixels (NaN is named as such),
            CMYK and the like, transparent pixels, several frames.
    """
    path = Path(path)
    with _opened(path) as image:
        _check_image_header(image, path)
        _load_upright(image)
        # A palette may carry its transparency in a side table that only RGBA resolves.
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            if (np.array(image.getchannel("A")) < 255).any():
                raise DataError(
                    f"{path}: has transparent pixels, whose colour is undefined; "
                    "expected an opaque image"
                )
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_mask(path: str | Path, classes: Sequence[int] | None = None) -> np.ndarray:
    """Reads a mask file as uint8 (h, w) label map, turned as its EXIF orientation says.

    A palette file counts by its grey levels where the palette is grey (GIF writers sort it as
    they like), by its indices where it is coloured; an RGB file counts where its channels are
    equal.

    Args:
        path: png, tif, bmp, gif or lossless webp.
        classes: None for values 0 and 1, or 0 and 255, which become the labels 0 and 1;
            otherwise the i-th value becomes label i (from 1), and 0 stays 0.

    Raises:
        DataError: unreadable, JPEG or coloured file; values that `classes` does not declare.
    """
    path = Path(path)
    with _opened(path) as image:
        _check_mask_header(image, path)
        _load_upright(image)
        values = _mask_values(image, path)
    return _to_labels(values, classes, path)


def image_header_size(path: str | Path) -> tuple[int, int]:
    """(h, w) of an image file, EXIF rotation applied, from its header.

    Raises:
        DataError: what `read_image` refuses and the header shows.
    """
    path = Path(path)
    with _opened(path) as image:
        _check_image_header(image, path)
        return _oriented_size(image)


def mask_header_size(path: str | Path) -> tuple[int, int]:
    """(h, w) of a mask file, EXIF rotation applied, from its header.

    Raises:
        DataError: what `read_mask` refuses and the header shows.
    """
    path = Path(path)
    with _opened(path) as image:
        _check_mask_header(image, path)
        return _oriented_size(image)


def check_sizes(
    image_path: Path, image_size: tuple[int, ...], mask_path: Path | str, mask_size: tuple[int, ...]
) -> None:
    """``DataError`` unless a mask has the size (h, w) of its image; the paths are named in it."""
    if image_size != mask_size:
        raise DataError(
            f"{mask_path}: the mask is {mask_size[1]}x{mask_size[0]} pixels (width x height), its "
            f"image {image_path} is {image_size[1]}x{image_size[0]}; expected the same size"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image; whatever Pillow raises within becomes a DataError with the file's name."""
    try:
        # By handle: from a path, Pillow maps the pixels of an uncompressed TIFF into memory with
        # width and height swapped where the file says that it is rotated.
        with path.open("rb") as file, Image.open(file) as image:
            yield image
    except DataError:
        raise
    except DECODE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{path}: not a readable image ({reason})") from error


def _check_image_header(image: Image.Image, path: Path) -> None:
    expected = "expected 8 bits per channel, RGB or greyscale"
    if image.mode == "F":
        bad = int((~np.isfinite(np.array(image))).sum())
        if bad:
            raise DataError(f"{path}: {bad} pixels are NaN or infinite; {expected}")
        raise DataError(f"{path}: float pixels, whose range is unknown; {expected}")
    if image.mode.startswith("I") or _has_16_bits(image):
        raise DataError(
            f"{path}: more than 8 bits per channel; {expected}. "
            "Choose the intensity window and convert it first"
        )
    if image.mode not in _IMAGE_MODES:
        raise DataError(f"{path}: pixel format {image.mode}; {expected}")
    _check_single_frame(image, path)


def _check_mask_header(image: Image.Image, path: Path) -> None:
    if image.format in _JPEG_FORMATS:
        raise DataError(f"{path}: a JPEG mask, whose values are not exact; expected PNG or TIFF")
    several_channels = image.mode in ("LA", "RGB", "RGBA")
    if image.mode not in _MASK_MODES or (several_channels and _has_16_bits(image)):
        raise DataError(f"{path}: pixel format {image.mode}; expected one channel of whole numbers")
    _check_single_frame(image, path)


def _has_16_bits(image: Image.Image) -> bool:
    """Whether the file has 16 bits a channel: Pillow opens RGB of 16 bits as RGB of 8."""
    tiles = getattr(image, "tile", None)  # a codec and its arguments for each part of the file
    args = tiles[0].args if tiles else None
    raw_mode = args[0] if isinstance(args, tuple) and args else args
    return isinstance(raw_mode, str) and ";16" in raw_mode


def _check_single_frame(image: Image.Image, path: Path) -> None:
    frames = getattr(image, "n_frames", 1)
    # The further frames of an MPO are a phone's preview pictures of the first.
    if frames != 1 and image.format != "MPO":
        raise DataError(f"{path}: {frames} frames; expected a single image")


def _load_upright(image: Image.Image) -> None:
    """Decodes the pixels and applies the EXIF orientation, in place."""
    image.load()
    if image.format != "TIFF":  # whose loader turns by itself, and would be turned twice
        ImageOps.exif_transpose(image, in_place=True)


def _oriented_size(image: Image.Image) -> tuple[int, int]:
    """(h, w) that the image will have after `_load_upright`."""
    width, height = image.size
    if image.format == "TIFF":  # newer Pillows have swapped its size already
        tags = getattr(image, "tag_v2", {})
        width, height = tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]
    # getexif() of a PNG would decode the pixels; its header chunk is in info if it has one.
    has_exif = image.format != "PNG" or "exif" in image.info
    turned = has_exif and image.getexif().get(_ORIENTATION, 1) >= 5
    return (width, height) if turned else (height, width)


def _mask_values(image: Image.Image, path: Path) -> np.ndarray:
    """The stored values, (h, w) of an integer type."""
    values = np.array(image)
    if image.mode == "1":
        return values.astype(np.uint8)
    if image.mode == "P":
        palette = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3)
        grey = bool((palette == palette[:, :1]).all())
        return palette[:, 0][values] if grey and values.max() < len(palette) else values
    if values.ndim == 2:
        return values
    colours = 1 if image.mode == "LA" else 3
    if values.shape[2] > colours and (values[..., colours] < 255).any():
        raise DataError(f"{path}: a mask with transparent pixels; expected one channel of labels")
    if (values[..., 1:colours] != values[..., :1]).any():
        raise DataError(f"{path}: a coloured mask; expected one channel of labels")
    return values[..., 0]


def _to_labels(values: np.ndarray, classes: Sequence[int] | None, path: Path) -> np.ndarray:
    # Pillow counts and looks up 12 million bytes several times faster than numpy.
    picture = Image.fromarray(values) if values.dtype == np.uint8 else None
    present = set(
        np.unique(values).tolist()
        if picture is None
        else [value for value, count in enumerate(picture.histogram()) if count]
    )
    if classes is None:
        classes = (1,) if 1 in present and 255 not in present else (255,)
        expected = "a binary mask has the values 0 and 1, or 0 and 255"
        declared = sorted(present - {0})
    else:
        expected = f"the declared classes are {_listed(classes)}, and 0 is the background"
        declared = [*classes, *sorted(present - {0, *classes})]
    unknown = sorted(present - {0, *classes})
    if unknown:
        hint = (
            f"declare classes with --classes {','.join(str(value) for value in declared)}"
            if len(declared) <= _LISTED
            else "this looks like a picture, not like a mask"
        )
        raise DataError(f"{path}: unknown values {_listed(unknown)}: {expected}; {hint}")
    label_of = {value: label for label, value in enumerate(classes, start=1)}
    if picture is not None:
        return np.array(picture.point([label_of.get(value, 0) for value in range(256)]))
    labels = np.zeros(values.shape, np.uint8)
    for value, label in label_of.items():
        labels[values == value] = label
    return labels


def _listed(values: Sequence[int]) -> str:
    more = ", …" if len(values) > _LISTED else ""
    return ", ".join(str(value) for value in values[:_LISTED]) + more
