"""Readers of retinal vessels: what each has of its own, on phantoms."""

import gzip
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_sets import PHOTOGRAPH, replaced, write_fundus
from samjax.data import DataError
from samjax.data.datasets import READERS
from samjax.data.datasets.drive import drive
from samjax.data.datasets.fives import fives
from samjax.data.datasets.stare import stare
from samjax.data.layouts import fundus


@pytest.mark.parametrize(
    ("name", "split"), [("chasedb1", "all"), ("drive", "test"), ("stare", "all")]
)
def test_observers(trees, name, split):
    tree = trees(name)
    first, second, either = (
        tree.read(split, observer=who) for who in ("first", "second", "either")
    )
    vessels = tree.labels(first, 1) == 1
    further_right = np.roll(vessels, 1, axis=1)
    np.testing.assert_array_equal(first[1]["mask"], vessels)
    np.testing.assert_array_equal(second[1]["mask"], further_right)
    np.testing.assert_array_equal(either[1]["mask"], vessels | further_right)
    with pytest.raises(ValueError, match="observer 'both': expected one of first, second, either"):
        tree.read(split, observer="both")


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
    tree = trees("drive")
    assert tree.read(observer="either").cases == tree.read().cases


@pytest.mark.parametrize(
    ("name", "views", "labels"),
    [("drive", "training/mask", "1st_manual"), ("hrf", "mask", "manual1")],
)
def test_fields_of_view_are_no_labels(trees, name, views, labels):
    tree = trees(name)
    found = {file.parent.name for case in tree.read().cases for file in case.labels}
    assert found == {labels}
    (tree.root / views).rename(tree.root / "aside")
    without: Any = READERS[name](tree.root)
    assert without[0]["mask"].any()
    (tree.root / "aside").rename(tree.root / views)


def test_fives_with_the_folder_spelt_right(tmp_path):
    drawn = fundus.write_fives(tmp_path, full=False, masks="Ground truth")
    test = fives(tmp_path, "test")
    assert test.names == ("1_A", "2_A", "3_A")
    np.testing.assert_array_equal(test[2]["mask"], drawn["test/Original/3_A.png"] == 1)
    shutil.rmtree(tmp_path / "test" / "Ground truth")
    with pytest.raises(DataError, match=r"no folder Groud truth or Ground truth \(found there: O"):
        fives(tmp_path, "test")


def test_fives_has_as_many_of_each_group(trees):
    names = trees("fives").read().names
    assert [sum(name.endswith(group) for name in names) for group in "ADGN"] == [150] * 4


def test_hrf_is_sorted_whatever_the_case_of_the_letters(trees):
    dataset = trees("hrf").read("all")
    assert dataset.names[:4] == ("01_dr", "01_g", "01_h", "02_dr")
    assert [case.images[0].suffix for case in dataset.cases[:3]] == [".JPG", ".jpg", ".jpg"]


def test_stare_packed_unpacked_and_both(trees, tmp_path):
    packed = trees("stare").read(observer="either")
    write_fundus("stare", tmp_path, packed=False)
    (tmp_path / "stare-images" / "im0001.ppm.gz").touch()  # the unpacked one goes before
    unpacked = stare(tmp_path, observer="either")
    assert packed.names == unpacked.names
    assert {case.images[0].suffix for case in unpacked.cases} == {".ppm"}
    for index in range(3):
        for key in ("image", "mask"):
            np.testing.assert_array_equal(packed[index][key], unpacked[index][key])


def test_stare_names_files_that_are_no_ppm_or_no_mask(trees):
    dataset = trees("stare").read()
    (label,) = dataset.cases[0].labels
    grey = np.full(PHOTOGRAPH, 7, np.uint8)
    colour = np.zeros((*PHOTOGRAPH, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
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
    train, test = (trees("chasedb1").read(split, drawn_by="patient") for split in ("train", "test"))
    assert (len(train), len(test)) == (20, 8)
    assert set(test.patients) == {"11", "12", "13", "14"}
    assert not set(train.patients) & set(test.patients)
