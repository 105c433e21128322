"""Readers of optic disc and cup: what each has of its own, on phantoms."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from data_sets import PHOTOGRAPH, replaced, write_fundus
from samjax.data import DataError
from samjax.data.datasets import READERS
from samjax.data.datasets.drishti_gs import drishti_gs
from samjax.data.datasets.idrid import idrid
from samjax.data.datasets.outlines import fill_outlines
from samjax.data.layouts.fundus import encoded


def test_targets_are_named_and_fit_together(trees):
    datasets = {
        target: trees("refuge2").read(target=target)
        for target in ("disc", "cup", "rim", "disc+cup")
    }
    assert datasets["disc+cup"].class_names == ("disc rim", "cup")
    masks = {target: dataset[0]["mask"] for target, dataset in datasets.items()}
    np.testing.assert_array_equal(masks["disc+cup"], masks["rim"] + 2 * masks["cup"])
    np.testing.assert_array_equal(masks["disc"], masks["rim"] | masks["cup"])


@pytest.mark.parametrize("name", ["drishti_gs", "g1020", "grape", "origa", "papila", "refuge2"])
def test_another_target_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="target 'fovea': expected one of disc, cup, rim, disc"):
        READERS[name](tmp_path, target="fovea")


def assert_filled(mask: np.ndarray, corners: np.ndarray) -> None:
    """As skimage fills: all that is strictly inside, and no more than the outline's pixels."""
    draw = pytest.importorskip("skimage.draw")
    rows, columns = np.floor(corners[:, 1]), np.floor(corners[:, 0])
    inside, outline = np.zeros(mask.shape, bool), np.zeros(mask.shape, bool)
    inside[draw.polygon(rows, columns, mask.shape)] = True
    outline[draw.polygon_perimeter(rows.astype(int), columns.astype(int), mask.shape)] = True
    np.testing.assert_array_equal(mask | outline, inside | outline)
    assert mask[inside].all()


@pytest.mark.parametrize("name", ["g1020", "grape", "papila"])
@pytest.mark.parametrize("target", ["disc", "cup"])
def test_outlines_are_filled_as_skimage_fills_them(trees, name, target):
    tree = trees(name)
    dataset = tree.read("all", target=target)
    for index in (0, 1, 2):  # of which G1020 has a cup
        mask = dataset[index]["mask"] > 0
        (file,) = dataset.cases[index].labels
        if name == "papila":
            corners = np.loadtxt(file) + 0.5
        else:
            label = {"disc": ("disc", "OD"), "cup": ("cup", "OC")}[target]
            shapes = json.loads(file.read_text())["shapes"]
            (corners,) = (np.array(s["points"]) for s in shapes if s["label"] in label)
        assert_filled(mask, corners)
        # The phantoms' outlines go around their masks, through the pixels' centres.
        labels = tree.labels(dataset, index) >= {"disc": 2, "cup": 3}[target]
        assert (mask ^ labels).sum() <= 0.1 * labels.sum()


def test_fills_large_outlines_as_skimage_does(rng):
    angles = np.sort(rng.uniform(0, 2 * np.pi, 40))
    radii = rng.uniform(20, 60, 40)
    corners = np.stack([90 + radii * np.cos(angles), 70 + radii * np.sin(angles)], axis=1)
    mask = fill_outlines([corners], (140, 180), Path("any"))
    assert mask.shape == (140, 180)
    assert_filled(mask, corners)


def test_both_experts_of_papila(trees):
    tree = trees("papila")
    first, second, either = (
        tree.read("all", expert=who)[4]["mask"] for who in ("first", "second", "either")
    )
    np.testing.assert_array_equal(second, np.roll(first, 1, axis=1))
    np.testing.assert_array_equal(either, first | second)
    rim, cup = (tree.read("all", expert="either", target=target) for target in ("rim", "cup"))
    labels = [file.name for file in rim.cases[0].labels]
    assert labels == [f"RET002OD_{part}_exp{n}.txt" for part in ("disc", "cup") for n in (1, 2)]
    np.testing.assert_array_equal(rim[4]["mask"], either & ~cup[4]["mask"] & 1)


@pytest.mark.parametrize(
    ("name", "patients", "test"), [("papila", 244, (366, 122)), ("grape", 144, None)]
)
def test_patients_are_told_by_names_and_kept_together(trees, name, patients, test):
    tree = trees(name)
    everything = tree.read("all")
    assert len(set(everything.patients)) == patients
    assert everything[0]["patient"] == {"papila": "RET002", "grape": "100"}[name]
    by_image = [set(tree.read(split).patients) for split in ("train", "test")]
    assert by_image[0] & by_image[1]
    parts = [tree.read(split, drawn_by="patient") for split in ("train", "test")]
    assert not set(parts[0].patients) & set(parts[1].patients)
    assert len(set(parts[1].patients)) == patients / 4
    assert sorted(parts[0].names + parts[1].names) == sorted(everything.names)
    assert test is None or tuple(len(part) for part in parts) == test


@pytest.mark.parametrize("truth", ["GT", "Test_GT"])
def test_drishti_gs_truth_under_both_names_and_photographs_in_sub_folders(tmp_path, truth):
    drawn = write_fundus("drishti_gs", tmp_path, full=False, test_truth=truth)
    normal = tmp_path / "Test" / "Images" / "NORMAL"
    normal.mkdir()
    (normal.parent / "drishtiGS_003.png").rename(normal / "drishtiGS_003.png")
    test = drishti_gs(tmp_path, "test")
    assert test.names == ("drishtiGS_001", "drishtiGS_003", "drishtiGS_005")
    np.testing.assert_array_equal(test[1]["mask"], drawn["Test/Images/drishtiGS_003.png"] >= 2)
    shutil.rmtree(tmp_path / "Test" / truth)
    with pytest.raises(DataError, match=r"no folder GT or Test_GT \(found there: Images/\)"):
        drishti_gs(tmp_path, "test")


def test_drishti_gs_has_soft_maps_of_five_levels(trees):
    (label,) = trees("drishti_gs").read().cases[0].labels
    with Image.open(label) as image:
        levels = np.array(image)
    assert {0, 64, 191, 255} <= set(np.unique(levels).tolist()) <= {0, 64, 128, 191, 255}


def test_a_soft_map_of_the_cup_of_another_size_is_named(trees):
    dataset = trees("drishti_gs").read(target="rim")
    cup = dataset.cases[0].labels[1]
    other = encoded(Image.fromarray(np.zeros((40, 48), np.uint8)), "PNG")
    with (
        replaced(cup, other),
        pytest.raises(DataError, match=f"{cup.name}: the mask is 48x40"),
    ):
        dataset[0]


def test_g1020_without_a_cup_and_without_a_disc(trees):
    tree = trees("g1020")
    dataset = tree.read("all", target="disc+cup")
    index = dataset.names.index("image_4")
    assert set(np.unique(dataset[index]["mask"])) == {0, 1}
    assert (tree.labels(dataset, index) == 3).any()  # the phantom has one; no outline tells it
    (label,) = dataset.cases[index].labels
    content = json.loads(label.read_text())
    content["shapes"] = content["shapes"][1:]
    message = r"image_4.json: no outline with the label 'disc' \(labels: discloc\)"
    with replaced(label, json.dumps(content).encode()), pytest.raises(DataError, match=message):
        dataset[index]


def test_grape_needs_the_cup_only_where_it_is_asked_for(trees):
    tree = trees("grape")
    (label,) = tree.read().cases[0].labels
    content = json.loads(label.read_text())
    content["shapes"] = [shape for shape in content["shapes"] if shape["label"] != "OC"]
    with replaced(label, json.dumps(content).encode()):
        assert tree.read()[0]["mask"].any()
        with pytest.raises(DataError, match=f"{label.name}: no outline with the label 'OC'"):
            tree.read(target="cup")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": [[1, 1], [5, 5]]}, r"an outline of shape \(2, 2\); expected at least 3 corner"),
        ({"points": [[1, 1], [5], [7, 7]]}, "not a labelme file"),
        (
            {"points": [[1, 1], [60, 5], [7, 7]]},
            r"the outline has a corner \(60, 5\) outside its picture of 40x48",
        ),
        (
            {"points": [[1, 1], [float("nan"), 5], [7, 7]]},
            r"the outline has a corner \(nan, 5\) outside",
        ),
        ({"shape_type": "circle"}, r"an outline of shape \(0, 2\)"),
        ({"label": None}, "not a labelme file"),
    ],
)
def test_outlines_that_cannot_be_filled_are_named(trees, change, message):
    dataset = trees("grape").read()
    (label,) = dataset.cases[0].labels
    content = json.loads(label.read_text())
    content["shapes"][0].update(change)
    with (
        replaced(label, json.dumps(content).encode()),
        pytest.raises(DataError, match=f"{label.name}: {message}"),
    ):
        dataset[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"an outline of shape \(0,\)"),
        (b"1 2\n3\n", r"expected a text file with x and y on each line"),
        (b"1 2\nx y\n", r"expected a text file with x and y on each line"),
        (b"1 2 3\n1 2 3\n4 5 6\n", r"an outline of shape \(3, 3\)"),
        (b"1 2\n10 20\n1000 20\n", r"a corner \(1000.5, 20.5\) outside its picture of 40x48"),
    ],
)
def test_contours_that_cannot_be_filled_are_named(trees, content, message):
    dataset = trees("papila").read()
    (label,) = dataset.cases[0].labels
    with replaced(label, content), pytest.raises(DataError, match=rf"{label.name}: .*{message}"):
        dataset[0]


def test_whole_coordinates_of_papila_are_the_centres_of_pixels(trees):
    draw = pytest.importorskip("skimage.draw")
    dataset = trees("papila").read()
    (label,) = dataset.cases[0].labels
    columns, rows = [9.6, 20.4, 20.4, 9.6], [11.7, 11.7, 30.3, 30.3]
    expected = np.zeros(PHOTOGRAPH, np.uint8)
    expected[draw.polygon(rows, columns, PHOTOGRAPH)] = 1
    text = "".join(f"{x} {y}\n" for x, y in zip(columns, rows, strict=True))
    with replaced(label, text.encode()):
        np.testing.assert_array_equal(dataset[0]["mask"], expected)


def mat(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    savemat(file, arrays)
    return file.getvalue()


def test_origa_masks_are_cut_to_the_photograph(trees):
    dataset = trees("origa").read(target="disc+cup")
    (label,) = dataset.cases[0].labels
    expected = dataset[0]["mask"]
    for left, right, below in ((0, 0, 0), (0, 1, 0), (3, 3, 2), (3, 4, 0)):
        larger = np.pad(expected, ((0, below), (left, right))).astype(float)
        with replaced(label, mat(mask=larger)):
            np.testing.assert_array_equal(dataset[0]["mask"], expected)


def test_origa_masks_that_do_not_fit_are_named(trees):
    dataset = trees("origa").read()
    (label,) = dataset.cases[0].labels
    full, small = np.ones((48, 42), np.uint8), np.ones((48, 38), np.uint8)
    for content, message in (
        (mat(mask=full), "its disc reaches beyond the photograph .* is 42x48 .* 40x48"),
        (mat(mask=small), "the mask is 38x48 pixels .* is 40x48; expected the same"),
        (mat(mask=3 * full), "values 3 are no class; expected 0 and 1, 2"),
        (mat(disc=full), r"no matrix of numbers with the key 'mask' \(keys: disc\)"),
        (label.read_bytes()[:60], "not a readable MATLAB file"),
    ):
        with replaced(label, content), pytest.raises(DataError, match=rf"{label.name}: {message}"):
            dataset[0]


def test_refuge2_masks_in_png_and_bmp(trees):
    tree = trees("refuge2")
    suffixes = {
        split: {case.labels[0].suffix for case in tree.read(split).cases}
        for split in ("train", "val", "test")
    }
    assert suffixes == {"train": {".bmp"}, "val": {".png"}, "test": {".png"}}
    assert tree.read().names[39:41] == ("g0040", "n0001")


def test_refuge2_masks_with_other_values_are_named(trees):
    dataset = trees("refuge2").read("test")
    (label,) = dataset.cases[0].labels
    grey = np.full(PHOTOGRAPH, 255, np.uint8)
    grey[3, 4], grey[5, 6] = 127, 1
    colour = np.zeros((*PHOTOGRAPH, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    for pixels, message in (
        (grey, "unknown values 1, 127; expected 0 cup, 128 disc rim, 255 background"),
        (colour, "a coloured image; expected grey levels"),
    ):
        with (
            replaced(label, encoded(Image.fromarray(pixels), "PNG")),
            pytest.raises(DataError, match=f"{label.name}: {message}"),
        ):
            dataset[0]


@pytest.mark.parametrize("reduced", [False, True])
def test_idrid_in_the_owners_tree_and_in_the_reduced_one(tmp_path, reduced):
    drawn = write_fundus("idrid", tmp_path, full=False, reduced=reduced)
    for split, first in (("train", "IDRiD_01"), ("test", "IDRiD_55")):
        dataset = idrid(tmp_path, split)
        assert dataset.names[0] == first
        assert dataset.cases[0].labels[0].suffix == (".png" if reduced else ".tif")
        for index in range(3):
            labels = drawn[dataset.cases[index].images[0].relative_to(tmp_path).as_posix()]
            np.testing.assert_array_equal(dataset[index]["mask"], labels >= 2)
