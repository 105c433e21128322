"""What all readers of fundus photographs have in common, on phantoms and on two data sets."""

import gzip
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_sets import PHOTOGRAPH, replaced, write_fundus
from samjax.data import DataError
from samjax.data.datasets import READERS
from samjax.data.layouts.fundus import encoded

COUNTS = {  # of the papers: train, test and, where there is one, val
    "chasedb1": (20, 8),
    "drive": (20, 20),
    "fives": (600, 200),
    "hrf": (32, 13),
    "stare": (15, 5),
    "drishti_gs": (50, 51),
    "g1020": (765, 255),
    "grape": (473, 158),
    "idrid": (54, 27),
    "origa": (487, 163),
    "papila": (366, 122),
    "refuge2": (400, 400, 400),
}
VESSELS = ("chasedb1", "drive", "fives", "hrf", "stare")
DRAWN = {  # data sets without an official split, and the share of the test set
    **{"chasedb1": 0.27, "hrf": 0.27, "stare": 0.25},
    **{"g1020": 0.25, "grape": 0.25, "origa": 0.25, "papila": 0.25},
}
RASTERS = [
    *((name, "vessel") for name in VESSELS),
    *(
        (name, target)
        for name in ("drishti_gs", "origa", "refuge2")
        for target in ("disc", "cup", "rim", "disc+cup")
    ),
]
FORMATS = {".bmp": "BMP", ".gif": "GIF", ".gz": "PPM", ".png": "PNG", ".tif": "TIFF"}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_paper(trees, name):
    tree = trees(name)
    splits = ("train", "test", "val")[: len(COUNTS[name])]
    datasets = [READERS[name](str(tree.root), split) for split in splits]
    assert tuple(len(dataset) for dataset in datasets) == COUNTS[name]
    files = [case.images[0] for dataset in datasets for case in dataset.cases]
    assert len(set(files)) == len(files) == len(tree.drawn)
    for dataset in datasets:
        dataset.check()
        assert dataset.class_names == ("vessel" if name in VESSELS else "disc",)
        assert pickle.loads(pickle.dumps(dataset))[0]["name"] == dataset.names[0]


@pytest.mark.parametrize(("name", "share"), DRAWN.items())
def test_drawn_splits_are_those_of_scikit_learn(trees, name, share):
    selection = pytest.importorskip("sklearn.model_selection")
    tree = trees(name)
    names = sorted((Path(path).name for path in tree.drawn), key=str.lower)
    train, test = selection.train_test_split(names, test_size=share, random_state=0)
    for split, expected in (("train", train), ("test", test), ("all", names)):
        assert [case.images[0].name for case in tree.read(split).cases] == expected


@pytest.mark.parametrize("name", DRAWN)
def test_a_split_is_not_drawn_from_a_partial_copy(tmp_path, name):
    write_fundus(name, tmp_path, full=False)
    with pytest.raises(DataError, match=f"3 examples; expected all {sum(COUNTS[name])}"):
        READERS[name](tmp_path)


def wanted(labels: np.ndarray, target: str) -> np.ndarray:
    """The label map of a target, of a phantom's labels: 1 vessel, 2 disc, 3 cup."""
    return {
        "vessel": labels == 1,
        "disc": labels >= 2,
        "cup": labels == 3,
        "rim": labels == 2,
        "disc+cup": np.maximum(labels, 1) - 1,
    }[target]


@pytest.mark.parametrize(("name", "target"), RASTERS)
def test_reads_what_was_drawn(trees, name, target):
    tree = trees(name)
    for split in ("train", "test"):
        dataset = tree.read(split, **({} if target == "vessel" else {"target": target}))
        assert dataset.num_classes == (2 if target == "disc+cup" else 1)
        for index in range(3):
            example, labels = dataset[index], wanted(tree.labels(dataset, index), target)
            assert example["image"].shape == (*PHOTOGRAPH, 3)
            assert example["image"].dtype == example["mask"].dtype == np.uint8
            np.testing.assert_array_equal(example["mask"], labels)
            assert 0 < np.count_nonzero(labels) < labels.size / 2
            file = dataset.cases[index].images[0]
            content = file.read_bytes()
            content = gzip.decompress(content) if file.suffix == ".gz" else content
            with Image.open(io.BytesIO(content)) as image:
                np.testing.assert_array_equal(example["image"], np.array(image))
            assert example["name"] == dataset.names[index] == file.name.split(".")[0]


@pytest.mark.parametrize("name", [name for name in COUNTS if name != "chasedb1"])
def test_a_missing_mask_is_named(trees, name):
    dataset = trees(name).read()
    (label,) = dataset.cases[1].labels
    with replaced(label, None):
        with pytest.raises(DataError, match=f"1 files of the {name} data set are missing") as error:
            dataset.check()
        assert str(label) in str(error.value)
        with pytest.raises(DataError, match=label.name):
            dataset[1]


@pytest.mark.parametrize("name", COUNTS)
def test_a_truncated_photograph_is_named(trees, name):
    dataset = trees(name).read()
    file = dataset.cases[0].images[0]
    with (
        replaced(file, file.read_bytes()[:-400]),
        pytest.raises(DataError, match=f"{file.name}: not a readable"),
    ):
        dataset[0]


def turned(label: Path) -> bytes:
    """A label file for a photograph of the same sides, but high instead of wide."""
    width, height = PHOTOGRAPH
    if label.suffix == ".json":
        content = json.loads(label.read_text())
        return json.dumps({**content, "imageHeight": height, "imageWidth": width}).encode()
    other = encoded(Image.fromarray(np.zeros((height, width), np.uint8)), FORMATS[label.suffix])
    return gzip.compress(other) if label.suffix == ".gz" else other


@pytest.mark.parametrize("name", [name for name in COUNTS if name not in ("origa", "papila")])
def test_a_mask_of_another_size_is_named(trees, name):
    dataset = trees(name).read("train", **({"observer": "either"} if name == "stare" else {}))
    label = dataset.cases[0].labels[-1]
    drawn = "drawn on a picture of" if label.suffix == ".json" else "the mask is"
    with (
        replaced(label, turned(label)),
        pytest.raises(DataError, match=f"{label.name}: {drawn} 48x40 pixels .* is 40x48"),
    ):
        dataset[0]


@pytest.mark.parametrize(
    ("name", "folder", "first", "size", "share"),
    [
        ("chasedb1", "chase_db1", "Image_02L", (960, 999), (0.05, 0.15)),
        ("idrid", "idrid_optic_disc", "IDRiD_55", (2848, 4288), (0.005, 0.05)),
    ],
)
def test_the_owners_own_files(shared_data, name, folder, first, size, share):
    train, test = (READERS[name](shared_data / folder, split) for split in ("train", "test"))
    assert (len(train), len(test)) == COUNTS[name]
    train.check()
    test.check()
    assert test.names[0] == first
    example: Any = test[0]
    assert example["image"].shape == (*size, 3)
    with Image.open(test.cases[0].labels[0]) as image:
        np.testing.assert_array_equal(example["mask"] > 0, np.array(image.convert("L")) > 0)
    low, high = share
    assert low < example["mask"].mean() < high
