"""How answers become losses and label logits."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import tiny_models
from experiments import sam2lora
from experiments.baselines import TwoLevels
from experiments.objectives import LabelMap, nearest, objective_for, valid_pixels
from samjax.models.hsam import HSamPrediction
from samjax.models.mask_decoder import MaskPrediction
from samjax.models.ops import resize_bilinear
from samjax.trees import flatten

CONFIG = tiny_models.SAM  # a frame of 48 x 80


def case(classes=3, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, classes + 1, 12, 20)).astype(np.float32)
    mask = rng.integers(0, classes + 1, (2, 48, 80), dtype=np.uint8)
    return logits, {"mask": mask, "size": np.array([[48, 80]] * 2, np.int32)}


def samed(logits, labels, share):
    """SAMed's loss of one image, as its trainer writes it, in float64."""
    e = np.exp(logits - logits.max(0))
    p = e / e.sum(0)
    one_hot = np.arange(len(p))[:, None, None] == labels
    entropy = -np.log(p[one_hot.argmax(0), *np.indices(labels.shape)]).mean()
    both, squares = (p * one_hot).sum((1, 2)), (p**2).sum((1, 2)) + one_hot.sum((1, 2))
    dice = (1 - (2 * both + 1e-5) / (squares + 1e-5)).mean()
    return (1 - share) * entropy + share * dice


@pytest.mark.parametrize("size", [(12, 20), (3, 7), (48, 80)])
def test_labels_get_small_as_scipy_makes_them(size):
    labels = np.random.default_rng(0).integers(0, 9, (1, 48, 80))
    factors = (1, *(new / old for new, old in zip(size, labels.shape[1:], strict=True)))
    theirs = ndimage.zoom(labels, factors, order=0)
    np.testing.assert_array_equal(nearest(jnp.asarray(labels), size), theirs)


@pytest.mark.parametrize("classes", [1, 3])
def test_samed_loss_is_taken_on_the_decoders_own_logits(classes):
    logits, batch = case(classes)
    objective = LabelMap(num_classes=classes, dice_weight=0.8, low_res=True)
    prediction = MaskPrediction(jnp.asarray(logits), jnp.zeros((2, classes + 1)))
    ours = objective.loss(CONFIG, prediction, jax.tree.map(jnp.asarray, batch))
    small = ndimage.zoom(batch["mask"], (1, 0.25, 0.25), order=0)
    theirs = [samed(z.astype(np.float64), y, 0.8) for z, y in zip(logits, small, strict=True)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert objective.logits(CONFIG, prediction, train=False).shape == (2, 48, 80, classes + 1)


def test_padding_does_not_count():
    logits, batch = case()
    objective = LabelMap(num_classes=3, dice_weight=0.8, low_res=True)
    batch["size"] = np.array([[24, 80], [48, 40]], np.int32)
    other = {**batch, "mask": batch["mask"].copy()}
    other["mask"][0, 24:] = 0
    other["mask"][1, :, 40:] = 0
    prediction = MaskPrediction(jnp.asarray(logits), jnp.zeros((2, 4)))
    losses = [
        objective.loss(CONFIG, prediction, jax.tree.map(jnp.asarray, b)) for b in (batch, other)
    ]
    np.testing.assert_array_equal(*losses)
    inside = valid_pixels(CONFIG, jnp.asarray(batch["size"]))
    assert inside.sum((1, 2)).tolist() == [24 * 80, 48 * 40]


def test_two_levels_weigh_the_second_decoder_more_with_the_epochs():
    """At epoch 0 w = 0.6 is decoder 2's share; H-SAM's w = 0.6^(0.99^epoch)."""
    logits, batch = case()
    full = np.random.default_rng(1).normal(size=(2, 4, 48, 80)).astype(np.float32)
    objective = TwoLevels(num_classes=3, dice_weight=0.9, low_res=True)
    prediction = HSamPrediction(jnp.asarray(logits), jnp.zeros((2, 4)), jnp.asarray(full))
    batch = {**jax.tree.map(jnp.asarray, batch), "epoch": jnp.array([0.0, 100.0])}
    ours = objective.loss(CONFIG, prediction, batch)
    small = ndimage.zoom(np.asarray(batch["mask"]), (1, 0.25, 0.25), order=0)
    for i, epoch in enumerate((0, 100)):
        w = 0.6 ** (0.99**epoch)
        first = samed(logits[i].astype(np.float64), small[i], 0.9)
        second = samed(full[i].astype(np.float64), np.asarray(batch["mask"][i]), 0.9)
        np.testing.assert_allclose(ours[i], (1 - w) * first + w * second, rtol=1e-6)
    assert "epoch" in objective.arrays
    module = SimpleNamespace(answer=lambda f, c, t, key, mask: (key, mask is not None))
    given = {"coords": 0, "labels": 0, "mask": batch["mask"]}
    assert objective.answer(module, None, given, None) == (None, False)
    assert objective.answer(module, None, given, jax.random.key(0))[1]


def test_one_class_is_a_single_mask_and_more_a_label_map():
    assert type(objective_for(1)).__name__ == "SingleMask"
    assert objective_for(4, 0.8) == LabelMap(num_classes=4, dice_weight=0.8)


@pytest.mark.parametrize("token", [0, 1])
def test_sam2lora_reads_and_trains_the_token_it_is_told(token, tmp_path):
    """The others' hypernetworks stay; those of its own mask are tuned in full tuning."""
    arguments = sam2lora.Arguments(smoke=True, image_size=64, mask_token=token, out=tmp_path)
    tuning = sam2lora.prepared(arguments, "full", sam2lora.TERMS)
    labels = flatten(tuning.labels["params"])
    tuned = {p.split("/")[2] for p, label in labels.items() if "hypernetworks_mlps" in p
             and label == "adamw"}  # fmt: skip
    assert tuned == {str(token)}
    rng = np.random.default_rng(0)
    low = jnp.asarray(rng.normal(size=(2, 4, 12, 20)), jnp.float32)
    prediction = MaskPrediction(low, jnp.zeros((2, 4)))
    found = tuning.objective.logits(CONFIG, prediction, train=False)
    np.testing.assert_array_equal(found, resize_bilinear(low[:, token], CONFIG.image_size))
