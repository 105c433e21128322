"""ChestX-ray8 with CheXmask's table: masks, split, quality, and rows read where they lie."""

import csv
import pickle

import numpy as np
import pytest
from PIL import Image

from samjax.data import DataError
from samjax.data.datasets.chestxray8 import chestxray8
from samjax.data.layouts.xray import write_chestxray8


@pytest.fixture
def films(tmp_path):
    return tmp_path, write_chestxray8(tmp_path, count=12, size=24)


def rows_of(root) -> list[dict[str, str]]:
    with (root / "ChestX-Ray8.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def rewrite(root, rows, **names) -> None:
    """Writes the table again; `names` renames columns."""
    header = {name: names.get(name.replace(" ", "_"), name) for name in rows[0]}
    with (root / "ChestX-Ray8.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([header.values(), *(row.values() for row in rows)])


def by_published_rule(row: dict[str, str]) -> np.ndarray:
    """CheXmask's rule on flat pixels, first pixel 1; the heart over the lungs."""
    height, width = int(row["Height"]), int(row["Width"])
    labels = np.zeros((height, width), np.uint8)
    for label, name in enumerate(("Left Lung", "Right Lung", "Heart"), start=1):
        numbers = np.array(row[name].split(), int).reshape(-1, 2)
        pixels = np.concatenate([np.arange(start, start + count) for start, count in numbers])
        labels[np.unravel_index(pixels - 1, (height, width))] = label
    return labels


def test_masks_are_those_of_the_published_rule_and_those_drawn(films):
    root, drawn = films
    dataset = chestxray8(root, "all", min_quality=0)
    rows = {row["Image Index"]: row for row in rows_of(root)}
    assert len(dataset) == 12
    for example in (dataset[index] for index in range(12)):
        mask = example["mask"]
        assert np.array_equal(mask, by_published_rule(rows[f"{example['name']}.png"]))
        assert np.array_equal(mask, drawn[example["name"]])
        assert set(np.unique(mask)) == {0, 1, 2, 3}
        assert example["image"].shape == (24, 24, 3)
    assert dataset.class_names == ("left lung", "right lung", "heart")


def test_lists_split_by_patient(films):
    root, _ = films
    train, test = (chestxray8(root, split, min_quality=0) for split in ("train", "test"))
    assert (len(train), len(test)) == (10, 2)
    assert [f"{name}.png" for name in test.names] == (root / "test_list.txt").read_text().split()
    assert not set(train.patients) & set(test.patients)
    assert train.patients[:3] == ("00000001", "00000001", "00000002")
    assert chestxray8(root, "all", min_quality=0).names == train.names + test.names


def test_quality_leaves_out_the_doubtful(films):
    root, _ = films
    counts = [len(chestxray8(root, "all", min_quality=q)) for q in (0, 0.65, 0.7, 0.85)]
    assert counts == [12, 12, 9, 9]
    assert len(chestxray8(root, "all")) == 9
    rows = rows_of(root)
    rows[0]["Dice RCA (Mean)"] = ""
    rewrite(root, rows)
    assert len(chestxray8(root, "all", min_quality=0)) == 11
    with pytest.raises(ValueError, match="min_quality 70"):
        chestxray8(root, min_quality=70)


def test_any_order_of_columns_quotes_and_line_ends(films):
    root, drawn = films
    rows = [
        {"": str(i), "Heart": row["Heart"], "note": 'said "so",\r\nthen\n', **row}
        for i, row in enumerate(rows_of(root))
    ]
    rewrite(root, rows, Image_Index="Image ID")
    table = root / "ChestX-Ray8.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes() + b"\r\n")
    (root / "OriginalResolution").mkdir()
    table.rename(root / "OriginalResolution" / table.name)
    dataset = chestxray8(root, "all", min_quality=0)
    assert all(np.array_equal(dataset[i]["mask"], drawn[dataset.names[i]]) for i in range(12))


def test_the_rows_stay_on_disk_and_it_pickles(films):
    root, _ = films
    dataset = chestxray8(root)
    packed = pickle.dumps(dataset)
    assert rows_of(root)[0]["Heart"].encode() not in packed
    for key, value in pickle.loads(packed)[3].items():
        assert np.array_equal(value, dataset[3][key])


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("Heart", "576 2", "column Heart: a run of 2 from pixel 576 is not within .* 576 pixels"),
        ("Heart", "0 2", "from pixel 0 is not within"),
        ("Heart", "5 2 9", "column Heart: 3 numbers; expected pairs"),
        ("Left Lung", "5 two", "column Left Lung: .*'two'; expected pairs"),
        ("Left Lung", "nan", "'nan'"),
        ("Width", "25", r"the mask is 25x24 pixels .*00000001_000.png is 24x24"),
        ("Height", "", "Height and Width are no whole numbers"),
    ],
)
def test_a_damaged_row_is_named(films, column, value, complaint):
    root, _ = films
    rows = rows_of(root)
    rows[0][column] = value
    rewrite(root, rows)
    with pytest.raises(DataError, match=rf"ChestX-Ray8.csv, 00000001_000.png.*{complaint}"):
        chestxray8(root)[0]


def test_a_table_that_changes_meanwhile(films):
    root, _ = films
    dataset = chestxray8(root)
    rewrite(root, rows_of(root)[1:])
    with pytest.raises(DataError, match=r"the row of 00000001_000.png is not where it was"):
        dataset[0]
    (root / "ChestX-Ray8.csv").unlink()
    with pytest.raises(DataError, match=r"ChestX-Ray8.csv: no such file"):
        dataset[0]


def test_bad_tables(films):
    root, _ = films
    table, rows = root / "ChestX-Ray8.csv", rows_of(root)
    rewrite(root, [*rows, rows[0]])
    with pytest.raises(DataError, match=r"line 50: a second row of 00000001_000.png"):
        chestxray8(root)
    rewrite(root, [{**rows[0], "Dice RCA (Mean)": "good"}])
    with pytest.raises(DataError, match=r"line 2: Dice RCA \(Mean\) is no number"):
        chestxray8(root)
    rewrite(root, rows, Heart="Herz")
    with pytest.raises(DataError, match="no column Heart; found Image Index"):
        chestxray8(root)
    table.write_text('Image Index,"open\n')
    with pytest.raises(DataError, match="line 1: a quote that does not end"):
        chestxray8(root)
    table.write_text("")
    with pytest.raises(DataError, match="no column Image Index or Image ID, Dice RCA"):
        chestxray8(root)


def test_what_is_listed_must_be_there(films):
    root, _ = films
    rewrite(root, rows_of(root)[2:])
    with pytest.raises(
        DataError, match=r"2 listed images have no row: 00000001_000.png, 00000001_"
    ):
        chestxray8(root)
    for file in root.glob("images_*/images/00000001_00*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"2 listed images have no file: 00000001_000.png"):
        chestxray8(root)
    assert len(chestxray8(root, partial_copy=True, min_quality=0)) == 8
    (root / "test_list.txt").write_text("scan.png\n")
    with pytest.raises(DataError, match=r"test_list.txt: 'scan.png' is no name like"):
        chestxray8(root, "test")


def test_another_tree_prints_the_expected_one(tmp_path):
    with pytest.raises(DataError, match=r"no ChestX-Ray8.csv \(found there: nothing\)(.|\n)*NIH's"):
        chestxray8(tmp_path)
    write_chestxray8(tmp_path, count=4, size=16)
    with pytest.raises(DataError, match=r"no other.csv \(found there: ChestX-Ray8.csv, images_001"):
        chestxray8(tmp_path, masks="other.csv")
    (tmp_path / "train_val_list.txt").unlink()
    with pytest.raises(DataError, match=r"no train_val_list.txt"):
        chestxray8(tmp_path)
    with pytest.raises(ValueError, match="split 'val': expected one of train, test, all"):
        chestxray8(tmp_path, "val")


def test_films_of_16_bits_are_refused(films):
    root, _ = films
    file = root / "images_001" / "images" / "00000001_000.png"
    Image.fromarray(np.full((24, 24), 1000, np.uint16)).save(file)
    with pytest.raises(DataError, match=r"00000001_000.png: more than 8 bits per channel"):
        chestxray8(root)[0]
