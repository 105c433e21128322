"""Slices of volumes and grey values, against numpy, scikit-image and the volumes themselves."""

import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from samjax.data import Slices
from samjax.data.datasets.base import Case, Scans
from samjax.data.images import DataError
from samjax.data.intensity import Brats2023, MinMax, Percentiles, Window
from samjax.data.volumes import frames_to_voxels

nib = pytest.importorskip("nibabel")

SHAPE = (7, 9, 12)
NAMES = ("a", "b", "c", "d")
FOREGROUND = (2, 3, 5, 6, 7, 9)  # slices along axis 2 of the first case
SIZES = (1, 4, 2, 9, 3, 9)  # and their voxels of foreground


@pytest.fixture
def scans(tmp_path, rng) -> Scans:
    """Two cases of four modalities; the second case has no foreground."""
    cases = []
    for case in ("one", "two"):
        label = np.zeros(SHAPE, np.uint8)
        if case == "one":
            for k, size in zip(FOREGROUND, SIZES, strict=True):
                label[1:4, 2:5, k][np.unravel_index(range(size), (3, 3))] = 1 + k % 2
        files = {name: rng.integers(0, 200, SHAPE).astype(np.int16) for name in NAMES}
        for name, array in {**files, "label": label}.items():
            image = nib.Nifti1Image(array, np.diag([1.0, 1.0, 1.0, 1.0]))
            nib.save(image, tmp_path / f"{case}_{name}.nii.gz")
        images = tuple(tmp_path / f"{case}_{name}.nii.gz" for name in NAMES)
        cases.append(Case(case, images, (tmp_path / f"{case}_label.nii.gz",), patient=case[0]))
    return Scans(
        dataset="made up",
        root=tmp_path,
        split="all",
        cases=tuple(cases),
        class_names=("odd", "even"),
        modalities=NAMES,
        intensity=Window(0, 255),  # grey values are the voxels
    )


def stored(scans: Scans, case: int, modality: int = 0) -> np.ndarray:
    return np.asarray(nib.load(scans.cases[case].images[modality]).dataobj)


def label_of(scans: Scans, case: int) -> np.ndarray:
    return np.asarray(nib.load(scans.cases[case].labels[0]).dataobj)


def numbers(slices: Slices, case: int) -> list[int]:
    return [place.slice for place in slices.places if place.case == case]


@pytest.mark.parametrize(
    ("options", "first", "second"),
    [
        ({"take": "all"}, [*range(12)], [*range(12)]),
        ({"take": "all", "every": 5}, [0, 5, 10], [0, 5, 10]),
        ({"take": "foreground"}, [*FOREGROUND], []),
        ({"take": "foreground", "every": 2}, [2, 5, 7], []),
        ({"take": "largest"}, [6], []),
        ({"take": "middle"}, [6], [6]),
        ({"take": "random", "count": 99}, [*FOREGROUND], [*range(12)]),
    ],
)
def test_take(scans, options, first, second):
    slices = Slices(scans, modality="a", **options)
    assert numbers(slices, 0) == first
    assert numbers(slices, 1) == second
    assert len(slices) == len(slices.names) == len(slices.patients) == len(first + second)


def test_random_slices_are_nested_and_repeat(scans):
    drawn = [
        [
            numbers(Slices(scans, take="random", count=n, modality="a", seed=3), case)
            for n in range(1, 7)
        ]
        for case in (0, 1)
    ]
    for of_case in drawn:
        assert [len(chosen) for chosen in of_case] == [1, 2, 3, 4, 5, 6]
        assert all(set(few) < set(more) for few, more in pairwise(of_case))
    again = Slices(scans, take="random", count=3, modality="a", seed=3)
    assert [numbers(again, case) for case in (0, 1)] == [of_case[2] for of_case in drawn]
    others = [Slices(scans, take="random", count=3, modality="a", seed=s).places for s in range(5)]
    assert len(set(others)) > 1


def test_modalities(scans):
    each, one = Slices(scans), Slices(scans, modality="c")
    assert (len(each), len(one)) == (2 * 12 * 4, 2 * 12)
    assert each.names[:5] == tuple(f"one_slice00{n}" for n in ("0_a", "0_b", "0_c", "0_d", "1_a"))
    assert each.patients == ("o",) * 48 + ("t",) * 48
    np.testing.assert_array_equal(each[6]["image"], one[1]["image"])
    np.testing.assert_array_equal(one[1]["image"][..., 0], stored(scans, 0, 2)[:, :, 1].T)
    colours = Slices(scans, modality="c,a,d")
    assert (len(colours), colours.names[13]) == (24, "two_slice001")
    picture = colours[13]["image"]
    for channel, modality in enumerate((2, 0, 3)):
        expected = stored(scans, 1, modality)[:, :, 1].T
        np.testing.assert_array_equal(picture[..., channel], expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("rows", ["first", "second"])
def test_places_put_slices_back(scans, axis, rows):
    slices = Slices(scans, modality="b", axis=axis, rows=rows)
    assert len(slices) == 2 * SHAPE[axis]
    for case in (0, 1):
        back = {"image": np.zeros(SHAPE, np.int16), "mask": np.zeros(SHAPE, np.uint8)}
        frames = {"image": [], "mask": []}
        for number, place in enumerate(slices.places):
            if place.case == case:
                example = slices[number]
                assert place.slice == len(frames["mask"])
                frames["image"].append(example["image"][..., 0])
                frames["mask"].append(example["mask"])
        for key, pictures in frames.items():
            stack = np.stack(pictures)
            stack = stack.swapaxes(1, 2) if rows == "first" else stack
            back[key] = frames_to_voxels(stack, axis)
        np.testing.assert_array_equal(back["image"], stored(scans, case, 1))
        np.testing.assert_array_equal(back["mask"], label_of(scans, case))


def test_no_axis_picks_the_thick_one(scans):
    for case in scans.cases:
        for file in (*case.images, *case.labels):
            image = nib.load(file)
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([1, 4.0, 1, 1])), file)
    for options in ({}, {"take": "foreground"}):
        slices = Slices(replace(scans, axis=None), modality="a", **options)
        filled = np.flatnonzero(label_of(scans, 0).any(axis=(0, 2))).tolist()
        assert numbers(slices, 0) == ([*range(9)] if not options else filled)
        expected = stored(scans, 0)[:, slices.places[0].slice].T
        np.testing.assert_array_equal(slices[0]["image"][..., 0], expected)


def test_crop(scans):
    slices = Slices(scans, modality="a", crop=((1, 6), (2, 4)), rows="first")
    np.testing.assert_array_equal(slices[4]["image"][..., 1], stored(scans, 0)[1:6, 2:4, 4])
    np.testing.assert_array_equal(slices[4]["mask"], label_of(scans, 0)[1:6, 2:4, 4])
    with pytest.raises(DataError, match=r"one: slices of \(7, 9\) voxels; crop"):
        Slices(scans, crop=((1, 8), (2, 4)))[0]


def test_pickled_slices_are_equal_and_bring_no_volumes(scans):
    slices = Slices(scans, modality="each")
    before = len(pickle.dumps(slices))
    example = slices[30]
    packed = pickle.dumps(slices)
    assert len(packed) == before
    copy = pickle.loads(packed)
    assert copy.places == slices.places
    again = copy[30]
    for key in ("image", "mask"):
        np.testing.assert_array_equal(again[key], example[key])
    assert again["name"] == example["name"] == "one_slice007_c"


def test_volumes_are_kept_and_forgotten(scans):
    slices = Slices(scans, modality="a", keep=1)
    first = slices[0]["image"]
    for file in scans.cases[0].images:
        file.unlink()
    np.testing.assert_array_equal(slices[0]["image"], first)
    slices[12]
    with pytest.raises(DataError, match=r"one_a\.nii\.gz: no such file"):
        slices[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"take": "some"}, "take 'some', rows 'second': expected one of all, foreground, largest"),
        ({"rows": "third"}, "rows 'third'"),
        ({"every": 0}, "every 0"),
        ({"count": 0}, "count 0"),
        ({"keep": 0}, "keep 0"),
        ({"axis": 3}, "axis 3"),
        ({"modality": "e"}, "modality 'e': expected each, one of a, b, c, d, or three of them"),
        ({"modality": "a,b"}, "modality 'a,b': expected each"),
    ],
)
def test_wrong_arguments(scans, options, message):
    with pytest.raises(ValueError, match=message):
        Slices(scans, **options)


def test_nothing_left(scans):
    empty = replace(scans, cases=scans.cases[1:])
    with pytest.raises(DataError, match="no slice is left of 1 cases by 'foreground'"):
        Slices(empty, take="foreground")


def test_grey_values_that_cannot_be_made_name_the_file(scans):
    file = scans.cases[0].images[1]
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4)), file)
    with pytest.raises(DataError, match=r"one_b\.nii\.gz: no two different voxels beside 0"):
        Slices(scans, modality="b", intensity=Brats2023())[0]


def test_grey_values_are_scikit_images(rng):
    rescale_intensity = pytest.importorskip("skimage.exposure").rescale_intensity
    voxels = rng.normal(100, 80, (6, 7, 8))
    voxels[:3] = voxels.min()
    others = voxels[voxels != voxels.min()]
    expected = {
        Window(-125, 275): (-125, 275),
        MinMax(): (voxels.min(), voxels.max()),
        Percentiles(): tuple(np.percentile(others, (0.5, 99.5))),
        Percentiles(10, 60): tuple(np.percentile(others, (10, 60))),
    }
    for rule, limits in expected.items():
        grey = rule(voxels)
        assert grey.dtype == np.float32
        wanted = rescale_intensity(voxels, in_range=limits, out_range=(0, 1))
        assert np.abs(grey - wanted).max() <= 1e-6
        whole = np.rint(voxels).astype(np.int16)
        np.testing.assert_array_equal(rule(whole), rule(whole.astype(np.float64)))


def test_volumes_of_one_value_are_black():
    flat = np.full((2, 3, 4), 7, np.int16)
    for rule in (MinMax(), Percentiles()):
        np.testing.assert_array_equal(rule(flat), np.zeros(flat.shape, np.float32))


def test_wrong_windows():
    with pytest.raises(ValueError, match="window from 3 to 3: expected low < high"):
        Window(3, 3)
    for voxels in (np.zeros((2, 2, 2)), np.array([[[0, 5, 5]]])):
        with pytest.raises(DataError, match="no two different voxels beside 0"):
            Brats2023()(voxels)
