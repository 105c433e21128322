"""The loader: what is in a batch, that nothing is lost, and that a seed says everything."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from samjax.data import (
    Augment,
    DataError,
    FolderDataset,
    Subset,
    make_loader,
    resize,
)
from samjax.data.paper_augment import PAPERS, Sam2LoraAugment
from samjax.data.throughput import Throughput, measure

FRAME = (40, 64)
SIZES = ((30, 50), (50, 30), (40, 64), (7, 90), (100, 20))


class Drawn:
    """Examples of different shapes whose red channel tells their number."""

    def __init__(self, count: int = len(SIZES)) -> None:
        self.count = count
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        self.reads.append(index)
        height, width = SIZES[index % len(SIZES)]
        image = np.full((height, width, 3), 100 + index, np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 2, width // 3 : width // 2] = 1 + index % 3
        return {"image": image, "mask": mask, "name": f"drawn {index}"}


def batches_of(dataset, count: int | None = None, **arguments) -> list[dict[str, np.ndarray]]:
    arguments = {"frame_size": FRAME, "batch_size": 2, **arguments}
    loader = make_loader(dataset, **arguments)
    found = list(itertools.islice(loader, count))
    if count is None:
        assert len(found) == loader.num_batches
    return found


def assert_same(first: list[dict], second: list[dict]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key, array in one.items():
            np.testing.assert_array_equal(array, other[key], err_msg=key)


def indices(batches: list[dict[str, np.ndarray]]) -> list[int]:
    return np.concatenate([batch["index"] for batch in batches]).tolist()


RANDOM = {
    "shuffle": True,
    "augment": Augment.preset("strong"),
    "prompt_modes": ("none", "points", "box"),
    "num_points": 2,
    "num_negatives": 1,
    "num_epochs": 3,
    "seed": 5,
}


def test_a_batch_has_the_documented_shapes_and_types():
    for batch in batches_of(Drawn(), **RANDOM):
        assert {key: (array.dtype.name, array.shape) for key, array in batch.items()} == {
            "image": ("uint8", (2, *FRAME, 3)),
            "mask": ("uint8", (2, *FRAME)),
            "size": ("int32", (2, 2)),
            "original_size": ("int32", (2, 2)),
            "coords": ("float32", (2, 4, 2)),
            "labels": ("int32", (2, 4)),
            "index": ("int32", (2,)),
            "valid": ("bool", (2,)),
        }


def test_evaluation_sees_every_example_once_in_order_and_fills_the_last_batch():
    dataset = Drawn()
    batches = batches_of(dataset)
    assert indices(batches) == [0, 1, 2, 3, 4, -1]
    assert [batch["valid"].tolist() for batch in batches] == [[True] * 2, [True] * 2, [True, False]]
    filler = batches[-1]
    assert not filler["image"][1].any()
    assert not filler["mask"][1].any()
    assert filler["size"][1].tolist() == list(FRAME)
    for row, index in enumerate(range(5)):
        batch, at = batches[row // 2], row % 2
        example = dataset[index]
        height, width = batch["size"][at]
        assert tuple(batch["original_size"][at]) == example["mask"].shape
        expected = resize(example["image"], (height, width))
        np.testing.assert_array_equal(batch["image"][at, :height, :width], expected)
        mask = resize(example["mask"], (height, width))
        np.testing.assert_array_equal(batch["mask"][at, :height, :width], mask)
        assert not batch["image"][at, height:].any()
        assert not batch["image"][at, :, width:].any()
        assert height == FRAME[0] or width == FRAME[1]


def test_a_small_set_and_a_large_batch():
    (batch,) = batches_of(Drawn(2), batch_size=5)
    assert batch["index"].tolist() == [0, 1, -1, -1, -1]


def test_training_batches_run_over_epochs_and_every_epoch_has_its_own_order():
    batches = batches_of(Drawn(), shuffle=True, num_epochs=4, drop_remainder=True)
    seen = indices(batches)
    epochs = [seen[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert len(batches_of(Drawn(), num_epochs=3, drop_remainder=True)) == 7
    assert all(batch["valid"].all() for batch in batches)


def test_an_endless_loader_goes_on():
    loader = make_loader(Drawn(), frame_size=FRAME, batch_size=3, num_epochs=None, shuffle=True)
    assert loader.num_batches is None
    seen = indices(list(itertools.islice(loader, 10)))
    assert sorted(seen) == sorted([0, 1, 2, 3, 4] * 6)


def test_the_seed_says_everything():
    first = batches_of(Drawn(), **RANDOM)
    assert_same(first, batches_of(Drawn(), **RANDOM))
    other = batches_of(Drawn(), **{**RANDOM, "seed": 6})
    assert any((a["image"] != b["image"]).any() for a, b in zip(first, other, strict=True))


def test_a_loader_can_be_gone_through_again():
    loader = make_loader(Drawn(), frame_size=FRAME, batch_size=2, **RANDOM)
    next(iter(loader))  # an abandoned pass does not matter
    assert_same(list(loader), list(loader))


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("cache", [True, False])
def test_threads_and_cache_change_nothing(threads, cache):
    expected = batches_of(Drawn(), **RANDOM, threads=0, cache=False)
    assert_same(batches_of(Drawn(), **RANDOM, threads=threads, cache=cache), expected)


@pytest.mark.parametrize("start_step", [0, 1, 5, 8, 20])
def test_a_run_resumes_at_any_step(start_step):
    whole = batches_of(Drawn(), **RANDOM)
    assert_same(batches_of(Drawn(), **RANDOM, start_step=start_step), whole[start_step:])
    endless = {**RANDOM, "num_epochs": None}
    resumed = batches_of(Drawn(), 3, **endless, start_step=start_step)
    assert_same(resumed, batches_of(Drawn(), start_step + 3, **endless)[start_step:])


def test_a_resumed_run_does_not_read_what_it_skips():
    dataset = Drawn()
    batches_of(dataset, start_step=2, threads=0)
    assert dataset.reads == [4]


@pytest.mark.parametrize("num_epochs", [3, None])
@pytest.mark.parametrize("process_count", [2, 3])
def test_hosts_share_the_batches_of_one(num_epochs, process_count):
    arguments = {**RANDOM, "batch_size": 6, "num_epochs": num_epochs, "start_step": 1}
    whole = batches_of(Drawn(), 2, **arguments)
    parts = [
        batches_of(Drawn(), 2, **arguments, process_index=i, process_count=process_count)
        for i in range(process_count)
    ]
    joined = [
        {key: np.concatenate([batch[key] for batch in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_two_hosts_see_each_example_once_an_epoch_between_them():
    arguments = {"batch_size": 4, "shuffle": True, "num_epochs": 3, "seed": 1}
    seen = [
        np.reshape(
            indices(batches_of(Drawn(8), **arguments, process_index=i, process_count=2)), (3, 4)
        )
        for i in range(2)
    ]
    for first, second in zip(*seen, strict=True):
        assert not set(first) & set(second)
        assert sorted([*first, *second]) == list(range(8))
    assert len({tuple(sorted(first)) for first in seen[0]}) > 1  # who sees what changes


def test_a_run_that_stops_within_an_epoch_goes_on_with_the_next_example():
    arguments = {"batch_size": 2, "shuffle": True, "num_epochs": None, "seed": 3}
    before = indices(batches_of(Drawn(7), 5, **arguments))  # three examples into the second epoch
    after = indices(batches_of(Drawn(7), 2, **arguments, start_step=5))
    assert sorted(before[:7]) == list(range(7))
    assert sorted(before[7:] + after) == list(range(7))


@pytest.mark.slow
# Python 3.12 warns where the garbage collector happens to free a worker's shared memory while the
# tracker of such memory is at work.
@pytest.mark.filterwarnings("ignore:ResourceTracker called reentrantly:UserWarning")
def test_worker_processes_change_nothing_and_report_errors(tmp_path):
    folder = picture_folder(tmp_path, 5)
    arguments = {**RANDOM, "augment": Sam2LoraAugment(), "prompt_modes": "points+box"}
    expected = batches_of(folder, **arguments)
    for workers in (2, 4):
        assert_same(batches_of(folder, **arguments, workers=workers), expected)
    Image.new("L", (3, 3)).save(folder.pairs[3][1])
    with pytest.raises(DataError, match="the mask is 3x3 pixels"):
        batches_of(folder, workers=1)


def test_every_epoch_is_augmented_and_prompted_anew():
    changing = {"augment": Augment.preset("light"), "prompt_modes": "points", "num_epochs": 2}
    first, second = batches_of(Drawn(2), **changing)
    assert first["index"].tolist() == second["index"].tolist()
    assert all((a != b).any() for a, b in zip(first["image"], second["image"], strict=True))
    assert all((a != b).any() for a, b in zip(first["coords"], second["coords"], strict=True))


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_augmentations_fit_every_frame(name):
    arguments = {**RANDOM, "augment": PAPERS[name], "num_epochs": 8}
    batches = batches_of(Drawn(), **arguments)
    assert_same(batches, batches_of(Drawn(), **arguments, threads=2))
    for batch in batches:
        for mask, (height, width) in zip(batch["mask"], batch["size"], strict=True):
            assert not mask[height:].any()
            assert not mask[:, width:].any()
        assert set(np.unique(batch["mask"])) <= {0, 1, 2, 3}


def test_any_function_augments_and_what_it_may_not_do_is_said():
    def negative(image, mask, rng, frame_size):
        return 255 - image, mask

    (plain, *_), (turned, *_) = batches_of(Drawn()), batches_of(Drawn(), augment=negative)
    inside = np.s_[0, : plain["size"][0, 0], : plain["size"][0, 1]]
    np.testing.assert_array_equal(turned["image"][inside], 255 - plain["image"][inside])

    wrong = {
        r"image float64 \(38, 64, 3\) .* of example 0": lambda i, m, *_: (i / 255.0, m),
        r"mask uint8 \(64, 38\) .* that fit into the frame \(40, 64\)": lambda i, m, *_: (
            np.rot90(i),
            np.rot90(m),
        ),
        "and mask uint8": lambda i, m, *_: (i, m[1:]),
    }
    for message, augment in wrong.items():
        with pytest.raises(ValueError, match=message):
            batches_of(Drawn(), augment=augment)

    def in_place(image, mask, rng, frame_size):
        image[:] = 0
        return image, mask

    with pytest.raises(ValueError, match="read-only"):
        batches_of(Drawn(), augment=in_place)


def test_regions_and_rules_reach_the_prompts():
    arguments = {"prompt_modes": "points+box", "box_jitter": 0.0, "box_rule": "sam2lora"}
    (batch,) = batches_of(Drawn(2), region="center", **arguments)
    for mask, coords, labels in zip(batch["mask"], batch["coords"], batch["labels"], strict=True):
        rows, columns = np.nonzero(mask)
        assert labels.tolist() == [1, 2, 3]
        corners = [[columns.min() + 1, rows.min() + 1], [columns.max(), rows.max()]]
        np.testing.assert_array_equal(coords[1:], corners)
        middle = np.mean(corners, axis=0)
        assert np.abs(coords[0] - middle).max() <= 0.5


def test_prompts_lie_on_the_augmented_mask_and_never_in_the_padding():
    for batch in batches_of(
        Drawn(),
        augment=Augment.preset("strong"),
        prompt_modes="points",
        num_points=3,
        num_negatives=3,
        num_epochs=20,
    ):
        for row in range(2):
            height, width = batch["size"][row]
            for (x, y), label in zip(batch["coords"][row], batch["labels"][row], strict=True):
                if label >= 0:
                    assert (batch["mask"][row, int(y), int(x)] > 0) == (label == 1)
                    assert x < width
                    assert y < height


def test_stretched_pictures_fill_the_frame():
    (first, *_) = batches_of(Drawn(), fit="stretch", prompt_modes="box", box_jitter=0.0)
    for row, (height, width) in enumerate(SIZES[:2]):
        assert (first["image"][row, ..., 0] == 100 + row).all()
        np.testing.assert_array_equal(first["size"][row], FRAME)
        np.testing.assert_array_equal(first["original_size"][row], (height, width))
        scale = np.array([FRAME[1] / width, FRAME[0] / height])
        box = [[width // 3, height // 4], [width // 2, height // 2]] * scale
        np.testing.assert_allclose(first["coords"][row, :2], box, atol=1.0)


def test_box_prompts_fit_the_mask():
    (batch,) = batches_of(Drawn(1), batch_size=1, prompt_modes="box", box_jitter=0.0)
    rows, columns = np.nonzero(batch["mask"][0])
    corners = [[columns.min(), rows.min()], [columns.max(), rows.max()]]
    np.testing.assert_array_equal(batch["coords"][0], corners)


def test_quarter_turns_keep_to_the_frame():
    for frame in ((64, 64), (40, 64)):
        turning = {"augment": Augment(rot90=True), "frame_size": frame, "num_epochs": 8}
        batches = batches_of(Drawn(), **turning)
        sizes = {tuple(size) for batch in batches for size in batch["size"]}
        assert ((64, 38) in sizes and (38, 64) in sizes) == (frame == (64, 64))


def test_the_cache_reads_each_example_once_and_stays_as_it_was():
    dataset = Drawn()
    batches_of(dataset, **RANDOM, threads=3)
    assert sorted(dataset.reads) == [0, 1, 2, 3, 4]
    uncached = Drawn()
    batches_of(uncached, **RANDOM, cache=False)
    assert len(uncached.reads) == 15


def test_threads_end_with_the_iteration():
    before = set(threading.enumerate())
    iterator = iter(make_loader(Drawn(), frame_size=FRAME, batch_size=2, num_epochs=None))
    next(iterator)
    iterator.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
    assert set(threading.enumerate()) <= before


def picture_folder(root: Path, count: int) -> FolderDataset:
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for index in range(count):
        example = Drawn()[index]
        Image.fromarray(example["image"]).save(root / "images" / f"{index}.png")
        Image.fromarray(example["mask"] > 0).save(root / "masks" / f"{index}_disc.png")
    return FolderDataset(root / "images", root / "masks")


def test_a_bad_file_stops_the_loader_with_its_name(tmp_path):
    folder = picture_folder(tmp_path, 3)
    (tmp_path / "images" / "1.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"1\.png: not a readable image"):
        batches_of(folder)


def test_examples_of_a_wrong_kind_are_named():
    class Floats(Drawn):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return {**example, "image": example["image"].astype(np.float32)}

    with pytest.raises(DataError, match=r"example 0 \(drawn 0\): image float32 \(30, 50, 3\)"):
        batches_of(Floats())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 3, "process_count": 2}, "a positive multiple of the 2 hosts"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 of 2"),
        ({"seed": -1}, "seed -1"),
        ({"num_epochs": 0}, "num_epochs 0"),
        ({"frame_size": (0, 64)}, r"frame_size \(0, 64\)"),
        ({"fit": "crop"}, "fit 'crop': expected one of pad, stretch"),
        ({"start_step": -1}, "start_step -1"),
        ({"prompt_modes": "boxes"}, "prompt modes boxes"),
        ({"box_jitter": 0.5}, "box_jitter 0.5"),
        ({"region": "rim"}, "region 'rim': expected one of foreground"),
        ({"box_rule": "loose"}, "box_rule 'loose': expected one of sides, sam2lora"),
        ({"batch_size": 6, "drop_remainder": True}, "5 examples make no batch of 6"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_loader(Drawn(), **{"frame_size": FRAME, "batch_size": 2, **arguments})


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="the data set is empty"):
        make_loader(Drawn(0), frame_size=FRAME, batch_size=1)


class Clock:
    """Time passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def slow_batches(clock: Clock, count: int):
    for number in range(count):
        clock.now += 10.0 if number == 0 else 1.0
        yield {"valid": np.array([True, True, number < count - 1])}


def test_the_share_of_waiting_and_the_rate_are_what_the_clock_says():
    clock = Clock()
    watch = Throughput(slow_batches(clock, 5), clock=clock)
    assert (watch.images_per_second, watch.waiting) == (0.0, 0.0)
    for _ in watch:
        clock.now += 3.0
    assert (watch.batches, watch.images) == (4, 11)  # neither the first nor what is not valid
    assert (watch.seconds, watch.waiting_seconds) == (16.0, 4.0)
    assert (watch.images_per_second, watch.waiting) == (11 / 16, 0.25)
    watch.restart()
    assert (watch.batches, watch.seconds, watch.waiting) == (0, 0.0, 0.0)
    assert measure(slow_batches(clock, 5), 3, clock=clock) == 3.0
    with pytest.raises(ValueError, match="nothing to measure"):
        measure(slow_batches(clock, 1), 3, clock=clock)
    with pytest.raises(ValueError, match="skip -1"):
        Throughput([], skip=-1)


def test_a_watched_loader_gives_the_same_batches():
    loader = make_loader(Drawn(), frame_size=FRAME, batch_size=2, **RANDOM)
    watch = Throughput(loader, skip=0)
    assert_same(list(watch), list(loader))
    assert (watch.batches, watch.images) == (8, 15)
    assert 0 < watch.waiting <= 1
    assert measure(loader, 4) > 0


def test_real_photographs(shared_data):
    root = shared_data / "idrid_optic_disc" / "test"
    photographs = Subset(FolderDataset(root / "images", root / "od_masks"), [0, 1])
    (batch,) = batches_of(photographs, frame_size=(256, 256), prompt_modes="box", box_jitter=0.0)
    assert batch["size"].tolist() == [[170, 256]] * 2
    assert batch["original_size"].tolist() == [[2848, 4288]] * 2
    for mask, box in zip(batch["mask"], batch["coords"], strict=True):
        sides = box[1] - box[0]
        assert ((sides > 15) & (sides < 60)).all()  # the disc: a tenth of the picture's width
        (x0, y0), (x1, y1) = box.astype(int)
        assert mask[y0 : y1 + 1, x0 : x1 + 1].sum() == mask.sum()
