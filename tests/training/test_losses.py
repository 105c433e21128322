from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from samjax.training import losses

# Compiled whole: op by op takes several times as long.
binary_cross_entropy = jax.jit(losses.binary_cross_entropy)
binary_dice = jax.jit(losses.binary_dice)
multiclass_cross_entropy = jax.jit(losses.multiclass_cross_entropy)
multiclass_dice = jax.jit(losses.multiclass_dice)
segmentation_loss = jax.jit(losses.segmentation_loss, static_argnames="dice_weight")

B, H, W, CLASSES = 3, 7, 10, 4
PARTS = {
    "binary": (binary_cross_entropy, binary_dice),
    "multiclass": (multiclass_cross_entropy, multiclass_dice),
}


def _batch(rng, kind):
    """Logits, labels and a valid area like the pipeline's: something cut off at right and below."""
    shape = (B, H, W) if kind == "binary" else (B, H, W, CLASSES)
    logits = 3 * rng.standard_normal(shape).astype(np.float32)
    labels = rng.integers(0, 2 if kind == "binary" else CLASSES, (B, H, W))
    valid = np.ones((B, H, W), bool)
    valid[0, 5:], valid[1, :, 6:] = False, False
    return logits, labels, valid


@pytest.fixture(params=list(PARTS))
def kind(request):
    return request.param


def test_binary_formulas(rng):
    logits, labels, valid = _batch(rng, "binary")
    dice = binary_dice(*map(jnp.array, (logits, labels, valid)))
    entropy = binary_cross_entropy(*map(jnp.array, (logits, labels, valid)))
    for i in range(B):
        z, y = logits[i][valid[i]].astype(np.float64), labels[i][valid[i]]
        p = special.expit(z)
        expected = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
        np.testing.assert_allclose(dice[i], expected, atol=1e-6)
        expected = -(y * np.log(p) + (1 - y) * np.log1p(-p)).mean()
        np.testing.assert_allclose(entropy[i], expected, rtol=1e-6)


def test_multiclass_formulas(rng):
    logits, labels, valid = _batch(rng, "multiclass")
    dice = multiclass_dice(*map(jnp.array, (logits, labels, valid)))
    entropy = multiclass_cross_entropy(*map(jnp.array, (logits, labels, valid)))
    for i in range(B):
        z, y = logits[i][valid[i]].astype(np.float64), np.eye(CLASSES)[labels[i][valid[i]]]
        p = special.softmax(z, axis=-1)
        per_class = 1 - (2 * (p * y).sum(0) + 1e-5) / ((p**2).sum(0) + (y**2).sum(0) + 1e-5)
        np.testing.assert_allclose(dice[i], per_class.mean(), atol=1e-6)
        np.testing.assert_allclose(entropy[i], -(y * np.log(p)).sum(-1).mean(), rtol=1e-6)


def test_against_torch_and_monai(rng, kind):
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.losses")
    logits, labels, _ = _batch(rng, kind)
    entropy, dice = (part(jnp.array(logits), jnp.array(labels)) for part in PARTS[kind])
    z, y = torch.tensor(logits), torch.tensor(labels)
    if kind == "binary":
        z, y = z[:, None], y[:, None].float()
        theirs = monai.DiceLoss(sigmoid=True, smooth_nr=1, smooth_dr=1, reduction="none")
        their_entropy = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none")
    else:
        z, y = z.movedim(-1, 1), y[:, None]
        theirs = monai.DiceLoss(
            softmax=True,
            to_onehot_y=True,
            squared_pred=True,
            smooth_nr=1e-5,
            smooth_dr=1e-5,
            reduction="none",
        )
        their_entropy = torch.nn.functional.cross_entropy(z, y[:, 0], reduction="none")
    np.testing.assert_allclose(dice, theirs(z, y).flatten(1).mean(1), atol=1e-6)
    np.testing.assert_allclose(entropy, their_entropy.flatten(1).mean(1), rtol=1e-6)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (None, 1.5)])
def test_focal_loss_against_monai(rng, alpha, gamma):
    torch = pytest.importorskip("torch")
    monai = pytest.importorskip("monai.losses")
    logits, labels, _ = _batch(rng, "binary")
    ours = jax.jit(partial(losses.focal_loss, alpha=alpha, gamma=gamma))(
        jnp.array(logits), jnp.array(labels)
    )
    z, y = torch.tensor(logits)[:, None], torch.tensor(labels)[:, None].float()
    theirs = monai.FocalLoss(alpha=alpha, gamma=gamma, reduction="none")(z, y)
    np.testing.assert_allclose(ours, theirs.flatten(1).mean(1), atol=1e-6)


def test_focal_loss_of_extreme_logits_and_padding():
    logits = jnp.array([[[1e4, -1e4, jnp.nan]], [[-1e4, 1e4, jnp.nan]]])
    labels, valid = jnp.array([[[1, 0, 255]]] * 2), jnp.array([[[True, True, False]]] * 2)
    step = jax.jit(jax.value_and_grad(lambda z: losses.focal_loss(z, labels, valid).sum()))
    loss, gradient = step(logits)
    np.testing.assert_allclose(loss, (0.25 * 1e4 + 0.75 * 1e4) / 2, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert not np.asarray(gradient[..., 2]).any()


def test_one_sample_equals_sameds_sum_over_the_batch(rng):
    torch = pytest.importorskip("torch")
    logits, labels, _ = _batch(rng, "multiclass")
    p = torch.softmax(torch.tensor(logits[:1]).double(), -1)
    y = torch.nn.functional.one_hot(torch.tensor(labels[:1]), CLASSES)
    total = 0.0
    for c in range(CLASSES):
        both, squares = (p[..., c] * y[..., c]).sum(), (p[..., c] ** 2 + y[..., c] ** 2).sum()
        total += 1 - (2 * both + 1e-5) / (squares + 1e-5)
    entropy = torch.nn.functional.cross_entropy(
        torch.tensor(logits[:1]).movedim(-1, 1), torch.tensor(labels[:1])
    )
    expected = 0.2 * entropy + 0.8 * total / CLASSES
    ours = segmentation_loss(jnp.array(logits[:1]), jnp.array(labels[:1]))
    np.testing.assert_allclose(ours, [expected.item()], atol=1e-6)


def test_micro_batches_average_to_the_big_batch(rng, kind):
    logits, labels, valid = map(jnp.array, _batch(rng, kind))

    def mean(*arrays):
        return segmentation_loss(*arrays).mean()

    step = jax.jit(jax.value_and_grad(mean))
    loss, gradient = step(logits, labels, valid)
    rows = [slice(i, i + 1) for i in range(B)]
    parts = [step(logits[row], labels[row], valid[row]) for row in rows]
    np.testing.assert_allclose(loss, np.mean([part[0] for part in parts]), rtol=1e-6)
    joined = np.concatenate([part[1] for part in parts]) / B
    np.testing.assert_allclose(gradient, joined, atol=1e-8)


def test_padding_counts_in_neither_value_nor_gradient(rng, kind):
    logits, labels, valid = _batch(rng, kind)
    dirty, wrong = logits.copy(), labels.copy()
    dirty[~valid] = np.nan
    wrong[~valid] = 255

    @jax.jit
    @jax.value_and_grad
    def step(z, y):
        return segmentation_loss(z, y, jnp.array(valid)).sum()

    clean = step(jnp.array(logits), jnp.array(labels))
    padded = step(jnp.array(dirty), jnp.array(wrong))
    np.testing.assert_array_equal(clean[0], padded[0])
    np.testing.assert_array_equal(clean[1], padded[1])
    assert not np.asarray(padded[1])[~valid].any()
    assert np.asarray(padded[1])[valid].all()

    cropped = segmentation_loss(jnp.array(logits[1:2, :, :6]), jnp.array(labels[1:2, :, :6]))
    whole = segmentation_loss(jnp.array(logits), jnp.array(labels), jnp.array(valid))
    np.testing.assert_allclose(whole[1:2], cropped, rtol=1e-6)


def test_without_valid_pixels_nothing_is_lost_or_learned(rng, kind):
    logits, labels, valid = map(jnp.array, _batch(rng, kind))
    loss, gradient = jax.value_and_grad(
        lambda z: segmentation_loss(z, labels, jnp.zeros_like(valid)).sum()
    )(logits)
    assert loss == 0
    assert not np.asarray(gradient).any()


def test_extreme_logits_stay_finite(rng, kind):
    logits, labels, valid = map(jnp.array, _batch(rng, kind))
    loss, gradient = jax.value_and_grad(lambda z: segmentation_loss(z, labels, valid).sum())(
        1e4 * logits
    )
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


def test_a_perfect_prediction_costs_nothing(rng, kind):
    _, labels, valid = _batch(rng, kind)
    logits = np.where(labels, 50.0, -50.0) if kind == "binary" else 50 * np.eye(CLASSES)[labels]
    loss = segmentation_loss(*map(jnp.array, (logits.astype(np.float32), labels, valid)))
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32(kind):
    # 3 · 2^14 equal pixels: a bfloat16 sum would stop growing at 256.
    shape = (1, 128, 384)
    labels = np.zeros(shape, np.int32)
    labels[:, :, :128] = 1
    logits = np.full(shape, 0.25, np.float32)
    logits = logits if kind == "binary" else np.stack([-logits, logits], axis=-1)
    exact = segmentation_loss(jnp.array(logits), jnp.array(labels))
    half = segmentation_loss(jnp.array(logits, jnp.bfloat16), jnp.array(labels))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, exact, rtol=1e-6)


def test_a_large_picture_sums_precisely(rng):
    logits = rng.standard_normal((1, 1024, 1024)).astype(np.float32)
    labels = rng.random((1, 1024, 1024)) < 0.1
    p = special.expit(logits.astype(np.float64))
    dice = 1 - (2 * (p * labels).sum() + 1) / (p.sum() + labels.sum() + 1)
    entropy = np.logaddexp(0, logits.astype(np.float64)).mean() - (logits * labels).mean(
        dtype=np.float64
    )
    np.testing.assert_allclose(binary_dice(jnp.array(logits), jnp.array(labels)), [dice], rtol=1e-6)
    ours = binary_cross_entropy(jnp.array(logits), jnp.array(labels))
    np.testing.assert_allclose(ours, [entropy], rtol=2e-6)


def test_the_weight_mixes_both_parts(rng, kind):
    arrays = [*map(jnp.array, _batch(rng, kind))]
    entropy, dice = (part(*arrays) for part in PARTS[kind])
    for weight, expected in ((0, entropy), (1, dice), (0.8, 0.2 * entropy + 0.8 * dice)):
        loss = segmentation_loss(*arrays, dice_weight=weight)
        assert loss.shape == (B,)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_unknown_labels_show_as_nan(rng, label):
    logits, labels, valid = _batch(rng, "multiclass")
    labels[0, 0, 0] = label
    loss = segmentation_loss(*map(jnp.array, (logits, labels, valid)))
    assert np.isnan(loss).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("logits", "labels", "valid", "message"),
    [
        ((2, 4, 5), (2, 4, 6), None, r"labels have shape \(2, 4, 6\), logits \(2, 4, 5\)"),
        ((2, 4, 5), (2, 4, 5), (2, 4, 1), r"valid has shape \(2, 4, 1\)"),
        ((2, 4, 5, 1), (2, 4, 5), None, "k > 0"),
        ((4, 5), (4, 5), None, "expected"),
        ((2, 3, 4, 5, 6), (2, 3, 4, 5), None, "expected"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits, labels, valid, message):
    valid = None if valid is None else jnp.ones(valid, bool)
    with pytest.raises(ValueError, match=message):
        segmentation_loss(jnp.zeros(logits), jnp.zeros(labels, jnp.int32), valid)


@pytest.mark.parametrize("part", ["binary_cross_entropy", "binary_dice", "focal_loss"])
def test_binary_losses_refuse_several_logits_per_pixel(part):
    with pytest.raises(ValueError, match=r"shape \(2, 4, 5, 3\), expected \(b, h, w\)"):
        getattr(losses, part)(jnp.zeros((2, 4, 5, 3)), jnp.zeros((2, 4, 5), jnp.int32))


def test_float_labels_and_bad_weights_are_refused():
    with pytest.raises(ValueError, match="labels are float32, expected integers"):
        segmentation_loss(jnp.zeros((1, 2, 3, 4)), jnp.zeros((1, 2, 3)))
    with pytest.raises(ValueError, match=r"dice_weight is 1\.5"):
        segmentation_loss(jnp.zeros((1, 2, 3)), jnp.zeros((1, 2, 3)), dice_weight=1.5)


def test_a_weighted_sum_is_sameds_loss(rng, kind):
    arrays = [*map(jnp.array, _batch(rng, kind))]
    parts = {"binary": (losses.binary_cross_entropy, losses.binary_dice)}
    parts["multiclass"] = losses.multiclass_cross_entropy, losses.multiclass_dice
    entropy, dice = parts[kind]
    total = jax.jit(losses.weighted_sum({"entropy": (0.2, entropy), "dice": (0.8, dice)}))
    np.testing.assert_allclose(total(*arrays), segmentation_loss(*arrays), rtol=1e-6)
    np.testing.assert_allclose(total(*arrays[:2]), segmentation_loss(*arrays[:2]), rtol=1e-6)


def test_a_weighted_sum_refuses_what_cannot_be_meant():
    with pytest.raises(ValueError, match="at least one"):
        losses.weighted_sum({})
    for weight in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"the weight of dice is {weight}"):
            losses.weighted_sum({"dice": (weight, losses.binary_dice)})
