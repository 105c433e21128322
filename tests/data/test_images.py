"""Reading image and mask files: what is accepted, what comes out, what is refused by name."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from samjax.data.images import (
    DataError,
    image_header_size,
    mask_header_size,
    read_image,
    read_mask,
)

HEIGHT, WIDTH = 6, 9


def picture(rng: np.random.Generator, *channels: int) -> np.ndarray:
    return rng.integers(0, 256, (HEIGHT, WIDTH, *channels), dtype=np.uint8)


def write_png16(path: Path, channels: int) -> None:
    """A 16-bit PNG, which Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    row = b"\0" + bytes(range(2 * channels * WIDTH))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    data = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * HEIGHT)) + chunk(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.TIFF", "a.bmp", "a.webp"])
def test_lossless_formats_come_back_exactly(tmp_path, rng, name):
    pixels = picture(rng, 3)
    Image.fromarray(pixels).save(tmp_path / name, lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / name), pixels)
    assert image_header_size(tmp_path / name) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("name", ["a.jpg", "a.gif", "a.webp"])
def test_lossy_formats_come_back_as_pillow_decodes_them(tmp_path, name):
    Image.new("RGB", (WIDTH, HEIGHT), (200, 100, 50)).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8
    assert image.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(image, np.broadcast_to([200, 100, 50], image.shape), atol=4)


def test_greyscale_and_one_bit_get_three_equal_channels(tmp_path, rng):
    grey = picture(rng)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey > 127).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), grey[..., None].repeat(3, 2))
    bits = np.where(grey > 127, 255, 0)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png"), bits)


def test_palette_is_resolved_and_opaque_alpha_dropped(tmp_path, rng):
    pixels = picture(rng, 3)
    pixels[..., 2] = 0
    pixels[..., :2] //= 128
    Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png"), pixels)
    opaque = np.concatenate([pixels, np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], axis=2)
    Image.fromarray(opaque).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), pixels)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_applied_to_image_and_mask(tmp_path, rng, name, orientation, turns):
    pixels = np.where(picture(rng) > 127, 255, 0).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / name, exif=exif, lossless=True)
    expected = np.rot90(pixels, turns)
    np.testing.assert_array_equal(read_image(tmp_path / name)[..., 0], expected)
    np.testing.assert_array_equal(read_mask(tmp_path / name), expected > 0)
    assert image_header_size(tmp_path / name) == expected.shape
    assert mask_header_size(tmp_path / name) == expected.shape


def test_a_phones_mpo_counts_as_its_first_picture(tmp_path, rng):
    first, second = (Image.fromarray(picture(rng, 3)) for _ in range(2))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], quality=100)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO"
    error = np.abs(read_image(tmp_path / "a.jpg").astype(int) - np.array(first))
    assert error.mean() < np.abs(np.array(first).astype(int) - np.array(second)).mean() / 2


def write_bad_image(folder: Path, kind: str) -> Path:
    path = folder / "bad.png"
    grey = np.linspace(0, 1, HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    if kind.endswith("float"):
        grey[2, 3] = {"nan float": np.nan, "infinite float": np.inf}.get(kind, 0.5)
        Image.fromarray(grey).save(path := folder / "bad.tif")
    elif kind == "16-bit grey":
        write_png16(path, 1)
    elif kind == "16-bit colour":
        write_png16(path, 3)
    elif kind == "16-bit tif":
        Image.fromarray((grey * 60000).astype(np.uint16)).save(path := folder / "bad.tif")
    elif kind == "32-bit tif":
        Image.fromarray((grey * 60000).astype(np.int32)).save(path := folder / "bad.tif")
    elif kind == "cmyk":
        Image.new("CMYK", (WIDTH, HEIGHT)).save(path := folder / "bad.jpg")
    elif kind == "transparent":
        Image.new("RGBA", (WIDTH, HEIGHT), (9, 9, 9, 128)).save(path)
    elif kind == "transparent palette":
        Image.new("P", (WIDTH, HEIGHT)).save(path, transparency=0)
    elif kind in ("frames", "pages"):
        path = folder / {"frames": "bad.gif", "pages": "bad.tif"}[kind]
        frames = [Image.new("L", (WIDTH, HEIGHT), value) for value in (10, 200)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan float", "1 pixels are NaN or infinite"),
        ("infinite float", "1 pixels are NaN or infinite"),
        ("plain float", "float pixels"),
        ("16-bit grey", "more than 8 bits"),
        ("16-bit colour", "more than 8 bits"),
        ("16-bit tif", "more than 8 bits"),
        ("32-bit tif", "more than 8 bits"),
        ("cmyk", "CMYK"),
        ("transparent", "transparent pixels"),
        ("transparent palette", "transparent pixels"),
        ("frames", "2 frames"),
        ("pages", "2 frames"),
        ("text", "not a readable image"),
        ("empty", "not a readable image"),
        ("folder", "not a readable image"),
        ("missing", "not a readable image"),
    ],
)
def test_unusable_images_are_named_with_the_reason(tmp_path, kind, reason):
    path = write_bad_image(tmp_path, kind)
    with pytest.raises(DataError, match=reason) as error:
        read_image(path)
    assert str(path) in str(error.value)
    if not kind.startswith("transparent"):  # which the header does not show
        with pytest.raises(DataError, match=reason):
            image_header_size(path)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg", "a.bmp", "a.gif", "a.webp", "a.tif"):
        Image.fromarray(pixels).save(folder / name, lossless=True)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:.*(Truncated|Corrupt|EOF).*:UserWarning")
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["a.png", "a.jpg", "a.bmp", "a.gif", "a.webp", "a.tif"]), data=st.data()
)
def test_a_truncated_image_is_an_error_or_whole(tmp_path, whole_files, name, data):
    whole = whole_files[name]
    path = tmp_path / name
    path.write_bytes(whole)
    expected = read_image(path)
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    try:
        image = read_image(path)
    except DataError as error:
        named = str(path) in str(error)
    else:  # only the end marker is gone
        named = bool((image == expected).all())
    assert named


def write_mask(path: Path, kind: str, mask: np.ndarray) -> Path:
    if kind == "0/1":
        Image.fromarray(mask.astype(np.uint8)).save(path)
    elif kind == "0/255":
        Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    elif kind == "one bit":
        Image.fromarray(mask).save(path)
    elif kind == "16 bits":
        Image.fromarray(mask.astype(np.uint16)).save(path)
    elif kind == "equal channels":
        Image.fromarray((mask.astype(np.uint8) * 255)[..., None].repeat(3, 2)).save(path)
    elif kind == "grey and alpha":
        Image.merge(
            "LA",
            [Image.fromarray(mask.astype(np.uint8) * 255), Image.new("L", mask.shape[::-1], 255)],
        ).save(path)
    else:
        palette = {
            "coloured palette": [0, 0, 0, 255, 0, 0],
            "inverted grey palette": [255] * 3 + [0] * 3,
        }
        indices = mask if kind == "coloured palette" else ~mask
        image = Image.fromarray(indices.astype(np.uint8), "P")
        image.putpalette(palette[kind])
        image.save(path)
    return path


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", ["m.png", "m.tif"])
@pytest.mark.parametrize(
    "kind",
    [
        *("0/1", "0/255", "one bit", "16 bits", "equal channels", "grey and alpha"),
        *("coloured palette", "inverted grey palette"),
    ],
)
def test_binary_masks(tmp_path, rng, kind, name, empty):
    mask = np.zeros((HEIGHT, WIDTH), bool) if empty else picture(rng) > 127
    labels = read_mask(write_mask(tmp_path / name, kind, mask))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, mask)


def test_a_gif_mask_counts_by_its_grey_levels(tmp_path, rng):
    """Pillow's writer sorts the palette: the stored indices are not the written values."""
    labels = rng.integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8)
    Image.fromarray(np.array([0, 128, 255], np.uint8)[labels]).save(tmp_path / "m.gif")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.gif", (128, 255)), labels)


def test_declared_classes_become_labels_in_their_order(tmp_path, rng):
    labels = rng.integers(0, 4, (HEIGHT, WIDTH)).astype(np.uint8)
    values = np.array([0, 255, 7, 128], np.uint8)[labels]
    Image.fromarray(values).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", (255, 7, 128)), labels)
    Image.fromarray(values.astype(np.uint16) * 100).save(tmp_path / "m.tif")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.tif", (25500, 700, 12800)), labels)


@pytest.mark.parametrize(
    ("values", "classes", "reason"),
    [
        ((0, 128, 255), None, r"unknown values 128: a binary mask .*--classes 128,255"),
        ((0, 1, 2), None, r"unknown values 2: .*--classes 1,2"),
        ((0, 1, 255), None, r"unknown values 1: .*--classes 1,255"),
        ((0, 3), None, r"unknown values 3: .*--classes 3"),
        ((0, 5, 9), (9,), r"unknown values 5: the declared classes are 9, .*--classes 9,5"),
        ((0, 255), (1, 2), r"unknown values 255: the declared classes are 1, 2"),
        (tuple(range(50)), None, r"unknown values 2, 3, .*, …: .*looks like a picture"),
    ],
)
def test_unknown_mask_values_are_named_with_the_way_to_declare_them(
    tmp_path, values, classes, reason
):
    path = tmp_path / "m.png"
    Image.fromarray(np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))).save(path)
    with pytest.raises(DataError, match=reason) as error:
        read_mask(path, classes)
    assert str(path) in str(error.value)


def test_masks_of_other_kinds_are_refused(tmp_path, rng):
    path = tmp_path / "m.png"
    Image.fromarray(picture(rng)).save(path, "JPEG")
    with pytest.raises(DataError, match=r"m\.png: a JPEG mask"):
        read_mask(path)
    Image.fromarray(picture(rng, 3)).save(path)
    with pytest.raises(DataError, match=r"m\.png: a coloured mask"):
        read_mask(path)
    Image.new("RGBA", (WIDTH, HEIGHT)).save(path)
    with pytest.raises(DataError, match=r"m\.png: a mask with transparent pixels"):
        read_mask(path)
    write_png16(path, 3)
    with pytest.raises(DataError, match=r"m\.png: pixel format RGB"):
        read_mask(path)
    Image.fromarray(np.zeros((HEIGHT, WIDTH), np.float32)).save(tmp_path / "m.tif")
    with pytest.raises(DataError, match=r"m\.tif: pixel format F"):
        mask_header_size(tmp_path / "m.tif")
