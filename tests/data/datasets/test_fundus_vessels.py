"""Readers of retinal vessels on phantoms in the owners' layouts, and CHASEDB1 itself."""

import gzip
import io
import pickle
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from samjax.data import DataError
from samjax.data.datasets.chasedb1 import chasedb1
from samjax.data.datasets.drive import drive
from samjax.data.datasets.fives import fives
from samjax.data.datasets.hrf import hrf
from samjax.data.datasets.stare import stare
from samjax.data.layouts import fundus

READERS: dict[str, Callable[..., Any]] = {
    "chasedb1": chasedb1,
    "drive": drive,
    "fives": fives,
    "hrf": hrf,
    "stare": stare,
}
COUNTS = {
    "chasedb1": (20, 8),
    "drive": (20, 20),
    "fives": (600, 200),
    "hrf": (32, 13),
    "stare": (15, 5),
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> Callable[[str], tuple[Path, dict[str, np.ndarray]]]:
    """Root and drawn label maps of a data set's phantom tree, written when first asked for."""
    made = {}

    def tree(name: str) -> tuple[Path, dict[str, np.ndarray]]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            more = {"test_labels": True} if name == "drive" else {}
            made[name] = root, getattr(fundus, f"write_{name}")(root, **more)
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


def drawn_vessels(dataset, drawn: dict[str, np.ndarray], index: int) -> np.ndarray:
    image = dataset.cases[index].images[0]
    return drawn[image.relative_to(dataset.root).as_posix()] == 1


@pytest.mark.parametrize("name", READERS)
def test_counts_of_the_paper(trees, name):
    root, drawn = trees(name)
    train, test = READERS[name](root, "train"), READERS[name](str(root), "test")
    assert (len(train), len(test)) == COUNTS[name]
    assert train.class_names == ("vessel",)
    files = [case.images[0] for case in train.cases + test.cases]
    assert len(set(files)) == len(files) == len(drawn)
    train.check()
    test.check()
    assert pickle.loads(pickle.dumps(test))[0]["name"] == test.names[0]


@pytest.mark.parametrize(("name", "share"), [("chasedb1", 0.27), ("hrf", 0.27), ("stare", 0.25)])
def test_drawn_splits_are_those_of_scikit_learn(trees, name, share):
    selection = pytest.importorskip("sklearn.model_selection")
    root, drawn = trees(name)
    names = sorted((Path(path).name for path in drawn), key=str.lower)
    train, test = selection.train_test_split(names, test_size=share, random_state=0)
    for split, expected in (("train", train), ("test", test), ("all", names)):
        dataset = READERS[name](root, split)
        assert [case.images[0].name for case in dataset.cases] == expected


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_reads_what_was_drawn(trees, name, split):
    root, drawn = trees(name)
    dataset = READERS[name](root, split)
    for index in range(3):
        example = dataset[index]
        vessels = drawn_vessels(dataset, drawn, index)
        assert example["image"].shape == (40, 48, 3)
        assert example["image"].dtype == example["mask"].dtype == np.uint8
        np.testing.assert_array_equal(example["mask"], vessels)
        assert 0 < vessels.sum() < vessels.size / 2
        file = dataset.cases[index].images[0]
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        with Image.open(io.BytesIO(content)) as image:
            np.testing.assert_array_equal(example["image"], np.array(image))
        assert example["name"] == dataset.names[index] == file.name.split(".")[0]


@pytest.mark.parametrize(
    ("name", "split"), [("chasedb1", "all"), ("drive", "test"), ("stare", "all")]
)
def test_observers(trees, name, split):
    root, drawn = trees(name)
    first, second, either = (
        READERS[name](root, split, observer=who) for who in ("first", "second", "either")
    )
    vessels = drawn_vessels(first, drawn, 1)
    further_right = np.roll(vessels, 1, axis=1)
    np.testing.assert_array_equal(first[1]["mask"], vessels)
    np.testing.assert_array_equal(second[1]["mask"], further_right)
    np.testing.assert_array_equal(either[1]["mask"], vessels | further_right)
    with pytest.raises(ValueError, match="observer 'both': expected one of first, second, either"):
        READERS[name](root, split, observer="both")


@pytest.mark.parametrize("name", READERS)
def test_another_tree_is_shown_beside_the_expected_one(tmp_path, name):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "notes.txt").touch()
    expected = {"chasedb1": "Image_01L.jpg", "drive": "training/images/21_training.tif"}
    with pytest.raises(DataError, match=r"found there: elsewhere/, notes.txt\); expected") as error:
        READERS[name](tmp_path)
    assert expected.get(name, "") in str(error.value)
    with pytest.raises(DataError, match=r"absent: no .*no such folder"):
        READERS[name](tmp_path / "absent")
    with pytest.raises(ValueError, match="split 'validation': expected one of train, test"):
        READERS[name](tmp_path, "validation")


@pytest.mark.parametrize("name", ["drive", "fives", "hrf", "stare"])
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


@pytest.mark.parametrize("name", READERS)
def test_a_mask_of_another_size_is_named(trees, name):
    root, _ = trees(name)
    dataset = READERS[name](root, "train", **({"observer": "either"} if name == "stare" else {}))
    label = dataset.cases[0].labels[-1]
    image = Image.fromarray(np.zeros((48, 40), np.uint8))
    other = fundus.encoded(
        image, {".gif": "GIF", ".tif": "TIFF", ".png": "PNG"}.get(label.suffix, "PPM")
    )
    other = gzip.compress(other) if label.suffix == ".gz" else other
    with (
        replaced(label, other),
        pytest.raises(DataError, match=f"{label.name}: the mask is 40x48 .* is 48x40"),
    ):
        dataset[0]


@pytest.mark.parametrize(("name", "total"), [("chasedb1", 28), ("hrf", 45), ("stare", 20)])
def test_a_split_is_not_drawn_from_a_partial_copy(tmp_path, name, total):
    getattr(fundus, f"write_{name}")(tmp_path, full=False)
    with pytest.raises(DataError, match=f"3 examples; expected all {total}"):
        READERS[name](tmp_path)


def test_drive_of_today_has_no_test_labels(tmp_path):
    fundus.write_drive(tmp_path, full=False)
    with pytest.raises(DataError, match=r"(?s)no folder 1st_manual.*labelled=False reads the"):
        drive(tmp_path, "test")
    unlabelled = drive(tmp_path, "test", labelled=False)
    assert unlabelled.names == ("01_test", "02_test", "03_test")
    unlabelled.check()
    assert unlabelled[0]["image"].shape == (40, 48, 3)
    assert not unlabelled[0]["mask"].any()
    with pytest.raises(ValueError, match="training images of DRIVE have one observer"):
        drive(tmp_path, observer="second")
    shutil.rmtree(tmp_path / "training" / "1st_manual")
    with pytest.raises(
        DataError, match=r"training: no folder 1st_manual \(found there: images/, m"
    ):
        drive(tmp_path)


def test_drive_takes_the_first_observer_of_the_training_images_for_either(trees):
    root, _ = trees("drive")
    assert drive(root, observer="either").cases == drive(root).cases


@pytest.mark.parametrize("name", ["drive", "hrf"])
def test_fields_of_view_are_no_labels(trees, name):
    root, _ = trees(name)
    labels = {file.parent.name for case in READERS[name](root).cases for file in case.labels}
    assert labels == {{"drive": "1st_manual", "hrf": "manual1"}[name]}
    shutil.rmtree(root / ("training/mask" if name == "drive" else "mask"))
    READERS[name](root)[0]


def test_fives_with_the_folder_spelt_right(tmp_path):
    drawn = fundus.write_fives(tmp_path, full=False, masks="Ground truth")
    test = fives(tmp_path, "test")
    assert test.names == ("1_A", "2_A", "3_A")
    np.testing.assert_array_equal(test[2]["mask"], drawn["test/Original/3_A.png"] == 1)
    shutil.rmtree(tmp_path / "test" / "Ground truth")
    with pytest.raises(DataError, match=r"no folder Groud truth or Ground truth \(found there: O"):
        fives(tmp_path, "test")


def test_fives_has_as_many_of_each_group(trees):
    names = fives(trees("fives")[0]).names
    assert [sum(name.endswith(group) for name in names) for group in "ADGN"] == [150] * 4


def test_hrf_is_sorted_whatever_the_case_of_the_letters(trees):
    dataset = hrf(trees("hrf")[0], "all")
    assert dataset.names[:4] == ("01_dr", "01_g", "01_h", "02_dr")
    assert [case.images[0].suffix for case in dataset.cases[:3]] == [".JPG", ".jpg", ".jpg"]


def test_stare_packed_unpacked_and_both(trees, tmp_path):
    packed = stare(trees("stare")[0], observer="either")
    fundus.write_stare(tmp_path, packed=False)
    (tmp_path / "stare-images" / "im0001.ppm.gz").touch()  # the unpacked one goes before
    unpacked = stare(tmp_path, observer="either")
    assert packed.names == unpacked.names
    assert {case.images[0].suffix for case in unpacked.cases} == {".ppm"}
    for index in range(3):
        for key in ("image", "mask"):
            np.testing.assert_array_equal(packed[index][key], unpacked[index][key])


def test_stare_names_files_that_are_no_ppm_or_no_mask(trees):
    dataset = stare(trees("stare")[0])
    (label,) = dataset.cases[0].labels
    grey = np.full((40, 48), 7, np.uint8)
    colour = np.zeros((40, 48, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    for content, message in (
        (b"no archive", "not a readable PPM"),
        (gzip.compress(b"P5 48 40 65535 " + bytes(2 * 40 * 48)), "pixel format I"),
        (gzip.compress(fundus.encoded(Image.fromarray(grey), "PPM")), "values 7 are no class"),
        (gzip.compress(fundus.encoded(Image.fromarray(colour), "PPM")), "a coloured mask"),
    ):
        with (
            replaced(label, content),
            pytest.raises(DataError, match=f"{label.name}: {message}"),
        ):
            dataset[0]


def test_writers_refuse_a_folder_that_holds_something(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="exists already, expected a new or empty folder"):
        fundus.write_hrf(tmp_path)


def test_chasedb1_by_patient(trees):
    root, _ = trees("chasedb1")
    train, test = (chasedb1(root, split, drawn_by="patient") for split in ("train", "test"))
    assert (len(train), len(test)) == (20, 8)
    assert set(test.patients) == {"11", "12", "13", "14"}
    assert not set(train.patients) & set(test.patients)


def test_chasedb1_itself(shared_data):
    root = shared_data / "chase_db1"
    train, test = chasedb1(root), chasedb1(root, "test")
    assert (len(train), len(test)) == (20, 8)
    train.check()
    test.check()
    example = test[0]
    assert example["image"].shape == (960, 999, 3)
    file = test.cases[0].labels[0]
    np.testing.assert_array_equal(example["mask"] > 0, np.array(Image.open(file).convert("L")) > 0)
    assert 0.05 < example["mask"].mean() < 0.15
