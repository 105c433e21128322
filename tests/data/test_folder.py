"""A folder of images and one of masks: pairing, errors that name every file, the split."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samjax.data import DataError, FolderDataset, Subset, split

SIZE = (5, 8)


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    return images, masks


def fill(folder: Path, *names: str, values: tuple[int, ...] = (0, 255)) -> None:
    pixels = np.resize(np.array(values, np.uint8), SIZE)
    for name in names:
        Image.fromarray(pixels).save(folder / name)


def names_of(dataset: FolderDataset) -> list[tuple[str, str]]:
    return [(image.name, mask.name) for image, mask in dataset.pairs]


def test_pairs_by_stem_or_by_stem_separator_and_more(folders):
    images, masks = folders
    fill(images, "b_1.jpg", "a.png", "a_2.tif", "c.JPG", "d d.bmp")
    fill(masks, "b_1_OD.png", "a.png", "a_2-vessel.gif", "c.seg.PNG", "d d mask.tif")
    (images / "README.txt").write_text("about")
    (images / ".DS_Store").touch()
    (masks / "LICENSE").touch()
    (images / "more").mkdir()
    dataset = FolderDataset(images, masks)
    assert names_of(dataset) == [
        ("a.png", "a.png"),
        ("a_2.tif", "a_2-vessel.gif"),
        ("b_1.jpg", "b_1_OD.png"),
        ("c.JPG", "c.seg.PNG"),
        ("d d.bmp", "d d mask.tif"),
    ]
    dataset.check()
    assert dataset[1]["name"] == "a_2"
    assert len(dataset) == 5


def test_the_longest_image_stem_wins(folders):
    images, masks = folders
    fill(images, "eye.png", "eye_1.png", "eye_1_2.png")
    fill(masks, "eye_disc.png", "eye_1_disc.png", "eye_1_2_disc.png")
    assert names_of(FolderDataset(images, masks)) == [
        ("eye.png", "eye_disc.png"),
        ("eye_1.png", "eye_1_disc.png"),
        ("eye_1_2.png", "eye_1_2_disc.png"),
    ]


def test_mask_suffix_chooses_among_several_masks(folders):
    images, masks = folders
    fill(images, "a.png", "b.png")
    fill(masks, "a_1stHO.png", "b_1stHO.png", "a_2ndHO.png", "b_2ndHO.png")
    with pytest.raises(DataError, match=r"several masks .*\(4\): a_1stHO.png, a_2ndHO.png, b_1st"):
        FolderDataset(images, masks)
    assert names_of(FolderDataset(images, masks, mask_suffix="_2ndHO")) == [
        ("a.png", "a_2ndHO.png"),
        ("b.png", "b_2ndHO.png"),
    ]
    with pytest.raises(DataError, match=r"plus '_OD'\):\n  images without a mask \(2\): a.png, b"):
        FolderDataset(images, masks, mask_suffix="_OD")


def test_everything_that_does_not_pair_is_in_one_error(folders):
    images, masks = folders
    fill(images, "a.png", "b.png", "c.png", "d.png", "d.bmp", "e.png", "f.png")
    fill(masks, "a.png", "c1.png", "d.png", "e_1.png", "e_2.png", "f.jpg", "stray.png")
    (images / "g.dcm").touch()
    with pytest.raises(DataError) as error:
        FolderDataset(images, masks)
    message = str(error.value)
    assert f"images {images} and masks {masks} do not pair up" in message
    for line in (
        "in an unknown format (known: .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp) (1): g",
        "images with the same name (2): d.bmp, d.png",
        "images without a mask (3): b.png, c.png, g.dcm",
        "masks without an image (2): c1.png, stray.png",
        "several masks for one image (--mask-suffix chooses) (2): e_1.png, e_2.png",
        "JPEG masks, whose values are not exact (expected PNG or TIFF) (1): f.jpg",
    ):
        assert f"\n  {line}" in message


def test_folders_that_cannot_be_used(folders):
    images, masks = folders
    with pytest.raises(DataError, match=f"image folder {images}: no images of a known format; "):
        FolderDataset(images, masks)
    fill(images, "a.png")
    with pytest.raises(DataError, match=f"mask folder {masks}: no masks of a known format; "):
        FolderDataset(images, masks)
    (masks / "a.npy").touch()
    with pytest.raises(DataError, match=r"no masks of a known format \(found a\.npy\)"):
        FolderDataset(images, masks)
    with pytest.raises(DataError, match=r"mask folder .*nowhere: no such folder"):
        FolderDataset(images, images.parent / "nowhere")
    with pytest.raises(DataError, match=r"image folder .*: no such folder"):
        FolderDataset(images / "a.png", masks)
    with pytest.raises(DataError, match="must lie in different folders"):
        FolderDataset(images, images)


@pytest.mark.parametrize("classes", [(), (0, 1), (3, 3), (-1,), range(1, 300)])
def test_classes_are_checked(folders, classes):
    with pytest.raises(ValueError, match="expected 1 to 255 different mask values above 0"):
        FolderDataset(*folders, classes=classes)


def test_an_example_is_image_label_map_and_name(folders):
    images, masks = folders
    fill(images, "a.png", values=(10, 20, 30))
    fill(masks, "a.png", values=(0, 7, 9))
    dataset = FolderDataset(images, masks, classes=(9, 7))
    example = dataset[0]
    assert example["name"] == "a"
    assert example["image"].shape == (*SIZE, 3)
    np.testing.assert_array_equal(example["mask"], np.resize([0, 2, 1], SIZE))
    assert example["image"].dtype == example["mask"].dtype == np.uint8
    assert (dataset.num_classes, FolderDataset(images, masks).num_classes) == (2, 1)
    with pytest.raises(DataError, match=r"a\.png: unknown values 7, 9: .*--classes 7,9"):
        FolderDataset(images, masks)[0]
    with pytest.raises(IndexError):
        dataset[1]


def test_check_lists_every_pair_that_cannot_be_used(folders):
    images, masks = folders
    for name in ("a", "b", "c", "d", "e"):
        fill(images, f"{name}.png")
        fill(masks, f"{name}.png")
    Image.new("L", (7, 4)).save(masks / "b.png")
    Image.new("I;16", SIZE[::-1]).save(images / "c.png")
    (masks / "d.png").write_text("nothing")
    Image.new("L", SIZE[::-1]).save(masks / "e.png", "JPEG")
    dataset = FolderDataset(images, masks)
    with pytest.raises(DataError) as error:
        dataset.check()
    lines = str(error.value).split("\n  ")
    assert lines[0].startswith("4 of 5 pairs")
    assert lines[1] == (
        f"{masks / 'b.png'}: the mask is 7x4 pixels (width x height), its image "
        f"{images / 'b.png'} is 8x5; expected the same size"
    )
    for line, start in zip(
        lines[2:], (images / "c.png", masks / "d.png", masks / "e.png"), strict=True
    ):
        assert line.startswith(f"{start}: ")
    with pytest.raises(DataError, match="the mask is 7x4 pixels"):
        dataset[1]


def test_a_rotated_photograph_pairs_with_its_upright_mask(folders):
    images, masks = folders
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE[::-1]).save(images / "a.jpg", exif=exif)
    Image.new("1", SIZE).save(masks / "a.png")
    dataset = FolderDataset(images, masks)
    dataset.check()
    assert dataset[0]["image"].shape == (*SIZE[::-1], 3)


def test_a_data_set_travels_to_a_worker_process(folders):
    images, masks = folders
    fill(images, "a.png", "b.png")
    fill(masks, "a.png", "b.png")
    train, _ = split(FolderDataset(images, masks), 0.5, seed=0)
    assert pickle.loads(pickle.dumps(train))[0]["name"] == train[0]["name"]


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.2, 2), (54, 0.15, 8)]
)
def test_split_is_disjoint_complete_and_repeatable(count, fraction, held_out):
    numbers = range(count)
    train, val = split(numbers, fraction, seed=3)
    assert len(val) == held_out
    assert sorted([*train, *val]) == list(numbers)
    again = split(numbers, fraction, seed=3)
    assert (list(train), list(val)) == (list(again[0]), list(again[1]))
    if count == 54:
        assert list(split(numbers, fraction, seed=4)[1]) != list(val)


def test_split_refuses_what_it_cannot_do():
    for fraction in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="validation fraction"):
            split(range(5), fraction, seed=0)
    with pytest.raises(ValueError, match="at least 2 examples, the data set has 1"):
        split(range(1), 0.5, seed=0)


def test_subset_keeps_the_given_order():
    assert list(Subset("abcd", [3, 0])) == ["d", "a"]


def test_real_optic_discs(shared_data, tmp_path):
    root = shared_data / "idrid_optic_disc" / "train"
    dataset = FolderDataset(root / "images", root / "od_masks")
    assert len(dataset) == 54
    dataset.check()
    example = dataset[0]
    assert example["name"] == "IDRiD_01"
    assert example["image"].shape == (2848, 4288, 3)
    assert set(np.unique(example["mask"])) == {0, 1}
    assert 0.005 < example["mask"].mean() < 0.05  # the disc is some 2 % of the picture

    cut = tmp_path / "images"
    cut.mkdir()
    photograph = (root / "images" / "IDRiD_01.jpg").read_bytes()
    (cut / "IDRiD_01.jpg").write_bytes(photograph[: len(photograph) // 2])
    (tmp_path / "masks").mkdir()
    shutil.copy(root / "od_masks" / "IDRiD_01_OD.png", tmp_path / "masks")
    truncated = FolderDataset(cut, tmp_path / "masks")
    truncated.check()  # the header is whole
    with pytest.raises(DataError, match=r"IDRiD_01\.jpg: not a readable image .*truncated"):
        truncated[0]


def test_real_vessel_masks(shared_data):
    root = shared_data / "chase_db1" / "training"
    dataset = FolderDataset(root / "images", root / "mask")
    assert len(dataset) == 20
    assert dataset[0]["image"].shape == (960, 999, 3)
    assert 0.03 < dataset[0]["mask"].mean() < 0.15
