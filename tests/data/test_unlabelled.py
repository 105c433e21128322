"""Unlabelled slices: kept once, found again, drawn as views that the seed alone decides."""

import os
import pickle
from itertools import islice

import numpy as np
import pytest

from data_sets import cut
from samjax.data import unlabelled
from samjax.data.images import DataError
from samjax.data.unlabelled import (
    NOISE,
    Pool,
    kept_slices,
    make_views,
    noisy,
    of_mae,
    of_samora,
    of_simclr,
    plain,
    squared,
)

SIDE = 12


class Drawn:
    """Grey pictures of several sizes, and how often each is read."""

    def __init__(self, count=5, names=True):
        self.read = [0] * count
        if names:
            self.names = tuple(f"slice_{i}" for i in range(count))

    def __len__(self):
        return len(self.read)

    def __getitem__(self, index, /):
        self.read[index] += 1
        rng = np.random.default_rng(index)
        grey = rng.integers(40, 90, (20 + index, 31, 1), dtype=np.uint8)
        image = np.repeat(grey, 3, axis=-1)
        return {"image": image, "mask": np.zeros(grey.shape[:2], np.uint8), "name": f"{index}"}


def slices(count, side=SIDE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, side, side), dtype=np.uint8)


def test_a_pool_is_its_arrays_one_after_another():
    arrays = [slices(3, seed=1), slices(0), slices(1, seed=2), slices(4, seed=3)]
    pool = Pool(arrays)
    assert len(pool) == 8
    np.testing.assert_array_equal(np.stack([pool[i] for i in range(8)]), np.concatenate(arrays))
    np.testing.assert_array_equal(np.stack(list(pool)), np.concatenate(arrays))
    for index in (-1, 8):
        with pytest.raises(IndexError, match=f"slice {index} of 8"):
            pool[index]


@pytest.mark.parametrize("arrays", [[], [slices(0)], [slices(0), slices(0)]])
def test_an_empty_pool_is_refused(arrays):
    with pytest.raises(ValueError, match="no unlabelled slice"):
        Pool(arrays)


def test_a_pool_sends_files_by_name(tmp_path):
    """A worker process gets where the pixels lie, not a copy of them."""
    first, second = slices(400), slices(2, seed=1)
    np.save(tmp_path / "kept.npy", first)
    mapped = np.load(tmp_path / "kept.npy", mmap_mode="r")
    sent = pickle.dumps(Pool([mapped, second]))
    assert len(sent) < 2000 < first.nbytes
    arrived = pickle.loads(sent)
    assert isinstance(arrived.arrays[0], np.memmap)
    np.testing.assert_array_equal(np.stack(list(arrived)), np.concatenate([first, second]))
    # A part of a file is not its file.
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(Pool([mapped[3:]])))[0], first[3])


def grey_image(grey):
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, axis=-1)


def test_squared_stretches_grey_values_and_sides():
    ramp = grey_image(np.tile(np.arange(60, 146), (86, 1)))
    found = squared(ramp, 86)
    assert (found.dtype, found.shape) == (np.uint8, (86, 86))
    np.testing.assert_array_equal(found, np.tile(3 * np.arange(86), (86, 1)))
    wide = grey_image(np.repeat([[10, 20], [30, 40]], 30, axis=1))
    small = squared(wide, 20)
    assert small.shape == (20, 20)
    # The four corners keep to their places, and 10..40 becomes 0..255.
    corners = small[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_allclose(corners, [0, 85, 170, 255], atol=25)
    assert squared(grey_image(np.full((4, 7), 9)), 5).tolist() == [[0] * 5] * 5
    one_hot = np.zeros((3, 3))
    one_hot[1, 2] = 1
    assert squared(grey_image(one_hot), 3).max() == 255


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5), np.uint8),
        np.zeros((0, 5, 3), np.uint8),
    ],
)
def test_squared_wants_a_picture(image):
    with pytest.raises(DataError, match=r"an image of \w+ \([\d, ]+\), expected uint8 \(h, w, 3\)"):
        squared(image, 4)


def test_slices_are_read_once_and_then_from_the_disk(tmp_path):
    dataset = Drawn()
    first = kept_slices(dataset, SIDE, tmp_path / "store", "amos")
    assert dataset.read == [1] * 5
    assert (first.dtype, first.shape) == (np.uint8, (5, SIDE, SIDE))
    for index in range(5):
        np.testing.assert_array_equal(first[index], squared(dataset[index]["image"], SIDE))
    again = kept_slices(other := Drawn(), SIDE, tmp_path / "store", "amos")
    assert other.read == [0] * 5
    np.testing.assert_array_equal(again, first)
    assert isinstance(again, np.memmap)
    assert not again.flags.writeable
    # Another side, name, number or list of names is another file.
    (tmp_path / "others").mkdir()
    kept_slices(Drawn(), SIDE + 1, tmp_path / "others", "amos")
    kept_slices(Drawn(), SIDE, tmp_path / "others", "kits")
    kept_slices(Drawn(4), SIDE, tmp_path / "others", "amos")
    kept_slices(Drawn(names=False), SIDE, tmp_path / "others", "amos")
    (kept,) = (tmp_path / "store").iterdir()
    others = {path.name for path in (tmp_path / "others").iterdir()}
    assert len(others) == 4
    assert kept.name not in others


def test_nothing_is_kept_of_what_cannot_be_read(tmp_path, monkeypatch):
    def broken(self, index, /):
        raise DataError(f"slice {index}: cut off")

    monkeypatch.setattr(Drawn, "__getitem__", broken)
    with pytest.raises(DataError, match="cut off"):
        kept_slices(Drawn(), SIDE, tmp_path / "store", "amos")
    assert not list((tmp_path / "store").iterdir())


def test_a_damaged_file_is_named(tmp_path):
    kept_slices(Drawn(), SIDE, tmp_path, "amos")
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    cut(file)
    with pytest.raises(ValueError, match=f"{file}: damaged; delete it"):
        kept_slices(Drawn(), SIDE, tmp_path, "amos")
    for wrong in (b"", content[:70], b"\x00" * 400):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"{file}: damaged; delete it"):
            kept_slices(Drawn(), SIDE, tmp_path, "amos")


@pytest.mark.parametrize("array", [slices(4), slices(5, SIDE + 1), slices(5).astype(np.float32)])
def test_a_file_of_another_form_is_named(tmp_path, array):
    kept_slices(Drawn(), SIDE, tmp_path, "amos")
    (file,) = tmp_path.iterdir()
    np.save(file, array)
    expected = rf"{file}: .*, expected uint8 \(5, {SIDE}, {SIDE}\); delete it"
    with pytest.raises(ValueError, match=expected):
        kept_slices(Drawn(), SIDE, tmp_path, "amos")


def test_noise_has_the_published_deviation(rng):
    """Of mid grey nothing is cut off: 0.08, and less where it was blurred, half the times."""
    grey = np.full((96, 96), 128, np.uint8)
    deviations = []
    for _ in range(200):
        drawn = noisy(grey, rng)
        assert drawn.keys() == {"image", "noisy"}
        np.testing.assert_array_equal(drawn["image"], grey_image(grey))
        assert (drawn["noisy"].dtype, drawn["noisy"].shape) == (np.uint8, (96, 96, 3))
        assert (drawn["noisy"] == drawn["noisy"][..., :1]).all()
        values = drawn["noisy"][..., 0] / 255
        assert abs(values.mean() - 128 / 255) < 0.005
        deviations.append(values.std())
    deviations = np.array(deviations)
    sharp = deviations > 0.9 * NOISE
    np.testing.assert_allclose(deviations[sharp], NOISE, rtol=0.05)
    np.testing.assert_allclose(deviations[sharp].mean(), NOISE, rtol=0.01)
    assert 70 <= sharp.sum() <= 130, "a fair coin of 200 throws, 4 deviations either way"
    # 3 or 5 taps, sigma 0.6 to 1.4: the root of the sum of the squared weights.
    assert deviations[~sharp].max() < 0.55 * NOISE
    assert deviations[~sharp].min() > 0.19 * NOISE


def test_noise_is_cut_off_at_black_and_white(rng):
    for level, side in ((0, 1), (255, -1)):
        found = [noisy(np.full((64, 64), level, np.uint8), rng)["noisy"] for _ in range(20)]
        sharp = max(found, key=np.std).astype(np.float64)
        inside = side * (sharp - level) / 255
        assert inside.min() == 0
        assert (inside == 0).mean() == pytest.approx(0.5, abs=0.03)
        # The mean of the upper half of a normal distribution.
        assert inside.mean() == pytest.approx(NOISE / (2 * np.pi) ** 0.5, rel=0.05)


DRAWS = [plain, noisy, of_samora, of_simclr, of_mae]


@pytest.mark.parametrize("draw", DRAWS)
def test_a_view_comes_from_the_generator_alone(draw):
    grey = slices(1, 32)[0]
    kept = grey.copy()
    first, again = (draw(grey, np.random.default_rng(3)) for _ in range(2))
    other = draw(grey, np.random.default_rng(4))
    np.testing.assert_array_equal(grey, kept)
    assert first.keys() == other.keys()
    for name, picture in first.items():
        assert (picture.dtype, picture.shape) == (np.uint8, (32, 32, 3))
        np.testing.assert_array_equal(picture, again[name])
    if draw is not plain:
        assert any((first[name] != other[name]).any() for name in first)
    if "view1" in first:
        assert (first["view1"] != first["view2"]).any()
    assert pickle.loads(pickle.dumps(draw)) is draw


def test_crops_of_masked_autoencoders(rng, monkeypatch):
    """20 to 100 % of the area, sides of 3/4 to 4/3, half of them mirrored."""
    boxes = []
    original = unlabelled.resized_crop

    def recorded(picture, box, size, method):
        boxes.append(box)
        return original(picture, box, size, method)

    monkeypatch.setattr(unlabelled, "resized_crop", recorded)
    side = 64
    ramp = np.tile(np.arange(side, dtype=np.uint8), (side, 1))
    mirrored = 0
    for _ in range(400):
        row = of_mae(ramp, rng)["image"][side // 2, :, 0].astype(int)
        mirrored += row[0] > row[-1]
    left, top, right, bottom = np.array(boxes).T
    w, h = right - left, bottom - top
    assert min(left.min(), top.min(), w.min(), h.min()) >= 0
    assert max(right.max(), bottom.max()) <= side
    area, ratio = w * h / side**2, w / h
    assert area.min() > 0.19
    assert area.max() > 0.85
    assert area.min() < 0.25
    assert 0.72 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.39
    assert 150 <= mirrored <= 250, "a fair coin of 400 throws, 5 deviations either way"


def batches(count, draw=noisy, **options):
    pool = Pool([slices(3, seed=1), slices(4, seed=2)])
    given = {"batch_size": 4, "seed": 5, **options}
    return list(islice(make_views(pool, draw, **given), count))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_batches_are_views_of_the_slices_that_they_name():
    pool = Pool([slices(3, seed=1), slices(4, seed=2)])
    found = batches(7, plain)
    for batch in found:
        assert batch["index"].dtype == np.int32
        assert batch["image"].shape == (4, SIDE, SIDE, 3)
        for index, image in zip(batch["index"], batch["image"], strict=True):
            np.testing.assert_array_equal(image, grey_image(pool[index]))
    # 28 places are four epochs of 7, each in an order of its own, over the ends of batches.
    order = np.concatenate([batch["index"] for batch in found]).reshape(4, 7)
    assert [sorted(epoch) for epoch in order.tolist()] == [list(range(7))] * 4
    assert len({tuple(epoch) for epoch in order.tolist()}) > 1
    loader = make_views(pool, plain, batch_size=2)
    assert (loader.num_examples, loader.num_batches) == (7, None)


def test_views_are_drawn_anew_each_time_and_by_the_seed():
    found = batches(8)
    seen = {}
    for batch in found:
        for index, view in zip(batch["index"].tolist(), batch["noisy"], strict=True):
            assert all((view != other).any() for other in seen.setdefault(index, []))
            seen[index].append(view)
    assert max(len(views) for views in seen.values()) >= 4
    assert_same(batches(8), found)
    assert any((a["index"] != b["index"]).any() for a, b in zip(found, batches(8, seed=6)))  # noqa: B905


@pytest.mark.parametrize("start", [1, 5])
def test_a_stream_goes_on_where_it_was(start):
    assert_same(batches(3, of_simclr, start_step=start), batches(start + 3, of_simclr)[start:])


def test_hosts_share_out_each_batch():
    whole = batches(5)
    hosts = [batches(5, process_index=index, process_count=2) for index in range(2)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]
    assert_same(joined, whole)
    later = batches(2, process_index=1, process_count=2, start_step=3)
    assert_same(later, hosts[1][3:])


@pytest.mark.slow
def test_workers_make_the_same_batches(tmp_path):
    pool = Pool([kept_slices(Drawn(), SIDE, tmp_path, "amos"), slices(2)])
    streams = [make_views(pool, of_samora, batch_size=2, workers=workers) for workers in (0, 2)]
    assert_same(*(list(islice(stream, 4)) for stream in streams))


@pytest.mark.parametrize(("size", "hosts"), [(0, 1), (-2, 1), (3, 2)])
def test_a_batch_that_hosts_cannot_share_is_refused(size, hosts):
    with pytest.raises(ValueError, match=f"batch_size {size}: expected a positive multiple of the"):
        make_views(Pool([slices(2)]), plain, batch_size=size, process_count=hosts)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "store").write_text("a file")
    with pytest.raises(OSError, match="store"):
        kept_slices(Drawn(), SIDE, tmp_path / "store", "amos")
    assert os.listdir(tmp_path) == ["store"]
