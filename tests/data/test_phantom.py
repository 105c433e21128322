import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from samjax.data import phantom
from samjax.data.phantom import (
    CUP,
    DISC,
    LOOKS,
    VESSEL,
    make_phantom,
    target_mask,
    write_phantom_folder,
)


@pytest.mark.parametrize("look", LOOKS)
def test_a_phantom_has_an_image_and_every_label(look):
    result = make_phantom(3, look, (96, 144))
    image, mask = result["image"], result["mask"]
    assert image.shape == (96, 144, 3)
    assert image.dtype == np.uint8
    assert mask.shape == (96, 144)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, VESSEL, DISC, CUP}
    assert image[:, :20].mean() < 12  # outside the field of view of a landscape picture


def test_the_same_seed_gives_the_same_picture_and_others_do_not():
    first, again = (make_phantom((1, 2), "colour", (64, 64)) for _ in range(2))
    other = make_phantom((1, 3), "colour", (64, 64))
    for key in ("image", "mask"):
        np.testing.assert_array_equal(first[key], again[key])
        assert (first[key] != other[key]).any()


def test_a_seed_is_the_same_eye_under_another_look():
    look = replace(LOOKS["colour"], noise=9.0, vignetting=0.0, disc=(10, 10, 200))
    colour, changed = (make_phantom(5, which, (96, 96)) for which in ("colour", look))
    np.testing.assert_array_equal(colour["mask"], changed["mask"])
    assert (colour["image"] != changed["image"]).any()


def test_a_seed_is_the_same_eye_at_another_size():
    small, large = (make_phantom(5, "colour", (size, size))["mask"] for size in (128, 256))
    for label in (DISC, CUP):
        centres = [np.argwhere(mask >= label).mean(0) / len(mask) for mask in (small, large)]
        np.testing.assert_allclose(*centres, atol=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_the_anatomy_is_plausible(seed):
    mask = make_phantom(seed, "colour", (192, 192))["mask"]
    disc = mask >= DISC
    assert ndimage.label(disc)[1] == 1, "one disc, filled where vessels cross it"
    assert ndimage.label(mask == CUP)[1] == 1
    assert (ndimage.binary_fill_holes(disc) == disc).all()
    rows, columns = np.nonzero(disc)
    assert 0.1 < np.ptp(columns) / 192 < 0.22, "a disc is about a sixth of the field of view"
    assert min(rows.min(), columns.min()) > 0
    assert max(rows.max(), columns.max()) < 191
    # The rim goes all the way round: the cup does not touch what is not disc.
    assert not (ndimage.binary_dilation(mask == CUP) & ~disc).any()
    assert 0.03 < (mask == VESSEL).mean() < 0.2
    # Vessels grow out of the disc: most of their pixels hang together with it.
    parts, _ = ndimage.label(mask > 0, np.ones((3, 3)))
    tree = parts == parts[rows[0], columns[0]]
    assert (tree & (mask == VESSEL)).sum() > 0.7 * (mask == VESSEL).sum()


def test_seeds_vary_side_position_size_and_cup():
    masks = [make_phantom((0, i), "colour", (128, 128))["mask"] for i in range(24)]
    centres = np.array([np.argwhere(mask >= DISC).mean(0) for mask in masks])
    areas = np.array([(mask >= DISC).sum() for mask in masks])
    ratios = np.array([(mask == CUP).sum() for mask in masks]) / areas
    assert 4 < (centres[:, 1] > 64).sum() < 20, "left and right eyes"
    assert np.ptp(centres[:, 0]) > 20
    assert areas.max() > 1.5 * areas.min()
    assert ratios.max() > 2 * ratios.min()


def _contrast(look, inside, outside):
    """Difference of the median grey levels of two regions, in some pictures without lesions."""
    differences = []
    for seed in range(4):
        result = make_phantom(seed, replace(LOOKS[look], lesions=0.0), (128, 128))
        grey = result["image"].mean(-1)
        y, x = np.mgrid[:128, :128]
        central = np.hypot(x - 64, y - 64) < 45
        near = ndimage.binary_dilation(result["mask"] >= DISC, iterations=6)
        regions = {
            "vessel": (result["mask"] == VESSEL) & central & ~near,
            "background": (result["mask"] == 0) & central & ~near,
            "disc": result["mask"] >= DISC,
        }
        grey_levels = [np.median(grey[regions[name]]) for name in (inside, outside)]
        differences.append(grey_levels[0] - grey_levels[1])
    return np.array(differences)


@pytest.mark.parametrize("look", LOOKS)
def test_the_polarity_of_a_look(look):
    vessel, disc = _contrast(look, "vessel", "background"), _contrast(look, "disc", "background")
    if look == "angiogram":
        assert (vessel > 25).all()
        assert (disc < 10).all(), "no bright disc to find"
    else:
        assert (vessel < -5).all()
        assert (disc > 10).all()


def test_lesions_leave_the_labels_as_they_are():
    clean, ill = (
        make_phantom(11, replace(LOOKS["colour"], lesions=n), (128, 128)) for n in (0.0, 6.0)
    )
    np.testing.assert_array_equal(clean["mask"], ill["mask"])
    assert np.abs(clean["image"].astype(int) - ill["image"]).max() > 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "sepia", (64, 64)), "unknown look 'sepia', expected one of colour"),
        ((0, "colour", (64, 31)), r"size is \(64, 31\), expected \(h, w\) of at least 32"),
        ((0, "colour", (64,)), "expected"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_phantom(*arguments)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("disc", [0, 0, 255, 255]),
        ("vessel", [0, 255, 0, 0]),
        ("cup", [0, 0, 0, 255]),
        ("disc+cup", [0, 0, 1, 2]),
        ("all", [0, 1, 2, 3]),
    ],
)
def test_target_masks(target, expected):
    result = target_mask(np.arange(4, dtype=np.uint8), target)
    np.testing.assert_array_equal(result, expected)
    assert result.dtype == np.uint8


def test_a_folder_holds_pairs_of_files(tmp_path):
    out = tmp_path / "deep" / "set"
    write_phantom_folder(out, "dark", 3, (48, 64), seed=4, target="disc+cup")
    names = [f"dark_{i:04d}.png" for i in range(3)]
    for kind in ("images", "masks"):
        assert sorted(file.name for file in (out / kind).iterdir()) == names
    expected = make_phantom((4, 1), "dark", (48, 64))
    image, mask = (np.array(Image.open(out / kind / names[1])) for kind in ("images", "masks"))
    np.testing.assert_array_equal(image, expected["image"])
    np.testing.assert_array_equal(mask, target_mask(expected["mask"], "disc+cup"))


def test_sets_of_different_seeds_share_no_picture(tmp_path):
    for seed in (0, 1):
        write_phantom_folder(tmp_path / str(seed), "colour", 4, 32, seed=seed)
    contents = [file.read_bytes() for file in tmp_path.glob("*/images/*.png")]
    assert len(set(contents)) == 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"look": "sepia"}, "sepia"),
        ({"count": 0}, "count is 0"),
        ({"size": 8}, "at least 32"),
        ({"target": "fovea"}, "unknown target 'fovea'"),
    ],
)
def test_a_bad_order_writes_nothing(tmp_path, changed, message):
    order = {"look": "colour", "count": 1, "size": 32, "target": "disc"} | changed
    with pytest.raises(ValueError, match=message):
        write_phantom_folder(tmp_path / "set", **order)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"exists already, expected a new or empty folder"):
        write_phantom_folder(tmp_path, "colour", 1, 32)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fails_at_the_second(seed, look, size):
        if seed[1] == 1:
            raise OSError(28, "No space left on device")
        return make_phantom(seed, look, size)

    monkeypatch.setattr(phantom, "make_phantom", fails_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        write_phantom_folder(tmp_path / "set", "colour", 2, 32)
    assert list(tmp_path.iterdir()) == []


def _run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "samjax.data.phantom", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_writes_a_folder(tmp_path):
    out, by_command = tmp_path / "set", tmp_path / "other"
    write_phantom_folder(out, "pale", 1, 32, seed=7)
    order = ("--look", "pale", "--count", 1, "--size", 32, "--seed", 7)
    result = _run("--out", by_command, *order)
    assert result.returncode == 0, result.stderr
    for kind in ("images", "masks"):
        files = [folder / kind / "pale_0000.png" for folder in (out, by_command)]
        assert files[0].read_bytes() == files[1].read_bytes()
    again = _run("--out", by_command)
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "exists already" in again.stderr
