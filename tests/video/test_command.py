"""`python -m samjax.video` on a volume and on a clip."""

import numpy as np
import pytest
from PIL import Image

import tiny_models
from samjax.models.weights import save_weights
from samjax.video.__main__ import main

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "tiny.safetensors"
    save_weights(path, tiny_models.SAM2, tiny_models.noisy_params(tiny_models.SAM2))
    return path


@pytest.fixture
def scan(tmp_path, rng):
    """Anisotropic and oblique: 40 x 50 voxels in the plane, 6 thick slices."""
    nibabel = pytest.importorskip("nibabel")
    affine = np.array([[0.7, 0.1, 0, -9], [-0.1, 0.7, 0, 4], [0, 0, 3.0, 2], [0, 0, 0, 1]])
    path = tmp_path / "scan.nii.gz"
    array = rng.normal(100, 20, (40, 50, 6)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def test_volume(ckpt, scan, tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    out = tmp_path / "labels.nii.gz"
    options = ["--ckpt", ckpt, "--volume", scan, "--slice", 2, "--out", out]
    assert main([str(o) for o in [*options, "--box", "5,5,30,40", "--box", "20,20,38,48"]]) == 0
    written, source = nibabel.load(out), nibabel.load(scan)
    assert written.affine.tobytes() == source.affine.tobytes()
    assert written.shape == (40, 50, 6)
    assert set(np.unique(np.asarray(written.dataobj))) <= {0, 1, 2}
    assert "object 2: " in capsys.readouterr().out


def test_clip(ckpt, clip, tmp_path):
    folder, out = tmp_path / "clip", tmp_path / "masks"
    folder.mkdir()
    for i, frame in enumerate(clip[:3]):
        Image.fromarray(frame).save(folder / f"{i}.png")
    options = ["--ckpt", ckpt, "--clip", folder, "--slice", 1, "--out", out, "--point", "40,45"]
    assert main([str(o) for o in options]) == 0
    assert sorted(path.name for path in out.iterdir()) == [f"0000{i}.png" for i in range(3)]
    assert np.array(Image.open(out / "00001.png")).shape == (90, 160)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"--slice": 6}, "--slice 6: expected one of the 6 slices, 0 to 5"),
        ({"--box": "5,5,300,40"}, "does not lie within the image"),
        ({"--out": "labels.png"}, "ends in .nii or .nii.gz"),
        ({"--window": "40"}, "--window 40: expected level,width"),
        ({"--volume": "nowhere.nii"}, "nowhere.nii"),
        ({"--ckpt": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    ],
)
def test_errors(ckpt, scan, tmp_path, capsys, change, complaint):
    given = {"--ckpt": ckpt, "--volume": scan, "--slice": 2, "--out": tmp_path / "x.nii"}
    given = {**given, "--box": "5,5,30,40", **change}
    assert main([str(word) for pair in given.items() for word in pair]) == 1
    assert complaint in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii.gz"]


def test_four_dimensions(ckpt, tmp_path, capsys):
    nibabel = pytest.importorskip("nibabel")
    path = tmp_path / "film.nii"
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8, 3), np.float32), np.eye(4)), path)
    options = ["--ckpt", ckpt, "--volume", path, "--slice", 0, "--out", tmp_path / "x.nii"]
    assert main([str(o) for o in [*options, "--box", "1,1,5,5"]]) == 1
    said = capsys.readouterr().err
    assert "(8, 8, 8, 3)" in said
    assert str(path) in said
