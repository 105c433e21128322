"""Methods, loss and merging on a tiny SAM: what may change, and that both forms agree."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny_models
from experiments import segmentation as seg
from experiments.objectives import objective_for, valid_pixels
from samjax.models.functional import bind, init_params
from samjax.peft.lora import LoraConfig
from samjax.peft.presets import BUFFER
from samjax.training.loop import init_state, make_step
from samjax.trees import flatten

KEY = jax.random.key(3)
LORA = LoraConfig(rank=2, alpha=4.0, parts=("image_encoder", "mask_decoder"))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8),
        "mask": rng.integers(0, 2, (4, 64, 64), dtype=np.uint8),
        "size": np.array([[64, 64], [40, 64], [64, 30], [64, 64]], np.int32),
        "coords": rng.uniform(0, 60, (4, 3, 2)).astype(np.float32),
        "labels": np.array([[1, 0, -1], [2, 3, -2], [-2, -2, -2], [1, -1, -2]], np.int32),
    }


def tune(tuning, batch, steps=3, accumulate=1, optimizer=None):
    optimizer = optimizer or optax.adam(1e-2)
    step = make_step(partial(seg.batch_loss, tuning), optimizer, accumulate)
    state = init_state(tuning.trainable, optimizer)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, tuning.frozen, batch, KEY)
        losses.append(float(metrics["loss"]))
    return state.trainable, losses


def prepared(config, method, **options):
    return seg.prepare(config, init_params(config, 0), method, lora=LORA, **options)


@pytest.mark.parametrize("method", seg.METHODS)
def test_only_what_the_method_names_changes(tiny_config, batch, method):
    base = {path: np.array(leaf) for path, leaf in flatten(init_params(tiny_config, 0)).items()}
    tuning = prepared(tiny_config, method)
    optimizer = seg.make_optimizer(tuning, 3e-3, weight_decay=0.0, rank=2)
    assert "freeze" in seg.summary(tuning, optimizer)
    trained, losses = tune(tuning, batch, optimizer=optimizer)
    after = flatten(tuning.merged(trained))
    changed = {path for path in base if not np.array_equal(base[path], after[path])}
    frozen = flatten(tuning.frozen)
    assert losses[-1] < losses[0]
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(np.asarray(leaf), base[path])
    if method == "lora":
        assert set(frozen) == set(base)
        assert changed
        assert all(path.endswith("/kernel") and "attn" in path for path in changed)
    elif method == "decoder":
        assert changed
        assert all(path.startswith("mask_decoder/") for path in changed)
    elif method in ("full", "galore"):
        assert "image_encoder/pos_embed" in changed
    else:  # of the encoder, its blocks and nothing else; of the rest all or nothing
        encoder = {path for path in changed if path.startswith("image_encoder/")}
        assert bool(encoder) == (method != "prompting")
        assert all("/blocks/" in path for path in encoder)
        only_qkv = all("/attn/qkv/" in path for path in encoder)
        assert only_qkv == (method in ("lora+decoder", "lora+heads", "prompting"))
        rest = method != "blocks"
        assert any(path.startswith("mask_decoder/output_upscaling") for path in changed) == rest
        assert ("prompt_encoder/no_mask_embed/embedding" in changed) == rest
        dense = {path for path in changed if path.startswith("mask_decoder/transformer/")}
        by_factors = all("attn" in path and path.endswith("_proj/kernel") for path in dense)
        assert by_factors == (method in ("lora+heads", "blocks"))


@pytest.mark.parametrize("family", ["sam", "sam2"])
def test_what_the_loss_does_not_reach_is_not_trained(tiny_config, family):
    """Else weight decay alone would change it."""
    config = tiny_config if family == "sam" else tiny_models.SAM2
    params = tiny_models.noisy_params(config)
    tuning = seg.prepare(config, params, "full", lora=LORA)
    rng = np.random.default_rng(0)
    size = config.image_size
    labels = np.array([[1, 0, -1], [2, 3, -2], [-2, -2, -2]], np.int32)
    batch = {
        "image": rng.integers(0, 256, (3, *size, 3), dtype=np.uint8),
        "mask": rng.integers(0, 2, (3, *size), dtype=np.uint8),
        "size": np.array([size] * 3, np.int32),
        "coords": rng.uniform(0, min(size), (3, 3, 2)).astype(np.float32),
        "labels": labels,
    }

    def loss(params, batch):
        whole = {"params": params, "factors": {}}
        return seg.batch_loss(tuning, whole, {}, batch, KEY).sum()

    gradients = flatten(jax.jit(jax.grad(loss))(params, batch))
    without = {path for path, leaf in gradients.items() if not np.abs(leaf).any()}
    frozen = set(flatten(tuning.frozen))
    assert frozen - without == {BUFFER}
    assert without - frozen == set()


def test_lora_side_path_equals_the_merged_model(tiny_config, batch):
    tuning = prepared(tiny_config, "lora")
    trained, _ = tune(tuning, batch, steps=8)
    arrays = batch["image"], batch["size"], batch["coords"], batch["labels"]
    beside = jax.jit(lambda t, f, a: tuning.bind(t, f)(*a))(trained, tuning.frozen, arrays)
    folded = jax.jit(lambda p, a: bind(tiny_config, p)(*a))(tuning.merged(trained), arrays)
    base = jax.jit(lambda t, f, a: tuning.bind(t, f)(*a))(tuning.trainable, tuning.frozen, arrays)
    assert float(jnp.abs(beside.low_res_logits - base.low_res_logits).max()) > 1e-2
    np.testing.assert_allclose(beside.low_res_logits, folded.low_res_logits, atol=1e-5)
    np.testing.assert_allclose(beside.iou, folded.iou, atol=1e-5)


@pytest.mark.parametrize("num_classes", [1, 2])
def test_accumulated_micro_batches_equal_one_big_batch(tiny_config, batch, num_classes):
    config, params = tiny_config, init_params(tiny_config, 0)
    if num_classes > 1:
        config, params = seg.with_classes(config, params, num_classes, seed=1)
    tuning = seg.prepare(config, params, "lora", lora=LORA, objective=objective_for(num_classes),
                         fresh_head=num_classes > 1)  # fmt: skip
    optimizer = optax.sgd(0.1)
    big, _ = tune(tuning, batch, steps=3, optimizer=optimizer)
    small, _ = tune(tuning, batch, steps=3, accumulate=2, optimizer=optimizer)
    for path, leaf in flatten(big).items():
        np.testing.assert_allclose(leaf, flatten(small)[path], atol=1e-6, err_msg=path)


def test_padding_does_not_reach_the_loss(tiny_config, batch):
    tuning = prepared(tiny_config, "full")
    loss = jax.jit(partial(seg.batch_loss, tuning))
    noise = np.random.default_rng(1).integers(0, 2, batch["mask"].shape, dtype=np.uint8)
    inside = np.asarray(valid_pixels(tiny_config, jnp.asarray(batch["size"])))
    changed = {
        **batch,
        "mask": np.where(inside, batch["mask"], noise).astype(np.uint8),
        "image": np.where(inside[..., None], batch["image"], 255).astype(np.uint8),
    }
    args = tuning.trainable, tuning.frozen
    np.testing.assert_array_equal(loss(*args, batch, KEY), loss(*args, changed, KEY))


def test_images_of_a_batch_do_not_see_each_other(tiny_config, batch):
    tuning = prepared(tiny_config, "full")
    loss = jax.jit(partial(seg.batch_loss, tuning))
    whole = loss(tuning.trainable, tuning.frozen, batch, KEY)
    flipped = {name: array[::-1].copy() for name, array in batch.items()}
    np.testing.assert_allclose(
        whole, loss(tuning.trainable, tuning.frozen, flipped, KEY)[::-1], atol=1e-6
    )


def test_a_fresh_head_has_k_plus_one_tokens_and_is_trained(tiny_config):
    params = init_params(tiny_config, 0)
    config, with_head = seg.with_classes(tiny_config, params, 5, seed=1)
    assert with_head["mask_decoder"]["mask_tokens"]["embedding"].shape[0] == 6
    kept, old = flatten(with_head), flatten(params)
    np.testing.assert_array_equal(
        kept["image_encoder/blocks/0/attn/qkv/kernel"],
        old["image_encoder/blocks/0/attn/qkv/kernel"],
    )
    tuning = seg.prepare(
        config, with_head, "lora", lora=LORA, objective=objective_for(5), fresh_head=True
    )
    assert all("mask_decoder/" in path for path in flatten(tuning.trainable["params"]))
    assert "mask_decoder/mask_tokens/embedding" in flatten(tuning.trainable["params"])


def test_unknown_method_is_named(tiny_config):
    with pytest.raises(
        ValueError, match=r"'adapter'; expected one of lora, lora\+decoder, lora\+heads, prompting"
    ):
        prepared(tiny_config, "adapter")


def test_labels_at_picks_the_best_class_after_resizing():
    logits = np.zeros((4, 6, 3), np.float32)
    logits[:, :3, 1], logits[:, 3:, 2] = 4, 4
    labels = seg.labels_at(logits, (8, 12))
    assert labels.shape == (8, 12)
    assert (labels[:, :5] == 1).all()
    assert (labels[:, 7:] == 2).all()
