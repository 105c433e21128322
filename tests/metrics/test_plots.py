import math

import numpy as np
import pytest
from PIL import Image

from samjax.metrics import CaseScore, plot_cases
from samjax.metrics.plots import axis_label


def scores(rng, cases=9):
    return [
        CaseScore(
            f"c{i}", None, label, "both", {"dice": rng.random(), "hd95": math.nan, "assd": 3 * i}
        )
        for i in range(cases)
        for label in (1, 2, 3)
    ]


def test_a_png_with_a_panel_per_metric(tmp_path, rng):
    table = scores(rng)
    plot_cases(tmp_path / "all.png", table, class_names=("liver", "spleen", "aorta"), title="T")
    plot_cases(tmp_path / "one.png", table, ["dice"])
    sizes = []
    for name in ("all.png", "one.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert len(np.unique(np.asarray(picture))) > 50
            sizes.append(picture.size)
    assert sizes[0][1] > 2 * sizes[1][1]
    plot_cases(tmp_path / "again.png", table, ["dice"])
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_a_single_case(tmp_path, rng):
    plot_cases(tmp_path / "one.png", scores(rng, cases=1))
    assert (tmp_path / "one.png").stat().st_size > 0


def test_the_names_of_the_axes():
    assert axis_label("dice") == "Dice"
    assert axis_label("sensitivity") == "sensitivity"
    assert axis_label("hd95_pooled") == "HD95, pooled (mm)"
    assert axis_label("assd", "voxels") == "ASSD (voxels)"


def test_bad_arguments(tmp_path, rng):
    table = scores(rng)
    with pytest.raises(ValueError, match="have no iou, but dice, hd95, assd"):
        plot_cases(tmp_path / "x.png", table, ["iou"])
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        plot_cases(tmp_path / "x.png", table, class_names=("a", "b"))
    assert list(tmp_path.iterdir()) == []
