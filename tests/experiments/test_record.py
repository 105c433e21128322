import dataclasses
import json
import math
import platform
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import samjax
from experiments import record as records
from experiments.data_hashes import data_hash, describe_data
from experiments.fundus_pools import joined
from experiments.record import Record, Scores, read_records, write_record
from samjax.data import FolderDataset, Slices
from samjax.data.datasets.base import Case, Pictures, Scans
from samjax.data.subsets import Subset, few_shot
from samjax.data.volumes import Volume
from samjax.metrics import CaseScore, summarise_cases

NAN = math.nan


def scores(values, **changes):
    """Scores of one data set from Dice of (case, class); the second metric is a third of it."""
    cases = [
        CaseScore(f"case {i}, “ü”", f"p{i // 2}", label, "both", {"dice": v, "hd95": v / 3})
        for i, row in enumerate(values)
        for label, v in enumerate(row, 1)
    ]
    names = tuple(f"class {i}" for i in range(1, len(values[0]) + 1))
    given = {"data_set": "CHASEDB1", "prompt": "none", "cases": cases, "class_names": names}
    return Scores(**given | changes)


def make(**changes):
    """A record with something in every field."""
    given = {
        **{"experiment": "sam2lora", "table": "vessel", "method": "SAM2LoRA r=64"},
        **{"run": "vessel_r64_seed0", "smoke": False, "seed": 3},
        "settings": {"rank": 64, "rate": 1e-4, "parts": ["a", "b"], "ckpt": None, "on": True},
        "data": {"train": {"name": "CHASEDB1", "count": 20, "patients": None, "sha256": "ab"}},
        "parameters": {"trainable": 7_693_312, "total": 232_143_312},
        "memory": {"planned_peak": 2**33, "weights": 5},
        **{"seconds": 0.1 + 0.2, "images_per_second": None},
        "history": [{"step": 1, "loss": 1 / 3}, {"step": 2, "val_dice": NAN, "loss": math.inf}],
        "scores": [
            scores([[0.1, 0.7], [1 / 3, NAN], [0.9, 2 / 3]]),
            scores([[0.5]], stage="before", prompt="5 points+box"),
        ],
        "notes": ("one eye of a patient may be on the other side of the split",),
    }
    return Record(**given | changes)


def same(found, expected):
    np.testing.assert_equal(dataclasses.asdict(found), dataclasses.asdict(expected))


def test_a_record_reads_back_equal(tmp_path):
    record = make()
    path = write_record(tmp_path / "runs" / "a", record)
    assert path == tmp_path / "runs" / "a" / "result.json"
    other = make(run="b", scores=[], history=[], images_per_second=2.5, smoke=True)
    write_record(tmp_path / "runs" / "deep" / "b", other)
    found = read_records(tmp_path)
    assert len(found) == 2
    same(found[0], record)
    same(found[1], other)
    # And exactly so: written again it is the same, to the last digit.
    again = write_record(tmp_path / "again", found[0])
    assert again.read_bytes() == path.read_bytes()
    assert read_records(tmp_path / "runs" / "deep")[0].notes == record.notes


def test_what_the_json_says_beside_the_record(tmp_path):
    record = make()
    content = json.loads(write_record(tmp_path, record).read_text("utf-8"))
    assert content["schema"] == 1
    about = content["environment"]
    assert about["python"] == platform.python_version()
    assert set(about["versions"]) == {"samjax", "jax", "flax", "optax", "numpy"}
    assert about["versions"]["samjax"] == samjax.__version__
    assert about["versions"]["jax"] == jax.__version__
    assert about["device"] == {"kind": jax.devices()[0].device_kind, "count": jax.device_count()}
    assert about["host_cores"] >= 1
    for described, of in zip(content["scores"], record.scores, strict=True):
        expected = {name: s.as_json() for name, s in summarise_cases(of.cases).items()}
        assert described["summary"] == expected
    assert content["scores"][0]["summary"]["dice"]["classes"]["2"]["n_undefined"] == 1
    names = sorted(file.name for file in tmp_path.glob("*.csv"))
    assert names == [described["cases"] for described in content["scores"]]
    assert names[1].startswith("cases_01_CHASEDB1_5-points-box_before_")


def test_numpy_numbers_and_paths_become_plain(tmp_path):
    record = make(
        settings={"out": Path("a") / "b", "rate": np.float32(0.5), "parts": ("q", "v")},
        parameters={"trainable": np.int64(3)},
        history=[{"step": np.int32(1), "loss": np.float32(np.nan)}],
    )
    write_record(tmp_path, record)
    (found,) = read_records(tmp_path)
    settings = {"out": str(Path("a") / "b"), "rate": 0.5, "parts": ["q", "v"]}
    assert found.settings == settings
    assert found.parameters == {"trainable": 3}
    assert math.isnan(found.history[0]["loss"])


def test_an_interrupted_record_leaves_the_old_one(tmp_path, monkeypatch):
    old, new = make(), make(scores=[scores([[0.25]])])
    write_record(tmp_path, old)
    monkeypatch.setattr(records, "write_json", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_record(tmp_path, new)
    same(read_records(tmp_path)[0], old)
    monkeypatch.undo()
    write_record(tmp_path, new)
    same(read_records(tmp_path)[0], new)
    assert len(list(tmp_path.glob("cases_*"))) == 1  # those of the old one are gone


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": " "}, "method is ' ', expected a text"),
        ({"seed": True}, "seed is True, expected a whole number"),
        ({"settings": {"a": object()}}, "settings: object is nothing that JSON holds"),
        ({"settings": {"a": NAN}}, "settings: Out of range float"),
        ({"parameters": {"total": 1.5}}, r"parameters is \{'total': 1.5\}, expected whole numbers"),
        ({"memory": {"weights": -1}}, "memory is"),
        ({"seconds": NAN}, "seconds: Out of range"),
        ({"history": [{"loss": "low"}]}, "history is .* expected a list of numbers"),
        ({"data": {"train": "CHASEDB1"}}, "data is .* expected descriptions by part"),
        ({"notes": "one text"}, "notes is 'one text', expected texts"),
        ({"scores": [scores([[0.5]], stage="later")]}, "stage is 'later', expected one of before"),
        ({"scores": [scores([[0.5]])] * 2}, "scores: 2 of CHASEDB1, none, after; expected one"),
        ({"scores": [scores([[0.5]], cases=[])]}, r"classes \[\], expected 1 to 1 for class 1"),
        ({"scores": [scores([[0.5]], class_names=("a", "b"))]}, r"classes \[1\], expected 1 to 2"),
        (
            {"scores": [scores([[0.5]], cases=scores([[0.5]]).cases * 2)]},
            "scores of CHASEDB1, none, after: case .* has class 1 twice",
        ),
    ],
)
def test_what_cannot_be_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_record(tmp_path, make(**changes))
    assert list(tmp_path.iterdir()) == []


def edit(file, change):
    content = json.loads(file.read_text("utf-8"))
    change(content)
    file.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("schema"), "no key 'schema' with the value 1: not a result of samjax"),
        (lambda c: c.update(schema=2), "no key 'schema' with the value 1"),
        (lambda c: c.pop("table"), "no key 'table'"),
        (lambda c: c.update(smoke="no"), "smoke is 'no', expected true or false"),
        (lambda c: c.update(environment=None), "environment is None"),
        (lambda c: c["scores"][1].pop("prompt"), "scores: no key 'prompt'"),
        (lambda c: c["scores"][0].update(cases="gone.csv"), "there is no file 'gone.csv' beside"),
        (lambda c: c["scores"][0].update(cases="../x.csv"), "there is no file '../x.csv' beside"),
        (
            lambda c: c["scores"][0].update(cases=c["scores"][1]["cases"]),
            r"before_\w+\.csv: classes \[1\], expected 1 to 2 for class 1, class 2",
        ),
    ],
)
def test_a_broken_result_is_named(tmp_path, change, message):
    file = write_record(tmp_path / "run", make())
    edit(file, change)
    with pytest.raises(ValueError, match=rf"run.result\.json: .*{message}"):
        read_records(tmp_path)


def test_files_that_are_no_results(tmp_path):
    file = write_record(tmp_path / "run", make())
    (cases, _) = sorted(file.parent.glob("*.csv"))
    text = cases.read_text("utf-8")
    cases.write_text(text.replace("0.1,", "0.2,"), "utf-8")
    with pytest.raises(ValueError, match="does not hold the scores that were written"):
        read_records(tmp_path)
    cases.write_text(text.replace("dice", ""), "utf-8")
    with pytest.raises(ValueError, match=r"result\.json: "):
        read_records(tmp_path)
    file.write_text("{", "utf-8")
    with pytest.raises(ValueError, match=r"result\.json: Expecting property name"):
        read_records(tmp_path)
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"result\.json: 'utf-8' codec"):
        read_records(tmp_path)
    file.write_text("[]", "utf-8")
    with pytest.raises(ValueError, match="not a result of samjax"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        read_records(tmp_path / "nowhere")


def test_a_run_must_not_come_twice(tmp_path):
    write_record(tmp_path / "a", make())
    write_record(tmp_path / "b", make())
    with pytest.raises(
        ValueError, match=r"b.result\.json: run 'vessel_r64_seed0' of sam2lora is in"
    ):
        read_records(tmp_path)


def test_the_hash_is_of_names_and_contents(tmp_path):
    for root in ("one", "two"):
        (tmp_path / root / "sub").mkdir(parents=True)
        (tmp_path / root / "a").write_bytes(b"12")
        (tmp_path / root / "sub" / "b").write_bytes(b"3")
    one, two = tmp_path / "one", tmp_path / "two"
    files = [one / "a", one / "sub" / "b"]
    digest = data_hash(files, one)
    assert len(digest) == 64
    assert digest == data_hash([*files[::-1], files[0]], one)
    assert digest == data_hash([two], two)  # all files below a folder
    assert digest != data_hash(files[:1], one)
    assert digest != data_hash(files, tmp_path)
    (two / "a").write_bytes(b"1")
    (two / "sub" / "b").write_bytes(b"23")
    assert digest != data_hash([two], two)
    with pytest.raises(ValueError, match="not in"):
        data_hash(files, two)


def no_label(case, size):
    return np.zeros(size, np.uint8)


def test_pictures_and_their_subsets_are_described_by_their_files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(name.encode())
        (tmp_path / f"{name}_label.png").write_bytes(b"l")
    files = [(tmp_path / f"{n}.png", tmp_path / f"{n}_label.png") for n in "abc"]
    cases = tuple(Case(i.stem, (i,), (m,), patient="pp1"[n]) for n, (i, m) in enumerate(files))
    pictures = Pictures(
        dataset="x",
        root=tmp_path,
        split="all",
        cases=cases,
        class_names=("c",),
        read_label=no_label,
    )
    everything = data_hash(tmp_path.iterdir(), tmp_path)
    expected = {"name": "X", "count": 3, "patients": 2, "sha256": everything}
    assert describe_data("X", pictures) == expected
    some = describe_data("X", Subset(Subset(pictures, (2, 1, 0)), (1, 2)))  # b and a
    assert (some["count"], some["patients"]) == (2, 1)
    assert some["sha256"] == data_hash([f for pair in files[:2] for f in pair], tmp_path)
    one = Subset(pictures, (0,))
    both = [describe_data("X", joined({"p": pictures, "q": part})) for part in (one, pictures)]
    assert [part["count"] for part in both] == [len(pictures) + 1, 2 * len(pictures)]
    assert both[0]["sha256"] != both[1]["sha256"]


def zeros(file):
    return Volume(np.zeros((4, 5, 6), np.float32), np.eye(4))


def test_slices_are_described_by_volumes_and_places(tmp_path):
    for name in ("a.mhd", "a.raw", "b.mhd", "b.raw"):
        (tmp_path / name).write_bytes(name.encode())
    cases = tuple(Case(n, (tmp_path / f"{n}.mhd",)) for n in "ab")
    scans = Scans(
        **{"dataset": "x", "root": tmp_path, "split": "all", "cases": cases},
        **{"class_names": ("c",), "read": zeros, "shape": lambda file: (4, 5, 6)},
    )
    whole = describe_data("X", scans)
    assert whole["sha256"] == data_hash(tmp_path.iterdir(), tmp_path)  # with the voxels of .raw
    slices = Slices(scans)
    found = describe_data("X", slices)
    assert (found["count"], found["patients"]) == (12, 2)
    few = [describe_data("X", few_shot(slices, 5, seed))["sha256"] for seed in (0, 0, 1)]
    assert few[0] == few[1]
    assert len({whole["sha256"], found["sha256"], *few}) == 4
    (tmp_path / "b.raw").write_bytes(b"another")
    assert describe_data("X", slices)["sha256"] != found["sha256"]
    first = describe_data("X", Subset(slices, range(3)))
    (tmp_path / "b.raw").write_bytes(b"once more")
    assert describe_data("X", Subset(slices, range(3))) == first  # all of a


def test_a_folder_and_unknown_data_sets(tmp_path):
    for name in ("images/a.png", "images/b.png", "masks/a.png", "masks/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 5), len(name) % 2, np.uint8)).save(tmp_path / name)
    folder = FolderDataset(tmp_path / "images", tmp_path / "masks")
    expected = {"name": "F", "count": 2, "patients": None}
    found = describe_data("F", folder)
    assert found == {**expected, "sha256": data_hash([tmp_path], tmp_path)}
    assert describe_data("F", Subset(folder, (1, 0))) == found

    examples = [folder[0], folder[1]]
    read = describe_data("F", examples)
    assert read == {**expected, "sha256": describe_data("F", examples[::-1])["sha256"]}
    assert read["sha256"] != found["sha256"]
    examples[1]["image"][0, 0, 0] += 1
    assert describe_data("F", examples)["sha256"] != read["sha256"]
