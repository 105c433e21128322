"""`track` gives what the predictor gives, for one clip or for several at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_models
from samjax.frame import stretch_video
from samjax.video import Prompt, SAM2VideoPredictor, clip_prompts, track

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = tiny_models.SAM2
PROMPTS = [
    Prompt(0, 1, points=[[40.0, 45.0]], labels=[1]),
    Prompt(1, 3, box=[20, 20, 70, 70], points=[[30, 30]], labels=[0]),
    Prompt(0, 6, points=[[90.0, 45.0], [20.0, 10.0]], labels=[1, 0]),
]


@pytest.fixture(scope="module")
def frames(clip):
    return jnp.stack([jnp.asarray(stretch_video(frame, CONFIG.image_size)) for frame in clip])


@pytest.mark.parametrize("reverse", [False, True])
def test_equals_the_predictor(model, clip, frames, reverse):
    predictor = SAM2VideoPredictor(model, fill_hole_area=0)
    state = predictor.init_state(clip)
    for prompt in PROMPTS:
        given = {"points": prompt.points, "labels": prompt.labels, "box": prompt.box}
        predictor.add_new_points_or_box(state, prompt.frame, prompt.obj, **given)
    start = 6 if reverse else 1
    order = [f for f, *_ in predictor.propagate_in_video(state, start, reverse=reverse)]
    prompts = clip_prompts(CONFIG, PROMPTS, clip.shape[1:3], len(clip))
    run = jax.jit(functools.partial(track, CONFIG, reverse=reverse))
    found = run(model.params, frames, prompts)
    assert found.low_res_logits.shape == (10, 2, 32, 32)
    for frame in range(10):
        for obj, own in state.tracks.items():
            if frame not in order:
                assert (found.low_res_logits[frame, obj] == -1024).all()
                continue
            record = own.conditioning.get(frame) or own.tracked[frame]
            score = float(record.object_score_logits)
            assert float(found.object_score_logits[frame, obj]) == pytest.approx(score, abs=1e-3)
            expected = np.asarray(record.low_res_logits)
            difference = np.abs(found.low_res_logits[frame, obj] - expected).max()
            assert difference <= 1e-3 * max(expected.std(), 1e-3), (frame, obj)


def test_several_clips_at_once(model, clip, frames):
    """Other frames and prompts on other frames; each clip as if it were alone."""
    clips = jnp.stack([frames[:6], frames[3:9]])
    prompts = [
        clip_prompts(CONFIG, [Prompt(0, 0, points=[[40, 45]], labels=[1])], (90, 160), 6),
        clip_prompts(CONFIG, [Prompt(0, 2, points=[[80, 45]], labels=[1])], (90, 160), 6),
    ]
    run = functools.partial(track, CONFIG, model.params)
    both = jax.jit(jax.vmap(run))(clips, jax.tree.map(lambda *x: jnp.stack(x), *prompts))
    for i in range(2):
        alone = jax.jit(run)(clips[i], prompts[i])
        np.testing.assert_allclose(both.low_res_logits[i], alone.low_res_logits, atol=2e-3)


@pytest.mark.parametrize(
    ("prompts", "complaint"),
    [
        ([], "objects"),
        ([Prompt(1, 0, box=[1, 1, 9, 9])], "without gaps"),
        ([Prompt(0, 12, box=[1, 1, 9, 9])], "object 0 on frame 12: expected one of the frames"),
        ([Prompt(0, 0)], "give points with labels, or a box"),
        ([Prompt(0, 0, box=[1, 1, 9, 9]), Prompt(0, 0, box=[1, 1, 9, 9])], "there is one already"),
        ([Prompt(0, 0, box=[1, 1, 900, 9])], "object 0 on frame 0: box"),
    ],
)
def test_bad_prompts(prompts, complaint):
    with pytest.raises(ValueError, match=complaint):
        clip_prompts(CONFIG, prompts, (90, 160), 10)
