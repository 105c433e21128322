import importlib
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.training import losses, region_losses
from samjax.training.region_losses import focal_tversky, multimask_minimum, squared_dice, tversky

B, M, H, W = 4, 3, 7, 10
REGIONS = [squared_dice, tversky, focal_tversky]
by_region = pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.__name__)


@pytest.fixture
def batch(rng):
    """Logits, targets, one of them empty, and a valid area like the pipeline's."""
    logits = 3 * rng.standard_normal((B, H, W)).astype(np.float32)
    target = rng.random((B, H, W)) < 0.4
    target[2] = False
    valid = np.ones((B, H, W), bool)
    valid[0, 5:], valid[1, :, 6:] = False, False
    return logits, target, valid


def sam2loras(z, y):
    """SAM2LoRA's losses for one sample, written in torch from protocols §5.3, in float64."""
    p, y = z.double().sigmoid(), y.double()
    both, missed, extra = (p * y).sum(), (y * (1 - p)).sum(), ((1 - y) * p).sum()
    index = (both + 1) / (both + 0.7 * missed + 0.3 * extra + 1)
    return 1 - (2 * both + 1) / (p.sum() + y.sum() + 1), (1 - index) ** 0.75


def test_against_monai(batch):
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.losses")
    logits, target, _ = batch
    z, y = torch.tensor(logits)[:, None], torch.tensor(target)[:, None].float()
    theirs = monai.TverskyLoss(
        sigmoid=True, alpha=0.2, beta=0.8, smooth_nr=1, smooth_dr=1, reduction="none"
    )(z, y)
    ours = tversky(jnp.array(logits), jnp.array(target), false_positives=0.2, false_negatives=0.8)
    np.testing.assert_allclose(ours, theirs.flatten(), atol=1e-6)
    theirs = monai.DiceLoss(
        sigmoid=True, squared_pred=True, smooth_nr=1e-5, smooth_dr=1e-5, reduction="none"
    )(z, y)
    np.testing.assert_allclose(
        squared_dice(jnp.array(logits), jnp.array(target)), theirs.flatten(), atol=1e-6
    )


def test_sam2loras_composite_in_one_line(batch):
    torch = pytest.importorskip("torch")
    logits, target, valid = batch
    composite = losses.weighted_sum(
        {
            "bce": (1, losses.binary_cross_entropy),
            "dice": (1, losses.binary_dice),
            "tversky": (1, focal_tversky),
        }
    )
    ours = jax.jit(composite)(*map(jnp.array, batch))
    for i in range(B):
        z, y = torch.tensor(logits[i][valid[i]]), torch.tensor(target[i][valid[i]])
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(z, y.float())
        np.testing.assert_allclose(ours[i], entropy + sum(sam2loras(z, y)), rtol=1e-6)


def test_the_focal_power_keeps_its_value_up_to_the_straight_line():
    torch = pytest.importorskip("torch")
    target = np.zeros((1, 64, 64), bool)
    target[:, 10:30, 20:50] = True
    value = jax.jit(focal_tversky)
    distances = []
    for sure in np.linspace(0, 16, 33):
        logits = np.where(target, sure, -sure).astype(np.float32)
        power = sam2loras(torch.tensor(logits), torch.tensor(target))[1].item()
        distances.append(power ** (1 / 0.75))
        if distances[-1] > 1e-6:
            np.testing.assert_allclose(value(logits, target), [power], atol=1e-6)
        else:
            assert 0 < value(logits, target)[0] < power
    assert distances[-3] < 1e-6 < distances[-4] < 2e-6, "both sides of the seam were seen"


def test_the_focal_slope_is_finite_and_continuous_where_it_leaves_the_power():
    target = jnp.ones((1, 4, 4))
    step = jax.jit(
        jax.value_and_grad(lambda sure: focal_tversky(jnp.full((1, 4, 4), sure), target)[0])
    )
    values, slopes = zip(*(step(jnp.float32(sure)) for sure in np.arange(5, 40, 0.05)), strict=True)
    assert np.isfinite(slopes).all()
    assert (np.diff(values) <= 0).all(), "falls all the way, without a jump at the seam"
    assert (np.asarray(slopes)[:200] < 0).all()
    assert values[-1] < 1e-12


@by_region
def test_padding_counts_in_neither_value_nor_gradient(batch, region):
    logits, target, valid = batch
    dirty, wrong = logits.copy(), target.astype(np.float32)
    dirty[~valid] = np.nan
    wrong[~valid] = np.nan

    @jax.jit
    @jax.value_and_grad
    def step(z, y):
        return region(z, y, jnp.array(valid)).sum()

    clean, padded = step(logits, target.astype(np.float32)), step(dirty, wrong)
    np.testing.assert_array_equal(clean[0], padded[0])
    np.testing.assert_array_equal(clean[1], padded[1])
    assert not np.asarray(padded[1])[~valid].any()
    cropped = region(jnp.array(logits[1:2, :, :6]), jnp.array(target[1:2, :, :6]))
    np.testing.assert_allclose(region(*map(jnp.array, batch))[1:2], cropped, rtol=1e-6)


@by_region
@pytest.mark.parametrize("case", ["perfect", "empty", "wrong", "nothing valid"])
def test_gradients_stay_finite(batch, region, case):
    logits, target, valid = batch
    if case == "nothing valid":
        valid = np.zeros_like(valid)
    else:
        target = np.zeros_like(target) if case == "empty" else target
        logits = np.where(target != (case == "wrong"), 1e4, -1e4).astype(np.float32)
    loss, gradient = jax.jit(jax.value_and_grad(lambda z: region(z, target, valid).sum()))(logits)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(loss, 0 if case != "wrong" else B, atol=0.2 * (case == "wrong"))


def test_iou(batch):
    logits, target, valid = batch
    logits[2] = -1  # the target is empty too
    ours = np.asarray(region_losses.mask_iou(*map(jnp.array, batch)))
    for i in range(B):
        a, b = logits[i][valid[i]] > 0, target[i][valid[i]]
        np.testing.assert_allclose(ours[i], (a & b).sum() / max((a | b).sum(), 1), rtol=1e-6)
    assert ours[2] == 0


@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("l2", 2)])
def test_iou_regression_teaches_the_prediction_only(batch, kind, power):
    logits, target, valid = map(jnp.array, batch)
    iou = region_losses.mask_iou(logits, target, valid)
    predicted = iou + jnp.array([0.5, -0.25, 0.125, 0.0])

    @jax.jit
    @partial(jax.grad, argnums=(0, 1), has_aux=True)
    def step(predicted, logits, valid):
        loss = region_losses.iou_regression(predicted, logits, target, valid, kind=kind)
        return loss.sum(), loss

    (to_iou, to_mask), loss = step(predicted, logits, valid)
    np.testing.assert_allclose(loss, np.abs(predicted - iou) ** power, atol=1e-6)
    assert np.isfinite(to_iou).all()
    assert np.asarray(to_iou)[:3].all()
    assert not np.asarray(to_mask).any()
    assert not np.asarray(step(predicted, logits, jnp.zeros_like(valid))[1]).any()


@pytest.fixture
def upstreams(monkeypatch):
    """SAM 2's own loss. Its module asks the trainer, and that half a dozen packages, for a name."""
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "training.trainer", SimpleNamespace(CORE_LOSS_KEY="core"))
    try:
        return importlib.import_module("training.loss_fns").MultiStepMultiMasksAndIous
    except ModuleNotFoundError:
        pytest.skip("sam2 is not installed from its source distribution")


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("m", [M, 1])
def test_multimask_loss_and_gradients_are_sam2s(rng, batch, upstreams, m, scored):
    import torch

    _, target, _ = batch
    logits = 3 * rng.standard_normal((B, m, H, W)).astype(np.float32)
    logits[0, -1] = 8.0 * target[0] - 4  # a good mask that is not the first
    iou, score = rng.random((B, m)).astype(np.float32), rng.standard_normal(B).astype(np.float32)

    theirs = upstreams(
        {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1, "loss_class": 1},
        supervise_all_iou=True,
        iou_use_l1_loss=True,
        pred_obj_scores=scored,
    )
    inputs = [torch.tensor(a, requires_grad=True) for a in (logits, iou, score[:, None])]
    names = "multistep_pred_multimasks_high_res", "multistep_pred_ious"
    outputs = {name: [value] for name, value in zip(names, inputs, strict=False)}
    outputs["multistep_object_score_logits"] = [inputs[2]]
    expected = theirs([outputs], torch.tensor(target)[None])["core"]
    expected.backward()

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2))
    def ours(logits, iou, score):
        return multimask_minimum(logits, iou, score if scored else None, target).mean()

    loss, gradients = ours(logits, iou, score)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    for gradient, tensor in zip(gradients[: 2 + scored], inputs, strict=False):
        np.testing.assert_allclose(gradient, tensor.grad.reshape(gradient.shape), atol=1e-6)


def test_multimask_loss_of_padding(rng, batch):
    _, target, valid = batch
    valid[3] = False
    logits = rng.standard_normal((B, M, H, W)).astype(np.float32)
    dirty = np.where(valid[:, None], logits, np.nan)
    iou, score = rng.random((B, M)).astype(np.float32), rng.standard_normal(B).astype(np.float32)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def step(logits, iou, score):
        loss = multimask_minimum(logits, iou, score, target, valid)
        return loss.sum(), loss

    (to_masks, to_iou, to_score), loss = step(dirty, iou, score)
    np.testing.assert_array_equal(loss, step(logits, iou, score)[1])
    assert loss[3] == 0
    assert not np.asarray(to_score[3]).any()
    assert not np.asarray(to_iou[2:]).any(), "neither without the object nor without a pixel"
    best = np.asarray(to_masks).any((2, 3))
    assert best.sum(1).tolist() == [1, 1, 0, 0], "one mask of each sample learns its shape"
    assert not np.asarray(to_masks)[~np.broadcast_to(valid[:, None], dirty.shape)].any()


def test_what_cannot_be_meant_is_refused():
    z, y = jnp.zeros((2, 4, 5)), jnp.zeros((2, 4, 5), bool)
    for call, message in (
        (lambda: tversky(z, y, smooth=0), "smooth is 0"),
        (lambda: focal_tversky(z, y, gamma=-1), "gamma is -1"),
        (lambda: squared_dice(z, y[:1]), "labels have shape"),
        (lambda: region_losses.iou_regression(z[:, 0, 0], z, y, kind="l3"), "kind is 'l3'"),
        (lambda: region_losses.iou_regression(z[:1, 0, 0], z, y), "predicted has shape"),
        (lambda: multimask_minimum(z, z[:, 0], None, y), r"expected \(b, m, h, w\)"),
        (lambda: multimask_minimum(z[:, None], z[:, :1, 0], z[:1, 0, 0], y), "object_logit has"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
