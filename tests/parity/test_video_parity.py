"""Tracking against upstream's `SAM2VideoPredictor` on the CPU.

Real frames with Meta's tiny model, and a synthetic clip of 32 frames with a model of a few
thousand parameters. The mask logits and object scores of the random models are scaled so that
thresholds, stability and occlusion really switch (tests/sam2_reference.py). Holes are not filled
here, because upstream fills them on CUDA only.
"""

import os
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
if find_spec("sam2") is None:
    pytest.skip("sam2 is not installed", allow_module_level=True)

import tiny_models  # noqa: E402
from sam2_reference import relative, sam2_pair  # noqa: E402
from samjax.models.sam2_config import sam2  # noqa: E402
from samjax.predictor import SamModel  # noqa: E402
from samjax.trees import flatten, unflatten  # noqa: E402
from samjax.video import SAM2VideoPredictor, steps  # noqa: E402

UNTRACKED, TRACKED = 1e-4, 1e-3  # of the standard deviation: before a memory is written, and after


@pytest.fixture(autouse=True)
def quick(request, quick_compilation):
    """But for the test at full size, which takes longer to run than to compile."""
    if request.node.get_closest_marker("slow"):
        jax.config.update("jax_disable_most_optimizations", False)


class Both:
    """Upstream's predictor and ours, given the same calls; compares what they answer."""

    def __init__(self, config, folder, scores_around_zero=False, **options):
        if scores_around_zero:
            self.theirs, params = sam2_pair.__wrapped__(config)  # to be changed: not the cached one
            params = shift_scores(self.theirs, params, folder)
        else:
            self.theirs, params = sam2_pair(config)
        self.ours = SAM2VideoPredictor(SamModel(config, params), fill_hole_area=0, **options)
        self.states = self.theirs.init_state(str(folder)), self.ours.init_state(folder)
        self.worst, self.scores = 0.0, set()

    def call(self, name, *args, tolerance=UNTRACKED, **options):
        expected = getattr(self.theirs, name)(self.states[0], *args, **options)
        found = getattr(self.ours, name)(self.states[1], *args, **options)
        self.compare(found, expected, tolerance)
        return found

    def propagate(self, tolerance=TRACKED, **options):
        """Returns how many frames there were."""
        theirs = self.theirs.propagate_in_video(self.states[0], **options)
        frames = 0
        for found in self.ours.propagate_in_video(self.states[1], **options):
            self.compare(found, next(theirs), tolerance)
            self.compare_scores(found[0])
            frames += 1
        assert next(theirs, None) is None
        return frames

    def compare(self, found, expected, tolerance):
        assert found[0] == expected[0]
        assert list(found[1]) == list(expected[1])
        masks = expected[2].numpy()
        assert found[2].shape == masks.shape
        for ours, theirs in zip(found[2], masks, strict=True):
            if theirs.std() == 0:  # -1024 throughout: the object is not there
                np.testing.assert_array_equal(ours, theirs)
                continue
            difference = relative(ours, theirs)
            assert difference < tolerance, f"frame {found[0]}: {difference:.1e}"
            self.worst = max(self.worst, difference)
            either = ((ours > 0) | (theirs > 0)).sum()
            assert ((ours > 0) & (theirs > 0)).sum() >= 0.9999 * either

    def compare_scores(self, frame):
        theirs = self.states[0]["output_dict_per_obj"]
        for index, track in enumerate(self.states[1].tracks.values()):
            ours = track.conditioning.get(frame) or track.tracked[frame]
            outputs = theirs[index]
            out = outputs["cond_frame_outputs"].get(frame)
            out = out or outputs["non_cond_frame_outputs"][frame]
            expected = float(out["object_score_logits"])
            assert (float(ours.object_score_logits) > 0) == (expected > 0)
            self.scores.add(expected > 0)


def shift_scores(theirs, params, folder):
    """Lets about half of a clip's object scores be negative, in both models."""
    state = theirs.init_state(str(folder))
    theirs.add_new_points_or_box(state, 0, 1, points=[[30.0, 45.0]], labels=[1])
    for _ in theirs.propagate_in_video(state):
        pass
    outputs = state["output_dict_per_obj"][0]["non_cond_frame_outputs"].values()
    shift = -float(np.median([float(out["object_score_logits"]) for out in outputs]))
    with torch.no_grad():
        theirs.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += shift
    flat, name = flatten(params), "mask_decoder/pred_obj_score_head/layers/2/bias"
    return unflatten({**flat, name: flat[name] + shift})


def as_folder(clip, folder):
    for i, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / f"{i:05}.jpg", quality=95)
    return folder


def walk(both, last):
    """Points on frame 0, a box on frame 3 for a second object, a correction, and backwards."""
    height, width = both.states[1].video_height, both.states[1].video_width
    at = lambda *xy: np.array(xy, np.float32) * np.array([width, height])  # noqa: E731
    inside = at((0.2, 0.5), (0.25, 0.55))
    both.call("add_new_points_or_box", 0, 1, points=inside, labels=np.array([1, 1]))
    box = at((0.3, 0.1), (0.7, 0.8)).ravel()
    both.call("add_new_points_or_box", 3, 2, box=box)
    frames = both.propagate()
    correction = {"points": at((0.5, 0.5)), "labels": np.array([0])}
    both.call("add_new_points_or_box", 5, 1, **correction, tolerance=TRACKED)
    frames += both.propagate(start_frame_idx=5, max_frame_num_to_track=2)
    frames += both.propagate(start_frame_idx=last, reverse=True, max_frame_num_to_track=last)
    return frames


@pytest.mark.parametrize("config", [tiny_models.SAM2, tiny_models.SAM2_0], ids=["2.1", "2.0"])
def test_synthetic_clip(config, tmp_path, record_property):
    """32 frames with an occlusion; as many memories and pointers as the model takes."""
    if config is tiny_models.SAM2_0 and not os.environ.get("SAMJAX_EVERY_SIZE"):
        pytest.skip("set SAMJAX_EVERY_SIZE=1 for SAM 2.0 too")
    folder = as_folder(tiny_models.moving_disc(32, (90, 160)), tmp_path)
    both = Both(config, folder, scores_around_zero=True)
    compiled = steps.track._cache_size()
    assert walk(both, last=31) == 32 + 3 + 32
    assert both.scores == {True, False}
    assert steps.track._cache_size() - compiled <= 1  # however many frames
    print(f"largest difference {both.worst:.1e} of the standard deviation")
    record_property("largest difference", both.worst)


@pytest.mark.slow
def test_real_frames(shared_data, record_property):
    """Meta's tiny 2.1, at 1024² if all sizes are to be tested (10 minutes), else at 512²."""
    folder = shared_data / "sam_example_images" / "bedroom_frames"
    side = 1024 if os.environ.get("SAMJAX_EVERY_SIZE") else 512
    both = Both(sam2("hiera_tiny", image_size=(side, side)), folder)
    assert walk(both, last=7) == 8 + 3 + 8
    print(f"largest difference {both.worst:.1e} of the standard deviation")
    record_property("largest difference", both.worst)


def test_changes_of_mind(tmp_path):
    """Masks, refined points, objects that come late, prompts taken back, objects removed."""
    config = tiny_models.SAM2
    both = Both(config, as_folder(tiny_models.moving_disc(9, (90, 160)), tmp_path))
    mask = np.zeros((90, 160), bool)
    mask[30:60, 10:50] = True
    one, two = np.array([[40.0, 45.0]], np.float32), np.array([[30.0, 40.0]], np.float32)
    both.call("add_new_mask", 0, 7, mask)
    both.call("add_new_points_or_box", 2, 7, points=one, labels=np.array([1]))
    refined = {"points": two, "labels": np.array([0]), "clear_old_points": False}
    both.call("add_new_points_or_box", 2, 7, **refined)
    both.propagate(max_frame_num_to_track=4)
    box = np.array([60, 20, 110, 70], np.float32)
    both.call("add_new_points_or_box", 4, "late", box=box, points=one, labels=np.array([0]))
    both.call("add_new_mask", 3, 7, mask, tolerance=TRACKED)
    both.propagate()
    both.call("clear_all_prompts_in_frame", 2, 7, tolerance=TRACKED)
    both.propagate(start_frame_idx=6, reverse=True)
    both.call("add_new_points_or_box", 8, "third", points=one, labels=np.array([1]))
    found = both.ours.remove_object(both.states[1], 7)
    expected = both.theirs.remove_object(both.states[0], 7)
    assert found[0] == expected[0] == ["late", "third"]
    order = dict(expected[1])
    assert sorted(order) == [frame for frame, _ in found[1]]
    for frame, masks in found[1]:
        both.compare((frame, [], masks), (frame, [], order[frame]), TRACKED)
    both.propagate()
    both.ours.reset_state(both.states[1])
    both.theirs.reset_state(both.states[0])
    both.call("add_new_points_or_box", 1, 1, points=one, labels=np.array([1]))
    both.propagate()


@pytest.mark.parametrize(
    "options",
    [
        {"add_all_frames_to_correct_as_cond": True},
        {"max_cond_frames_in_attn": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options, tmp_path):
    both = Both(
        tiny_models.SAM2, as_folder(tiny_models.moving_disc(8, (90, 160)), tmp_path), **options
    )
    kept = {name: getattr(both.theirs, name) for name in options}
    vars(both.theirs).update(options)
    try:
        point = np.array([[40.0, 45.0]], np.float32)
        for frame in (0, 3, 6):
            both.call("add_new_points_or_box", frame, 1, points=point, labels=np.array([1]))
        both.call("add_new_points_or_box", 0, 2, points=point + 20, labels=np.array([1]))
        both.propagate()
        correction = {"points": point + 9, "labels": np.array([0])}
        both.call("add_new_points_or_box", 4, 2, **correction, tolerance=TRACKED)
        both.propagate(start_frame_idx=2)
    finally:
        vars(both.theirs).update(kept)


def test_each_pixel_left_to_one_object(rng):
    theirs, _ = sam2_pair(tiny_models.SAM2)
    logits = rng.normal(size=(3, 12, 20)).astype(np.float32) * 20
    small = torch.from_numpy(logits)[:, None]
    big = torch.nn.functional.interpolate(small, (30, 41), mode="bilinear")
    expected = theirs._apply_non_overlapping_constraints(big).numpy()
    found = steps.to_video_size(list(logits), size=(30, 41), apart=True)
    assert np.abs(found - expected).max() < 1e-4
    assert ((np.asarray(found) > 0).sum(axis=0) <= 1).all()
