"""Readers of optic disc and cup on phantoms in the owners' layouts, and IDRiD itself."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from samjax.data import DataError
from samjax.data.datasets.drishti_gs import drishti_gs
from samjax.data.datasets.g1020 import g1020
from samjax.data.datasets.grape import grape
from samjax.data.datasets.idrid import idrid
from samjax.data.datasets.origa import origa
from samjax.data.datasets.outlines import fill_outlines
from samjax.data.datasets.papila import papila
from samjax.data.datasets.refuge2 import refuge2
from samjax.data.layouts import fundus, fundus_disc

READERS: dict[str, Callable[..., Any]] = {
    "drishti_gs": drishti_gs,
    "g1020": g1020,
    "grape": grape,
    "idrid": idrid,
    "origa": origa,
    "papila": papila,
    "refuge2": refuge2,
}
COUNTS = {
    "drishti_gs": (50, 51),
    "g1020": (765, 255),
    "grape": (473, 158),
    "idrid": (54, 27),
    "origa": (487, 163),
    "papila": (366, 122),
    "refuge2": (400, 400),
}
WITH_CUP = [name for name in READERS if name != "idrid"]
DRAWN = ["g1020", "grape", "origa", "papila"]
TARGETS = {"disc": 1, "cup": 1, "rim": 1, "disc+cup": 2}  # and their number of classes
SIZE = (48, 40)


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Callable[[str], tuple[Path, dict[str, np.ndarray]]]:
    """Root and drawn label maps of a data set's phantom tree, written when first asked for."""
    made = {}

    def tree(name: str) -> tuple[Path, dict[str, np.ndarray]]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            made[name] = root, getattr(fundus_disc, f"write_{name}")(root, size=SIZE)
        return made[name]

    return tree


@contextmanager
def replaced(file: Path, content: bytes | None):
    """Another content of a file, or none, for a while."""
    before = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def wanted(labels: np.ndarray, target: str) -> np.ndarray:
    """The label map of a target, of a phantom's labels: 2 disc, 3 cup."""
    return {
        "disc": labels >= 2,
        "cup": labels == 3,
        "rim": labels == 2,
        "disc+cup": np.maximum(labels, 1) - 1,
    }[target]


def drawn_labels(dataset, drawn: dict[str, np.ndarray], index: int) -> np.ndarray:
    return drawn[dataset.cases[index].images[0].relative_to(dataset.root).as_posix()]


@pytest.mark.parametrize("name", READERS)
def test_counts_of_the_paper(trees, name):
    root, drawn = trees(name)
    splits = {split: READERS[name](root, split) for split in ("train", "test")}
    assert tuple(len(dataset) for dataset in splits.values()) == COUNTS[name]
    if name == "refuge2":
        splits["val"] = refuge2(root, "val")
        assert len(splits["val"]) == 400
    files = [case.images[0] for dataset in splits.values() for case in dataset.cases]
    assert len(set(files)) == len(files) == len(drawn)
    for dataset in splits.values():
        dataset.check()
        assert dataset.class_names == ("disc",)
        assert pickle.loads(pickle.dumps(dataset))[0]["name"] == dataset.names[0]


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_splits_are_those_of_scikit_learn(trees, name):
    selection = pytest.importorskip("sklearn.model_selection")
    root, drawn = trees(name)
    names = sorted((Path(path).name for path in drawn), key=str.lower)
    train, test = selection.train_test_split(names, test_size=0.25, random_state=0)
    for split, expected in (("train", train), ("test", test), ("all", names)):
        dataset = READERS[name](root, split)
        assert [case.images[0].name for case in dataset.cases] == expected


@pytest.mark.parametrize("name", ["drishti_gs", "origa", "refuge2"])
@pytest.mark.parametrize("target", TARGETS)
def test_reads_the_rasters_that_were_drawn(trees, name, target):
    root, drawn = trees(name)
    for split in ("train", "test"):
        dataset = READERS[name](root, split, target=target)
        assert dataset.num_classes == TARGETS[target]
        for index in range(3):
            example = dataset[index]
            labels = wanted(drawn_labels(dataset, drawn, index), target)
            assert example["mask"].dtype == example["image"].dtype == np.uint8
            assert example["image"].shape == (*SIZE, 3)
            np.testing.assert_array_equal(example["mask"], labels)
            assert labels.any()
            with Image.open(dataset.cases[index].images[0]) as image:
                np.testing.assert_array_equal(example["image"], np.array(image))


def test_targets_are_named_and_fit_together(trees):
    root, _ = trees("refuge2")
    both = refuge2(root, target="disc+cup")
    assert both.class_names == ("disc rim", "cup")
    masks = {target: READERS["refuge2"](root, target=target)[0]["mask"] for target in TARGETS}
    np.testing.assert_array_equal(masks["disc+cup"], masks["rim"] + 2 * masks["cup"])
    np.testing.assert_array_equal(masks["disc"], masks["rim"] | masks["cup"])


@pytest.mark.parametrize("name", WITH_CUP)
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
    root, drawn = trees(name)
    dataset = READERS[name](root, "all", target=target)
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
        labels = wanted(drawn_labels(dataset, drawn, index), target)
        assert (mask ^ labels).sum() <= 0.1 * labels.sum()


def test_fills_large_outlines_as_skimage_does(rng):
    angles = np.sort(rng.uniform(0, 2 * np.pi, 40))
    radii = rng.uniform(20, 60, 40)
    corners = np.stack([90 + radii * np.cos(angles), 70 + radii * np.sin(angles)], axis=1)
    mask = fill_outlines([corners], (140, 180), Path("any"))
    assert mask.shape == (140, 180)
    assert_filled(mask, corners)


def test_both_experts_of_papila(trees):
    root, _ = trees("papila")
    datasets = {who: papila(root, "all", expert=who) for who in ("first", "second", "either")}
    first, second, either = (dataset[4]["mask"] for dataset in datasets.values())
    np.testing.assert_array_equal(second, np.roll(first, 1, axis=1))
    np.testing.assert_array_equal(either, first | second)
    labels = [
        file.name for file in papila(root, "all", expert="either", target="rim").cases[0].labels
    ]
    assert labels == [f"RET002OD_{part}_exp{n}.txt" for part in ("disc", "cup") for n in (1, 2)]
    rim = papila(root, "all", expert="either", target="rim")[4]["mask"]
    cup = papila(root, "all", expert="either", target="cup")[4]["mask"]
    np.testing.assert_array_equal(rim, either & ~cup & 1)


@pytest.mark.parametrize(
    ("name", "patients", "test"), [("papila", 244, (366, 122)), ("grape", 144, None)]
)
def test_patients_are_told_by_names_and_kept_together(trees, name, patients, test):
    root, _ = trees(name)
    everything = READERS[name](root, "all")
    assert len(set(everything.patients)) == patients
    assert everything[0]["patient"] == {"papila": "RET002", "grape": "100"}[name]
    by_image = [set(READERS[name](root, split).patients) for split in ("train", "test")]
    assert by_image[0] & by_image[1]
    parts = [READERS[name](root, split, drawn_by="patient") for split in ("train", "test")]
    assert not set(parts[0].patients) & set(parts[1].patients)
    assert len(set(parts[1].patients)) == patients / 4
    assert sorted(parts[0].names + parts[1].names) == sorted(everything.names)
    assert test is None or tuple(len(part) for part in parts) == test


@pytest.mark.parametrize("name", READERS)
def test_another_tree_is_shown_beside_the_expected_one(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    expected = {"papila": "Contours/RET002OD_disc_exp1.txt", "idrid": "train/od_masks/IDRiD_01_OD"}
    with pytest.raises(DataError, match=r"found there: elsewhere/\); expected") as error:
        READERS[name](tmp_path)
    assert expected.get(name, "") in str(error.value)
    with pytest.raises(DataError, match=r"absent: no .*no such folder"):
        READERS[name](tmp_path / "absent")
    with pytest.raises(ValueError, match="split 'validation': expected one of train, "):
        READERS[name](tmp_path, "validation")


@pytest.mark.parametrize("name", READERS)
def test_a_missing_mask_is_named(trees, name):
    dataset = READERS[name](trees(name)[0])
    (label,) = dataset.cases[1].labels
    with replaced(label, None):
        with pytest.raises(DataError, match=f"1 files of the {name} data set are missing") as error:
            dataset.check()
        assert str(label) in str(error.value)
        with pytest.raises(DataError, match=label.name):
            dataset[1]


@pytest.mark.parametrize("name", READERS)
def test_a_truncated_photograph_is_named(trees, name):
    dataset = READERS[name](trees(name)[0])
    file = dataset.cases[0].images[0]
    with (
        replaced(file, file.read_bytes()[:-400]),
        pytest.raises(DataError, match=f"{file.name}: not a readable"),
    ):
        dataset[0]


@pytest.mark.parametrize("name", ["drishti_gs", "g1020", "grape", "idrid", "refuge2"])
def test_a_mask_of_another_size_is_named(trees, name):
    dataset = READERS[name](trees(name)[0])
    (label,) = dataset.cases[0].labels
    if label.suffix == ".json":
        content = json.loads(label.read_text())
        other = json.dumps({**content, "imageHeight": 40, "imageWidth": 48}).encode()
    else:
        image = Image.fromarray(np.zeros((40, 48), np.uint8))
        other = fundus.encoded(image, {".tif": "TIFF", ".bmp": "BMP"}.get(label.suffix, "PNG"))
    with (
        replaced(label, other),
        pytest.raises(DataError, match=rf"{label.name}: .* 48x40 pixels .* is 40x48"),
    ):
        dataset[0]


@pytest.mark.parametrize("name", DRAWN)
def test_a_split_is_not_drawn_from_a_partial_copy(tmp_path, name):
    getattr(fundus_disc, f"write_{name}")(tmp_path, full=False)
    with pytest.raises(DataError, match=f"3 examples; expected all {sum(COUNTS[name])}"):
        READERS[name](tmp_path)


@pytest.mark.parametrize("truth", ["GT", "Test_GT"])
def test_drishti_gs_truth_under_both_names_and_photographs_in_sub_folders(tmp_path, truth):
    drawn = fundus_disc.write_drishti_gs(tmp_path, full=False, test_truth=truth)
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
    (label,) = drishti_gs(trees("drishti_gs")[0]).cases[0].labels
    with Image.open(label) as image:
        levels = np.array(image)
    assert {0, 64, 191, 255} <= set(np.unique(levels).tolist()) <= {0, 64, 128, 191, 255}


def test_a_soft_map_of_the_cup_of_another_size_is_named(trees):
    root, _ = trees("drishti_gs")
    dataset = drishti_gs(root, target="rim")
    cup = dataset.cases[0].labels[1]
    other = fundus.encoded(Image.fromarray(np.zeros((40, 48), np.uint8)), "PNG")
    with (
        replaced(cup, other),
        pytest.raises(DataError, match=f"{cup.name}: the mask is 48x40"),
    ):
        dataset[0]


def test_g1020_without_a_cup_and_without_a_disc(trees):
    root, drawn = trees("g1020")
    dataset = g1020(root, "all", target="disc+cup")
    index = dataset.names.index("image_4")
    assert set(np.unique(dataset[index]["mask"])) == {0, 1}
    assert (drawn["Images/image_4.jpg"] == 3).any()  # the phantom has one; no outline tells it
    (label,) = dataset.cases[index].labels
    content = json.loads(label.read_text())
    content["shapes"] = content["shapes"][1:]
    message = r"image_4.json: no outline with the label 'disc' \(labels: discloc\)"
    with replaced(label, json.dumps(content).encode()), pytest.raises(DataError, match=message):
        dataset[index]


def test_grape_needs_the_cup_only_where_it_is_asked_for(trees):
    root, _ = trees("grape")
    (label,) = grape(root).cases[0].labels
    content = json.loads(label.read_text())
    content["shapes"] = [shape for shape in content["shapes"] if shape["label"] != "OC"]
    with replaced(label, json.dumps(content).encode()):
        assert grape(root)[0]["mask"].any()
        with pytest.raises(DataError, match=f"{label.name}: no outline with the label 'OC'"):
            grape(root, target="cup")[0]


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
    dataset = grape(trees("grape")[0])
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
    dataset = papila(trees("papila")[0])
    (label,) = dataset.cases[0].labels
    with replaced(label, content), pytest.raises(DataError, match=rf"{label.name}: .*{message}"):
        dataset[0]


def test_whole_coordinates_of_papila_are_the_centres_of_pixels(trees):
    draw = pytest.importorskip("skimage.draw")
    dataset = papila(trees("papila")[0])
    (label,) = dataset.cases[0].labels
    columns, rows = [9.6, 20.4, 20.4, 9.6], [11.7, 11.7, 30.3, 30.3]
    expected = np.zeros(SIZE, np.uint8)
    expected[draw.polygon(rows, columns, SIZE)] = 1
    text = "".join(f"{x} {y}\n" for x, y in zip(columns, rows, strict=True))
    with replaced(label, text.encode()):
        np.testing.assert_array_equal(dataset[0]["mask"], expected)


def mat(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    savemat(file, arrays)
    return file.getvalue()


def test_origa_masks_are_cut_to_the_photograph(trees):
    dataset = origa(trees("origa")[0], target="disc+cup")
    (label,) = dataset.cases[0].labels
    expected = dataset[0]["mask"]
    for left, right, below in ((0, 0, 0), (0, 1, 0), (3, 3, 2), (3, 4, 0)):
        larger = np.pad(expected, ((0, below), (left, right))).astype(float)
        with replaced(label, mat(mask=larger)):
            np.testing.assert_array_equal(dataset[0]["mask"], expected)


def test_origa_masks_that_do_not_fit_are_named(trees):
    dataset = origa(trees("origa")[0])
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
    root, _ = trees("refuge2")
    suffixes = {
        split: {case.labels[0].suffix for case in refuge2(root, split).cases}
        for split in ("train", "val", "test")
    }
    assert suffixes == {"train": {".bmp"}, "val": {".png"}, "test": {".png"}}
    assert refuge2(root).names[39:41] == ("g0040", "n0001")


def test_refuge2_masks_with_other_values_are_named(trees):
    dataset = refuge2(trees("refuge2")[0], "test")
    (label,) = dataset.cases[0].labels
    grey = np.full(SIZE, 255, np.uint8)
    grey[3, 4], grey[5, 6] = 127, 1
    colour = np.zeros((*SIZE, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    for pixels, message in (
        (grey, "unknown values 1, 127; expected 0 cup, 128 disc rim, 255 background"),
        (colour, "a coloured image; expected grey levels"),
    ):
        with (
            replaced(label, fundus.encoded(Image.fromarray(pixels), "PNG")),
            pytest.raises(DataError, match=f"{label.name}: {message}"),
        ):
            dataset[0]


@pytest.mark.parametrize("reduced", [False, True])
def test_idrid_in_the_owners_tree_and_in_the_reduced_one(tmp_path, reduced):
    drawn = fundus_disc.write_idrid(tmp_path, size=SIZE, full=False, reduced=reduced)
    for split, first in (("train", "IDRiD_01"), ("test", "IDRiD_55")):
        dataset = idrid(tmp_path, split)
        assert dataset.names[0] == first
        assert dataset.cases[0].labels[0].suffix == (".png" if reduced else ".tif")
        for index in range(3):
            labels = drawn_labels(dataset, drawn, index)
            np.testing.assert_array_equal(dataset[index]["mask"], labels >= 2)


def test_idrid_itself(shared_data):
    root = shared_data / "idrid_optic_disc"
    train, test = idrid(root), idrid(root, "test")
    assert (len(train), len(test)) == (54, 27)
    train.check()
    test.check()
    assert test.names[0] == "IDRiD_55"
    example = test[0]
    assert example["image"].shape == (2848, 4288, 3)
    with Image.open(test.cases[0].labels[0]) as image:
        np.testing.assert_array_equal(example["mask"] > 0, np.array(image.convert("L")) > 0)
    assert 0.005 < example["mask"].mean() < 0.05
