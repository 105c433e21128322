"""Parts of a data set: few shots, splits by patient, what is left without the broken ones."""

import numpy as np
import pytest

from samjax.data import DataError, few_shot, split, without_bad
from samjax.data.datasets import Pictures
from samjax.data.subsets import Subset


class Numbered:
    num_classes = 3

    def __init__(self, patients=None, broken=()):
        self.patients = patients or [f"p{i}" for i in range(12)]
        self.broken = broken

    def __len__(self):
        return len(self.patients)

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError(f"{index}.png: not a\nreadable image")
        image = np.full((4, 4, 3), index, np.uint8)
        return {"image": image, "mask": image[..., 0], "name": str(index)}


def test_few_shots_are_nested_and_seeded():
    of = {count: set(few_shot(Numbered(), count, seed=3).indices) for count in (1, 5, 8, 12)}
    assert [len(chosen) for chosen in of.values()] == [1, 5, 8, 12]
    assert of[1] < of[5] < of[8] < of[12]
    assert of[5] == set(few_shot(Numbered(), 5, seed=3).indices)
    assert of[5] != set(few_shot(Numbered(), 5, seed=4).indices)
    for count in (0, 13):
        with pytest.raises(ValueError, match=f"{count} examples: expected 1 to 12"):
            few_shot(Numbered(), count)


def test_a_patient_is_never_on_both_sides():
    dataset = Numbered([f"p{i // 3}" for i in range(12)])
    for seed in range(8):
        train, val = split(dataset, 0.25, seed)
        assert (len(train), len(val)) == (9, 3)
        assert not set(train.patients) & set(val.patients)
        assert sorted(train.indices + val.indices) == list(range(12))
    with pytest.raises(ValueError, match="at least 2 patients, all examples are of a"):
        split(Numbered(["a"] * 5), 0.2, 0)


def test_a_subset_of_a_subset_keeps_classes_and_patients():
    inner = Subset(Subset(Numbered(), [8, 3, 5]), [2, 0])
    assert inner.num_classes == 3
    assert inner.patients == ("p5", "p8")
    assert [inner[i]["name"] for i in range(2)] == ["5", "8"]


def test_what_cannot_be_used_is_left_out_and_listed(tmp_path):
    file = tmp_path / "bad.txt"
    left = without_bad(Numbered(broken=(2, 7)), file, progress=False)
    assert left.indices == (0, 1, 3, 4, 5, 6, 8, 9, 10, 11)
    assert file.read_text() == ("2\t2.png: not a readable image\n7\t7.png: not a readable image\n")
    without_bad(Numbered(), file, progress=False)
    assert file.read_text() == ""
    with pytest.raises(DataError, match="none of 12 examples can be used"):
        without_bad(Numbered(broken=range(12)), file, progress=False)


def test_an_empty_split_is_an_error(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}: no examples in the split 'val'"):
        Pictures(
            dataset="none",
            root=tmp_path,
            split="val",
            cases=(),
            class_names=("disc",),
            read_label=lambda case, size: np.zeros(size, np.uint8),
        )
