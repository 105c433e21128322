"""The video predictor's states and errors; upstream's answers are in tests/parity."""

import numpy as np
import pytest

import tiny_models
from samjax.predictor import SamModel
from samjax.video import SAM2VideoPredictor, steps
from samjax.video.volume import label_frames, merge_objects

pytestmark = pytest.mark.usefixtures("quick_compilation")
POINT = {"points": [[40.0, 45.0]], "labels": [1]}
BOX = {"box": [20, 20, 70, 70]}


@pytest.fixture
def predictor(model):
    return SAM2VideoPredictor(model)


@pytest.fixture
def state(predictor, clip):
    return predictor.init_state(clip)


def test_a_walk(predictor, state):
    frame, ids, logits = predictor.add_new_points_or_box(state, 0, "a", **POINT)
    assert (frame, ids, logits.shape, logits.dtype) == (0, ["a"], (1, 1, 90, 160), np.float32)
    _, ids, logits = predictor.add_new_points_or_box(state, 2, "b", **BOX)
    assert ids == ["a", "b"]
    assert (logits[0] == -1024).all()  # nothing is known of it here
    seen = [(frame, len(ids)) for frame, ids, _ in predictor.propagate_in_video(state)]
    assert seen == [(i, 2) for i in range(10)]
    seen = [frame for frame, _, _ in predictor.propagate_in_video(state, 4, 2, reverse=True)]
    assert seen == [4, 3, 2]
    assert list(predictor.propagate_in_video(state, 0, reverse=True)) == []


def test_longer_clips_compile_nothing(model, predictor):
    counts = []
    for frames in (4, 12):
        state = predictor.init_state(tiny_models.moving_disc(frames, (64, 64)))
        predictor.add_new_points_or_box(state, 0, 1, points=[[20, 30]], labels=[1])
        for _ in predictor.propagate_in_video(state):
            pass
        functions = steps.encode, steps.prompt, steps.remember, steps.track, steps.to_video_size
        counts.append([function._cache_size() for function in functions])
    assert counts[0] == counts[1]


def test_few_frames_are_kept(predictor, state):
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    for _ in predictor.propagate_in_video(state):
        assert len(state.features) <= 4


def test_results_may_stay_on_the_host(predictor, clip):
    results = []
    for offload in (False, True):
        state = predictor.init_state(clip[:4], offload_state_to_cpu=offload)
        predictor.add_new_points_or_box(state, 0, 1, **POINT)
        results.append([logits for *_, logits in predictor.propagate_in_video(state)])
        memory = state.tracks[1].tracked[2].memory
        assert isinstance(memory, np.ndarray) == offload
    np.testing.assert_array_equal(*results)


def test_holes_are_filled(model, predictor, state):
    mask = np.zeros((90, 160), bool)
    mask[20:70, 30:120] = True
    mask[42:50, 70:82] = False
    _, _, filled = predictor.add_new_mask(state, 0, 1, mask)
    plain = SAM2VideoPredictor(model, fill_hole_area=0)
    _, _, open_ = plain.add_new_mask(plain.init_state(state.frames), 0, 1, mask)
    assert (filled[0, 0, 30:60, 50:100] > 0).all()
    assert not (open_[0, 0, 30:60, 50:100] > 0).all()


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        ({"frame_idx": 10, **POINT}, "frame 10: expected one of the clip's 10 frames, 0 to 9"),
        ({"frame_idx": -1, **POINT}, "frame -1: expected"),
        ({"frame_idx": 0}, "no prompt"),
        ({"frame_idx": 0, "points": [[3, 4]]}, "go together"),
        ({"frame_idx": 0, "points": [[300, 4]], "labels": [1]}, "outside the"),
        ({"frame_idx": 0, "points": [[3, 4]], "labels": [7]}, "point_labels: 7"),
        ({"frame_idx": 0, "box": [5, 5, 2, 2]}, "is empty"),
        ({"frame_idx": 0, **BOX, "clear_old_points": False}, "a box starts a prompt"),
        ({"frame_idx": 0, "points": np.zeros((2, 1, 2)), "labels": np.ones((2, 1))}, "2 prompts"),
    ],
)
def test_a_bad_prompt_changes_nothing(predictor, state, call, complaint):
    with pytest.raises(ValueError, match=complaint):
        predictor.add_new_points_or_box(state, obj_id=1, **call)
    assert state.tracks == {}


@pytest.mark.parametrize(
    ("mask", "complaint"),
    [
        (np.zeros((3, 90, 160)), r"expected \(h, w\)"),
        (np.full((90, 160), np.nan), "NaN"),
        (np.full((90, 160), "a"), "expected"),
    ],
)
def test_a_bad_mask_changes_nothing(predictor, state, mask, complaint):
    with pytest.raises(ValueError, match=complaint):
        predictor.add_new_mask(state, 0, 1, mask)
    assert state.tracks == {}


def test_states(predictor, state, model):
    with pytest.raises(RuntimeError, match="no prompts"):
        next(predictor.propagate_in_video(state))
    with pytest.raises(ValueError, match="no object 5"):
        predictor.clear_all_prompts_in_frame(state, 0, 5)
    with pytest.raises(RuntimeError, match="no object 5"):
        predictor.remove_object(state, 5, strict=True)
    assert predictor.remove_object(state, 5) == ([], [])
    predictor.add_new_points_or_box(state, 0, 1, **POINT)
    predictor.clear_all_prompts_in_frame(state, 0, 1)
    with pytest.raises(RuntimeError, match="object 1 has no prompts"):
        next(predictor.propagate_in_video(state))
    with pytest.raises(ValueError, match="max_cond_frames_in_attn 1"):
        SAM2VideoPredictor(model, max_cond_frames_in_attn=1)
    with pytest.raises(ValueError, match="family 'sam'"):
        SAM2VideoPredictor(SamModel(tiny_models.SAM, tiny_models.noisy_params(tiny_models.SAM)))


def test_empty_clip(predictor, tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        predictor.init_state(tmp_path)


@pytest.mark.parametrize("slices", [1, 5])
def test_label_frames(predictor, clip, slices):
    """Both directions from the prompted slice, each frame once; a single slice as well."""
    middle = slices // 2
    prompts = {(middle, 1): {"box": [20, 20, 70, 70]}, (middle, 2): POINT}
    labels = label_frames(predictor, clip[:slices], prompts)
    assert (labels.shape, labels.dtype) == ((slices, 90, 160), np.uint8)
    assert set(np.unique(labels)) <= {0, 1, 2}
    with pytest.raises(ValueError, match=r"objects \[\]"):
        label_frames(predictor, clip[:slices], {})


def test_merge_objects():
    logits = np.array([[[1.0, -1.0, 3.0]], [[2.0, -2.0, 1.0]]])
    assert merge_objects(logits, [4, 9]).tolist() == [[9, 0, 4]]
