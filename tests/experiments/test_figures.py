import errno
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from PIL import Image

from experiments import figures
from experiments.figures import Case, curve, overlay_sheet
from samjax.drawing import COLOURS, overlay


def _case(rng, name="eye", size=(40, 64), **changes):
    mask = np.zeros(size, np.uint8)
    mask[10:30, 20:44] = 1
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    return Case(name, image, mask, np.roll(mask, 3, axis=1), 0.875)._replace(**changes)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look at their texts and boxes."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1]
    )
    return saved


def _captions(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_an_overlay_tints_and_outlines_regions_only(rng):
    image = np.full((20, 30, 3), 100, np.uint8)
    mask = np.zeros((20, 30), np.int32)
    mask[4:14, 5:20], mask[8:12, 22:28] = 1, 2
    result = overlay(image, mask, fill=0.5)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result[mask == 0], 100)
    np.testing.assert_array_equal(result[4, 5:20], np.tile(COLOURS[0], (15, 1)))
    np.testing.assert_array_equal(result[8, 22], COLOURS[1])
    np.testing.assert_allclose(result[9, 12], (100 + np.array(COLOURS[0])) / 2, atol=1)
    assert (image == 100).all()


def test_an_overlay_takes_grey_images_bool_masks_and_many_classes():
    grey = np.full((6, 8), 7, np.uint8)
    np.testing.assert_array_equal(overlay(grey, np.zeros((6, 8), bool)), np.full((6, 8, 3), 7))
    many = np.full((6, 8), len(COLOURS) + 1)
    np.testing.assert_array_equal(overlay(grey, many, fill=1.0)[0, 0], COLOURS[0])


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (np.zeros((4, 5, 3)), np.zeros((4, 5), int), "image is float64"),
        (np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5), int), r"\(4, 5, 4\)"),
        (np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4), int), r"mask has shape \(5, 4\)"),
        (np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5)), "mask is float64"),
    ],
)
def test_an_overlay_refuses_what_it_cannot_draw(image, mask, message):
    with pytest.raises(ValueError, match=message):
        overlay(image, mask)


def test_a_sheet_has_three_pictures_a_case(rng, tmp_path, drawn):
    path = tmp_path / "sheet.png"
    case = _case(rng)
    overlay_sheet(path, [tuple(case[:5]), case._replace(name="b", dice=float("nan"))], title="Two")
    assert _captions(drawn[0]) == [
        "Two",
        *("eye", "truth", "prediction: Dice 0.875"),
        *("b", "truth", "prediction: Dice undefined"),
    ]
    with Image.open(path) as file:
        assert file.format == "PNG"
        assert np.asarray(file.convert("RGB")).std() > 20
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_a_sheet_shows_the_prediction_before_where_there_is_one(rng, tmp_path, drawn):
    case = _case(rng)
    cases = [case._replace(before=case.truth * 0, before_dice=0.0), case]
    overlay_sheet(tmp_path / "sheet.png", cases)
    assert _captions(drawn[0]) == [
        *("eye", "truth", "before: Dice 0.000", "after: Dice 0.875"),
        *("eye", "truth", "before: none", "after: Dice 0.875"),
    ]


def test_dice_of_several_classes(rng, tmp_path, drawn):
    few, many = _case(rng, dice=[0.5, math.nan]), _case(rng, dice=[0.5, 1.0, 0.75, math.nan])
    overlay_sheet(tmp_path / "sheet.png", [few, many], class_names=["disc", "cup"])
    captions = _captions(drawn[0])
    assert captions[2] == "prediction: Dice 0.500 / undefined"
    assert captions[5] == "prediction: mean Dice 0.750 (3 of 4)"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["disc", "cup"]


@pytest.mark.parametrize(
    ("count", "size"), [(1, (64, 40)), (4, (40, 64)), (9, (600, 900)), (27, (40, 64))]
)
def test_nothing_overlaps(rng, tmp_path, drawn, count, size):
    name = "a_name_of_a_file_that_is_far_longer_than_any_picture_is_wide.png"
    case = _case(rng, name=name, size=size, dice=[0.123, 0.456, 0.789])
    case = case._replace(before=case.truth, before_dice=[0.123, math.nan, math.nan])
    overlay_sheet(
        tmp_path / "sheet.png", [case] * count, title="A title", class_names=["a", "b", "c"]
    )
    figure = drawn[0]
    renderer = RendererAgg(*figure.bbox.size, figure.dpi)
    artists = [*figure.axes[0].images, *figure.axes[0].texts, figure.legends[0]]
    assert len(artists) == 2 * 4 * count + 2
    boxes = [artist.get_window_extent(renderer) for artist in artists]
    edges = np.array([box.extents for box in boxes])  # x0 y0 x1 y1
    assert (edges[:, :2] >= -0.5).all()
    assert (edges[:, 2:] <= np.array(figure.bbox.max) + 0.5).all()
    low = np.maximum(edges[:, None, :2], edges[None, :, :2])
    high = np.minimum(edges[:, None, 2:], edges[None, :, 2:])
    overlap = ((high - low) > 1).all(-1)
    np.fill_diagonal(overlap, False)
    assert not overlap.any()


def test_names_are_no_formulas(rng, tmp_path, drawn):
    overlay_sheet(tmp_path / "sheet.png", [_case(rng, name=r"$\frac{$ a_b")])
    assert _captions(drawn[0])[0] == r"$\frac{$ a_b"


def test_a_sheet_names_the_case_that_does_not_fit(rng, tmp_path):
    good, bad = _case(rng), _case(rng, name="bad.png", truth=np.zeros((3, 3), int))
    with pytest.raises(ValueError, match=r"bad\.png: truth has shape \(3, 3\), the image \(40, 64"):
        overlay_sheet(tmp_path / "sheet.png", [good, bad])
    with pytest.raises(ValueError, match=r"bad\.png: image is float64"):
        overlay_sheet(tmp_path / "sheet.png", [good, bad._replace(image=np.zeros((4, 4, 3)))])
    with pytest.raises(ValueError, match="no case"):
        overlay_sheet(tmp_path / "sheet.png", [])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(rng, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "sheet.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(figures.Figure, "savefig", full)
    with pytest.raises(OSError, match="nothing was written"):
        overlay_sheet(path, [_case(rng)])
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["sheet.png"]


def test_a_curve_shows_loss_and_dice(tmp_path, drawn):
    history = [{"step": s, "loss": 1 / s} for s in range(1, 101)]
    history += [{"step": s, "val_dice": s / 100} for s in (20, 60, 40)]
    curve(tmp_path / "curve.png", history, title="A run")
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["training loss (smoothed)", "validation Dice (best 0.600 at step 60)"]
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["training loss", "validation Dice"]
    with Image.open(tmp_path / "curve.png") as file:
        assert file.format == "PNG"


def test_a_curve_of_one_kind_or_under_other_names(tmp_path, drawn):
    curve(tmp_path / "a.png", [{"step": 1, "loss": 0.5}])
    curve(tmp_path / "b.png", [{"step": 1, "val/dice": math.nan}], dice="val/dice")
    assert [len(figure.axes) for figure in drawn] == [1, 1]


def test_a_curve_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither 'loss' nor 'val_dice'"):
        curve(tmp_path / "a.png", [{"step": 1, "rate": 1e-3}])
    with pytest.raises(ValueError, match='without "step"'):
        curve(tmp_path / "a.png", [{"loss": 1.0}])
    assert list(tmp_path.iterdir()) == []
