"""A data set by name: the reader's own options, slices of volumes, errors; against direct calls."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from samjax.data import Slices, Subset
from samjax.data.datasets import READERS
from samjax.data.datasets.base import Case, Pictures, Scans
from samjax.data.images import DataError, read_mask
from samjax.data.intensity import Intensity, Window
from samjax.data.opening import (
    SourceOptions,
    class_names_of,
    names_of,
    open_source,
    reader_options,
    settings_of,
)


def eyes(
    root: str | Path,
    split: str = "train",
    *,
    observer: Literal["first", "second"] = "first",
    labelled: bool = True,
    classes: Sequence[int] | None = None,
    intensity: Intensity | None = None,
    modality: str = "colour",
) -> Pictures:
    files = sorted(Path(root).glob("*.jpg"))
    return Pictures(
        dataset="eyes",
        root=Path(root),
        split=split,
        cases=tuple(Case(f.stem, (f,), (f.with_suffix(f".{observer}.png"),)) for f in files),
        class_names=("vessel",),
        read_label=lambda case, size: read_mask(case.labels[0]),
    )


def brains(root: str | Path, split: str = "train", *, center: str) -> Scans:
    files = sorted(Path(root).glob(f"{center}_*_image.nii.gz"))
    return Scans(
        dataset="brains",
        root=Path(root),
        split=split,
        cases=tuple(
            Case(f.name[:-13], (f,), (f.with_name(f.name.replace("image", "label")),))
            for f in files
        ),
        class_names=("tumour",),
    )


@pytest.fixture
def eyes_folder(tmp_path, rng, monkeypatch) -> Path:
    monkeypatch.setitem(READERS, "eyes", eyes)
    for name in ("a", "b", "c"):
        Image.fromarray(rng.integers(0, 256, (9, 14, 3), np.uint8)).save(tmp_path / f"{name}.jpg")
        for observer in ("first", "second"):
            mask = Image.fromarray(rng.integers(0, 2, (9, 14), np.uint8))
            mask.save(tmp_path / f"{name}.{observer}.png")
    return tmp_path


def test_a_reader_gets_its_options(eyes_folder):
    options = SourceOptions(dataset="eyes", source=eyes_folder, split="test")
    found = open_source(options, ["--observer", "second"])
    direct = eyes(eyes_folder, "test", observer="second")
    assert (found.split, found.names, found.cases) == ("test", ("a", "b", "c"), direct.cases)
    assert reader_options("eyes", ["--no-labelled", "--classes", "1", "3"]) == {
        "observer": "first",
        "labelled": False,
        "classes": [1, 3],
        "intensity": None,
        "modality": "colour",
    }
    # SourceOptions has a modality itself.
    assert reader_options("eyes", ["--reader-modality", "red"])["modality"] == "red"


def test_options_that_a_reader_does_not_have(eyes_folder, capsys):
    with pytest.raises(ValueError, match="--obs second: unknown; the options of eyes are") as error:
        reader_options("eyes", ["--obs", "second"])
    assert "\n  --observer first|second (default: first)\n" in str(error.value)
    assert "\n  --reader-modality (default: colour)" in str(error.value)
    with pytest.raises(SystemExit):
        reader_options("eyes", ["--observer", "third"])
    assert "'first'" in capsys.readouterr().err
    with pytest.raises(
        ValueError, match=r"^--take, --take-seed: for volumes only, and eyes has pi"
    ):
        open_source(SourceOptions(dataset="eyes", source=eyes_folder, take="random", take_seed=3))


def test_what_is_not_there(eyes_folder):
    with pytest.raises(ValueError, match=r"data set 'ears': expected one of .*chasedb1, .*eyes"):
        open_source(SourceOptions(dataset="ears", source=eyes_folder))
    with pytest.raises(DataError, match="nowhere: no such folder; expected the eyes set"):
        open_source(SourceOptions(dataset="eyes", source=eyes_folder / "nowhere"))
    (eyes_folder / "b.first.png").unlink()
    with pytest.raises(DataError, match=r"1 files of the eyes data set are missing:\n.*b.first"):
        open_source(SourceOptions(dataset="eyes", source=eyes_folder))


def test_bad_examples_are_left_out_and_listed(eyes_folder):
    (eyes_folder / "b.first.png").unlink()
    (eyes_folder / "a.jpg").write_bytes(b"no picture")
    log = eyes_folder / "bad.txt"
    found = open_source(SourceOptions(dataset="eyes", source=eyes_folder, skip_bad=log))
    assert isinstance(found, Subset)
    assert found.indices == (2,)
    assert (names_of(found), class_names_of(found)) == (("c",), ("vessel",))
    lines = log.read_text("utf-8").splitlines()
    assert [line.split("\t")[0] for line in lines] == ["0", "1"]
    assert "a.jpg: not a readable image" in lines[0]
    assert "b.first.png" in lines[1]
    nameless = Subset([{"name": "x"}], (0,))
    assert (names_of(nameless), class_names_of(nameless)) == (None, None)


def test_volumes_become_slices(tmp_path, rng, monkeypatch):
    nib = pytest.importorskip("nibabel")
    monkeypatch.setitem(READERS, "brains", brains)
    for name in ("ulm_1", "ulm_2"):
        label = np.zeros((6, 8, 5), np.uint8)
        label[2:4, 3, 1:4] = 1
        for kind, array in (
            ("image", rng.integers(0, 90, label.shape, np.uint8)),
            ("label", label),
        ):
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{name}_{kind}.nii.gz")
    options = SourceOptions(
        dataset="brains",
        source=tmp_path,
        take="foreground",
        every=2,
        rows="first",
        crop=((1, 5), (0, 8)),
        window=(10, 60),
    )
    found = open_source(options, ["--center", "ulm"])
    scans = brains(tmp_path, center="ulm")
    cut = partial(Slices, rows="first", crop=((1, 5), (0, 8)), intensity=Window(10, 60))
    expected = cut(scans, take="foreground", every=2)
    assert isinstance(found, Slices)
    assert len(found) == 4
    assert found.names == names_of(found) == expected.names
    for i in range(4):
        np.testing.assert_array_equal(found[i]["image"], expected[i]["image"])
        assert found[i]["image"].shape == (4, 8, 3)
    drawn = SourceOptions(dataset="brains", source=tmp_path, take="random", count=2, take_seed=4)
    expected = Slices(scans, take="random", count=2, seed=4)
    assert open_source(drawn, ["--center=ulm"]).names == expected.names
    with pytest.raises(SystemExit):  # it has no default
        reader_options("brains", [])


def test_settings_are_all_that_decides_about_the_examples(eyes_folder):
    options = SourceOptions(dataset="eyes", source=eyes_folder, split="test")
    settings = settings_of(options, ["--classes", "2"])
    assert json.loads(json.dumps(settings)) == settings
    assert settings["reader"]["classes"] == [2]
    assert {*settings["slices"], "dataset", "source", "split", "skip_bad"} == {
        *SourceOptions.__dataclass_fields__
    }


@pytest.mark.parametrize("name", READERS)
def test_every_reader_has_options_for_a_command_line(name):
    assert re.fullmatch("[a-z][a-z0-9_]*", name)  # what tfds allows
    json.dumps(reader_options(name, []), default=str)
