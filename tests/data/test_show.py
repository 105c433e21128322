"""The survey of a data set, and the command that draws it."""

import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from samjax.data import show
from samjax.data.datasets import msd
from samjax.data.slices import Slices
from samjax.data.subsets import Subset
from samjax.data.survey import survey


class Examples:
    """Given pictures; a mask of the value `label` in one corner, 0 for none."""

    class_names = ("lesion", "vein")
    num_classes = 2

    def __init__(self, pictures, labels, patients=None):
        self.pictures, self.labels = pictures, labels
        self.patients = patients or [str(i) for i in range(len(labels))]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.pictures[index]
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[:2, :3] = self.labels[index]
        return {"image": image, "mask": mask, "name": f"n{index}"}


@pytest.fixture
def pictures(rng):
    return list(rng.integers(0, 256, (12, 8, 10, 3), np.uint8))


def test_figures_are_counted(pictures):
    found = survey(Examples(pictures, [1, 2, 1] * 4), progress=False).as_json()
    assert found["examples"] == found["patients"] == 12
    assert found["sizes"] == {"10x8": 12}
    assert found["classes"]["lesion"] == {"examples": 8, "share_of_pixels": 8 * 6 / 960}
    assert found["classes"]["vein"] == {"examples": 4, "share_of_pixels": 4 * 6 / 960}
    assert found["suspicious"] == []


def test_what_looks_wrong_is_said(pictures):
    pictures[3] = pictures[0]
    pictures[5] = np.zeros((8, 10, 3), np.uint8)
    pictures[7] = pictures[7][:6]
    labels = [1] * 12
    labels[9] = 0
    found = survey(Examples(pictures, labels), progress=False).suspicious
    assert found == (
        "1 masks are empty: n9",
        "1 classes are in no example: vein (2)",
        "1 pictures with a label have pixels of one value only: n5",
        "the same picture 2 times: n0, n3",
        "1 have the size 10x6, nearly all 10x8: n7",
    )


def test_leaks_between_splits_by_pixels_and_by_patient(pictures):
    train = Examples(pictures[:6], [1, 2] * 3, list("abcdef"))
    test = Examples([pictures[4], *pictures[6:]], [1] * 7, list("xabyzuv"))
    found = survey(train, {"test": test}, progress=False).suspicious
    assert found == (
        "leak: 1 pictures are in the split 'test' too: n4 = n0",
        "leak: 2 patients are in the split 'test' too: a, b",
    )
    assert not survey(Subset(train, [2, 3]), {"test": test}, progress=False).suspicious


def write_volumes(root, flips, rng):
    for kind in ("imagesTr", "labelsTr"):
        (root / kind).mkdir(parents=True)
    for number, flip in enumerate(flips):
        affine = np.diag([-1.0 if flip else 1.0, 1.0, 3.0, 1.0])
        voxels = rng.integers(0, 100, (9, 8, 5)).astype(np.int16)
        label = np.zeros((9, 8, 5), np.uint8)
        label[2:5, 2:5, 1:4] = number != 2
        for kind, array in (("imagesTr", voxels), ("labelsTr", label)):
            nibabel.save(nibabel.Nifti1Image(array, affine), root / kind / f"case_{number}.nii.gz")


def test_volumes_in_another_orientation_and_without_foreground(tmp_path, rng):
    write_volumes(tmp_path, [False] * 11 + [True], rng)
    found = survey(Slices(msd(tmp_path, class_names=("organ",)), progress=False), progress=False)
    assert found.as_json()["orientations"] == {"RAS": 11, "LAS": 1}
    assert found.as_json()["spacings_mm"] == {"1 x 1 x 3": 12}
    assert found.suspicious == (
        "1 volumes have no foreground in any slice: case_2",
        "1 have the orientation LAS, nearly all RAS: case_11",
    )


def test_the_command_draws_a_sheet(tmp_path, rng, capsys):
    write_volumes(tmp_path / "set", [False, False], rng)
    out = tmp_path / "look"
    arguments = ["--dataset", "msd", "--source", str(tmp_path / "set"), "--take", "foreground"]
    arguments += ["--class-names", "organ", "--prompt", "box", "--cell", "64", "--out", str(out)]
    assert show.main([*arguments, "--examples", "3", "--no-progress"]) == 0
    printed = capsys.readouterr().out
    assert "6 examples of 2 patients" in printed
    assert "not compared with the split 'test'" in printed
    assert json.loads((out / "survey.json").read_text())["classes"]["organ"]["examples"] == 6
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.size == (4 * 70 + 6, 3 * 86 + 6)
        colours = np.array(sheet).reshape(-1, 3)
    assert (colours == (255, 255, 0)).all(1).any(), "the box"
    assert (colours == (0, 229, 255)).all(1).any(), "the outline"


def test_errors_are_one_line(tmp_path, capsys):
    arguments = ["--source", str(tmp_path), "--out", str(tmp_path / "look")]
    assert show.main(["--dataset", "nothing", *arguments]) == 1
    assert "expected one of" in capsys.readouterr().err
    assert show.main(["--dataset", "hrf", *arguments]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "manual1" in error, "the expected tree"
