"""SAM2LoRA's pools: where each set lies, how it is split and labelled, and several as one."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from data_sets import touch, write_fundus
from experiments import published
from experiments.fundus_pools import BESIDE, POOLS, SETS, Joined, chosen_sets, first_of, joined
from samjax.data import DataError, Subset
from samjax.data.datasets import READERS
from samjax.data.layouts import fundus, fundus_disc
from samjax.data.subsets import patients_of

COUNTS = {  # train and test, of the released code
    **{"chasedb1": (20, 8), "drive": (20, 20), "fives": (600, 200), "hrf": (32, 13)},
    **{"stare": (15, 5), "drishti_gs": (50, 51), "g1020": (765, 255), "grape": (473, 158)},
    **{"origa": (487, 163), "papila": (366, 122), "refuge2": (400, 400), "idrid": (54, 27)},
}
SMALL = {"drive", "fives", "drishti_gs", "refuge2", "idrid"}  # three phantoms each will do


class Few:
    """Examples that are told apart by their numbers."""

    def __init__(self, count, class_names=("vessel",), patients=None):
        self.count, self.class_names = count, class_names
        if patients is not None:
            self.patients = patients

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        mask = np.full((4, 5), index % 2, np.uint8)
        image = np.full((4, 5, 3), index, np.uint8)
        return {"image": image, "mask": mask, "name": f"eye{index}", "patient": "one"}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """All sets in one folder, as the smoke run writes them."""
    root = tmp_path_factory.mktemp("fundus")
    for found in SETS.values():
        found.write(root / found.folders[0])
    return root


@pytest.mark.parametrize("name", SETS)
def test_splits_have_the_published_counts(tmp_path, name):
    options = {"test_labels": True} if name == "drive" else {}
    write_fundus(name, tmp_path / SETS[name].folders[-1], **options)
    opened = SETS[name].open(tmp_path, "disc")
    assert (len(opened.train), len(opened.test)) == COUNTS[name]
    assert not {c.images for c in opened.train.cases} & {c.images for c in opened.test.cases}
    assert opened.notes == ()
    assert opened.train.class_names == opened.test.class_names


@pytest.mark.parametrize("name", SETS)
def test_what_the_smoke_run_writes_is_opened(phantoms, name):
    opened = SETS[name].open(phantoms, "disc")
    expected = (3, 3) if name in SMALL else COUNTS[name]
    assert (len(opened.train), len(opened.test)) == expected
    example = opened.train[0]
    assert example["image"].shape == (*example["mask"].shape, 3)
    assert set(np.unique(example["mask"])) == {0, 1}


def test_pools_are_those_of_the_released_code():
    titles = {pool: tuple(SETS[name].title for name in names) for pool, names in POOLS.items()}
    assert titles["vessel"] == published.VESSELS
    assert titles["disc"] == titles["cup"] == published.DISCS
    assert "idrid" not in {name for names in POOLS.values() for name in names}
    assert {SETS[name].reader for name in SETS} == set(SETS) <= set(READERS)


def test_sets_are_chosen_in_the_order_of_the_pool():
    assert chosen_sets("disc", ()) == POOLS["disc"]
    assert chosen_sets("vessel", ("stare", "drive", "papila", "drive")) == ("drive", "stare")
    assert chosen_sets("disc", ("idrid", "papila")) == ("papila", "idrid")
    assert BESIDE == {"disc": ("idrid",)}
    assert chosen_sets("vessel", ("idrid",)) == chosen_sets("cup", ("idrid",)) == ()
    with pytest.raises(ValueError, match="pool 'veins': expected one of vessel, disc, cup"):
        chosen_sets("veins", ())
    with pytest.raises(ValueError, match="data set 'chase': expected some of chasedb1, drive"):
        chosen_sets("vessel", ("drive", "chase"))


@pytest.mark.parametrize("name", ["chasedb1", "stare", "papila"])
def test_two_observers_are_joined_and_one_is_told(tmp_path, name):
    write_fundus(name, tmp_path)
    argument, second = SETS[name].joins
    options = {"target": "disc"} if SETS[name].targeted else {}
    first = READERS[name](tmp_path, "test", **options)[0]["mask"]
    other = READERS[name](tmp_path, "test", **{argument: "second"}, **options)[0]["mask"]
    both = SETS[name].open(tmp_path, "disc", alone=True).test[0]["mask"]
    assert (first != other).any()
    np.testing.assert_array_equal(both, first | other)
    for file in tmp_path.glob(second):
        file.unlink()
    opened = SETS[name].open(tmp_path, "disc", alone=True)
    np.testing.assert_array_equal(opened.test[0]["mask"], first)
    assert opened.notes == (f"{SETS[name].title}: one observer, there is no {second}",)


def test_drive_joins_observers_of_its_test_images_only(tmp_path):
    fundus.write_drive(tmp_path, test_labels=True, full=False)
    opened = SETS["drive"].open(tmp_path, "disc", alone=True)
    assert [len(part.cases[0].labels) for part in opened[:2]] == [1, 2]
    shutil.rmtree(tmp_path / "test" / "2nd_manual")
    opened = SETS["drive"].open(tmp_path, "disc", alone=True)
    assert [len(part.cases[0].labels) for part in opened[:2]] == [1, 1]
    assert opened.notes == ("DRIVE: one observer, there is no test/2nd_manual/*",)
    shutil.rmtree(tmp_path / "test" / "1st_manual")
    with pytest.raises(DataError, match="Today's download of DRIVE has no labels"):
        SETS["drive"].open(tmp_path, "disc", alone=True)


@pytest.mark.parametrize("name", POOLS["cup"])
def test_disc_and_cup_are_two_targets(phantoms, name):
    disc, cup = (SETS[name].open(phantoms, target).train for target in ("disc", "cup"))
    assert (disc.class_names, cup.class_names) == (("disc",), ("cup",))
    masks = [(disc[i]["mask"], cup[i]["mask"]) for i in range(3)]
    assert all((c <= d).all() and c.sum() < d.sum() for d, c in masks)
    assert any(c.any() for _, c in masks)


def test_folders_are_those_of_the_code_or_of_the_owners(tmp_path):
    nested, plain = tmp_path / "nested", tmp_path / "plain"
    for data, folder in ((nested, "CHASEDB1/CHASEDB1"), (plain, "chase_db1")):
        (data / folder).mkdir(parents=True)
        assert SETS["chasedb1"].root(data, alone=False) == data / folder
    (nested / "PAPILA").mkdir()
    assert SETS["papila"].root(nested, alone=False) == nested / "PAPILA"
    (nested / "PapilaDB").mkdir()
    assert SETS["papila"].root(nested, alone=False) == nested / "PapilaDB"


def test_the_folder_of_the_only_set_is_taken_itself(tmp_path):
    fundus_disc.write_idrid(tmp_path / "mine", full=False)
    assert len(SETS["idrid"].open(tmp_path / "mine", "disc", alone=True).train) == 3
    (tmp_path / "mine").rename(tmp_path / "IDRiD")  # a folder of its name goes before
    assert len(SETS["idrid"].open(tmp_path, "disc", alone=True).train) == 3


@pytest.mark.parametrize("name", SETS)
def test_another_folder_is_shown_beside_the_expected_tree(tmp_path, name):
    touch(tmp_path / "holiday" / "sea.jpg", tmp_path / "notes.txt")
    first = SETS[name].folders[0]
    found = rf"no folder {first}.* of {SETS[name].title} \(found there: holiday/, notes\.txt\)"
    with pytest.raises(DataError, match=found + r"; expected\n +\S"):
        SETS[name].open(tmp_path, "disc")
    with pytest.raises(DataError, match=r"found there: holiday/, notes\.txt\); expected\n +\S"):
        SETS[name].open(tmp_path, "disc", alone=True)


def test_a_missing_file_is_named(tmp_path):
    fundus.write_fives(tmp_path, full=False)
    gone = next((tmp_path / "train").glob("Gro*/1_A.png"))
    gone.unlink()
    with pytest.raises(DataError, match=r"1 files of the fives data set are missing:\n.*1_A\.png"):
        SETS["fives"].open(tmp_path, "disc", alone=True)


def test_joined_sets_are_one_after_the_other(phantoms):
    names = ("drive", "stare", "fives")
    parts = {SETS[name].title: SETS[name].open(phantoms, "disc").train for name in names}
    every = joined(parts)
    assert len(every) == 3 + 15 + 3
    assert (every.class_names, every.num_classes) == (("vessel",), 1)
    places = [(title, i) for title, part in parts.items() for i in range(len(part))]
    for index in (0, 2, 3, 17, 18, 20):
        title, place = places[index]
        found, expected = every[index], parts[title][place]
        assert found["name"] == f"{title}/{expected['name']}"
        assert found["patient"] == every.patients[index] == f"{title}/{expected['patient']}"
        for array in ("image", "mask"):
            np.testing.assert_array_equal(found[array], expected[array])
    with pytest.raises(IndexError):
        every[len(every)]
    # Worker processes get it.
    again = pickle.loads(pickle.dumps(every))
    assert again.patients == every.patients
    assert again[20]["name"] == every[20]["name"]


def test_all_discs_and_idrid_have_the_same_class(phantoms):
    names = (*POOLS["disc"], *BESIDE["disc"])
    every = joined({SETS[name].title: SETS[name].open(phantoms, "disc").test for name in names})
    assert every.class_names == ("disc",)
    assert len(every) == 3 + 255 + 158 + 163 + 122 + 3 + 3


def test_patients_of_different_sets_are_different():
    every = Joined({"A": Few(2, patients=("1", "1")), "B": Few(3)})
    assert every.patients == ("A/1", "A/1", "B/0", "B/1", "B/2")
    assert [every[i]["patient"] for i in range(5)] == list(every.patients)


def test_one_set_stays_as_it_is_and_other_classes_are_told():
    only = Few(2)
    assert joined({"A": only}) is only
    with pytest.raises(ValueError, match=r"one and the same classes are joined, got .*disc"):
        joined({"A": only, "B": Few(2, ("disc",))})
    with pytest.raises(ValueError, match=r"are joined, got \{\}"):
        joined({})
    assert Joined({"A": Few(1, None), "B": Few(1, None)}).num_classes == 1


@pytest.mark.parametrize("count", [None, 5, 9])
def test_first_of_all_is_the_set_itself(count):
    every = Few(5)
    assert first_of(every, count) is every


def test_first_of_many_are_the_first():
    every = Joined({"A": Few(2), "B": Few(3)})
    some = first_of(every, 3)
    assert isinstance(some, Subset)
    assert [some[i]["name"] for i in range(len(some))] == ["A/eye0", "A/eye1", "B/eye0"]
    assert patients_of(some) == ("A/0", "A/1", "B/0")
    assert (some.class_names, some.num_classes) == (("vessel",), 1)


def test_real_chasedb1_without_the_second_observer(shared_data):
    opened = SETS["chasedb1"].open(shared_data, "disc")
    assert (len(opened.train), len(opened.test)) == COUNTS["chasedb1"]
    assert opened.notes == ("CHASEDB1: one observer, there is no **/Image_*_2ndHO.png",)
    mask, (file,) = opened.test[0]["mask"], opened.test.cases[0].labels
    assert mask.shape == (960, 999)
    np.testing.assert_array_equal(mask > 0, np.asarray(Image.open(file).convert("L")) > 127)


def test_real_idrid_is_found_in_the_reduced_layout(shared_data):
    opened = SETS["idrid"].open(shared_data, "disc")
    assert (len(opened.train), len(opened.test)) == COUNTS["idrid"]
    assert 0 < opened.test[0]["mask"].mean() < 0.1
