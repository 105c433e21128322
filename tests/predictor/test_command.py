"""`python -m samjax.predictor`: what it writes, and what it refuses."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samjax.models.weights import save_weights
from samjax.predictor import SamModel, SamPredictor
from samjax.predictor.__main__ import main
from samjax.predictor.overlay import POINT_COLOURS, Drawing, draw_overlay

SIZE = (60, 200)  # of the fixture `image`


@pytest.fixture
def files(tmp_path: Path, model: SamModel, image: np.ndarray) -> list[str]:
    save_weights(tmp_path / "tiny.safetensors", model.config, model.params)
    Image.fromarray(image).save(tmp_path / "photo.png")
    return [
        *("--ckpt", str(tmp_path / "tiny.safetensors")),
        *("--image", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")),
    ]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_command_with_boxes(files: list[str], tmp_path: Path, predictor: SamPredictor):
    assert main([*files, "--box", "20,10,150,50", "--box", "100,5,190,30.5"]) == 0
    out = tmp_path / "out"
    written = json.loads((out / "masks.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        *("mask_000.png", "mask_001.png", "masks.json", "overlay.png"),
    ]
    assert written["size"] == list(SIZE)
    boxes = [[20, 10, 150, 50], [100, 5, 190, 30.5]]
    expected, iou, _ = predictor.predict(box=boxes, multimask_output=False)
    for i, record in enumerate(written["masks"]):
        stored = read(out / record["file"])
        assert set(np.unique(stored)) <= {0, 255}
        assert np.array_equal(stored == 255, expected[i, 0])
        assert record["prompt"] == {"box": boxes[i]}
        assert record["area"] == int(expected[i, 0].sum())
        assert record["iou_prediction"] == pytest.approx(float(iou[i, 0]), rel=1e-4)
        x0, y0, x1, y1 = record["box"]
        assert expected[i, 0, y0:y1, x0:x1].sum() == record["area"]
        assert expected[i, 0, y1 - 1].any()
        assert expected[i, 0, :, x1 - 1].any()
    assert read(out / "overlay.png").shape == (*SIZE, 3)


def test_command_with_points_and_several_masks(files: list[str], tmp_path: Path):
    points = ["--point", "150,30", "--label", "1", "--point", "20,50", "--label", "0"]
    assert main([*files, *points, "--multimask", "--dtype", "bfloat16"]) == 0
    masks = json.loads((tmp_path / "out" / "masks.json").read_text())["masks"]
    assert [record["file"] for record in masks] == [f"mask_000_{i}.png" for i in range(5)]
    assert masks[0]["prompt"] == {"points": [[150, 30], [20, 50]], "labels": [1, 0]}
    best = max(masks, key=lambda record: record["iou_prediction"])
    assert [record["on_overlay"] for record in masks] == [record is best for record in masks]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "no prompt: give --box x0,y0,x1,y1 or --point x,y"),
        (["--box", "1,2,3"], "--box 1,2,3: expected x0,y0,x1,y1 in pixels"),
        (["--box", "1,2,3,four"], "--box 1,2,3,four: expected"),
        (["--point", "3,4", "--label", "1", "--label", "0"], "1 --point but 2 --label"),
        (["--point", "3,4", "--label", "7"], "--label 7: expected 1"),
        (["--point", "3,4", "--box", "1,1,9,9", "--box", "2,2,9,9"], "which box"),
        (["--box", "20,10,500,50"], "box: [20, 10, 500, 50] does not lie within the image"),
        (["--point", "500,4"], "point 0 at (x, y) = (500, 4) lies outside"),
        (["--box", "1,1,9,9", "--image", "missing.png"], "missing.png: not a readable image"),
        (["--box", "1,1,9,9", "--ckpt", "missing.safetensors"], "missing.safetensors: no such"),
        (["--box", "1,1,9,9", "--ckpt", "missing.pth"], "missing.pth: no such file"),
    ],
)
def test_command_refuses(
    files: list[str], tmp_path: Path, capsys, options: list[str], complaint: str
):
    assert main([*files, *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("samjax.predictor: error: ")
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_command_passes_the_converter_s_error_on(files: list[str], tmp_path: Path, capsys):
    pytest.importorskip("torch")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"weights": Path("x")}))
    assert main([*files, "--box", "1,1,9,9", "--ckpt", str(tmp_path / "evil.pth")]) == 1
    assert "evil.pth" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_reads_odd_images(files: list[str], tmp_path: Path, image: np.ndarray, capsys):
    def run(name: str, picture: Image.Image, **options) -> int:
        picture.save(tmp_path / name, **options)
        return main([*files, "--box", "1,1,40,40", "--image", str(tmp_path / name)])

    turned = Image.Exif()
    turned[0x0112] = 6  # shown turned by a quarter
    assert run("turned.jpg", Image.fromarray(image), exif=turned) == 0
    assert json.loads((tmp_path / "out" / "masks.json").read_text())["size"] == [200, 60]
    assert run("grey.png", Image.fromarray(image).convert("L")) == 0
    assert run("opaque.png", Image.fromarray(image).convert("RGBA")) == 0
    see_through = Image.fromarray(image).convert("RGBA")
    see_through.putpixel((3, 3), (0, 0, 0, 100))
    assert run("see_through.png", see_through) == 1
    assert "transparent" in capsys.readouterr().err
    assert run("deep.png", Image.fromarray(np.ones(SIZE, np.uint16))) == 1
    assert "expected 8-bit" in capsys.readouterr().err


def test_overlay_marks_masks_and_prompts():
    image = np.full((100, 200, 3), 90, np.uint8)
    mask = np.zeros((100, 200), bool)
    mask[20:60, 120:180] = True
    picture = draw_overlay(image, [Drawing(mask, [(150, 40, 1), (30, 80, 0)], (110, 10, 190, 70))])
    assert tuple(picture[40, 150]) == POINT_COLOURS[1]
    assert tuple(picture[80, 30]) == POINT_COLOURS[0]
    assert tuple(picture[0, 0]) == (90, 90, 90)
    assert tuple(picture[30, 120]) == (0, 229, 255)  # the outline
    assert tuple(picture[30, 130]) not in ((90, 90, 90), (0, 229, 255))  # the tint
    assert (picture[10, 110:191] != 90).any(axis=-1).all()  # the box
