"""The losses of SAMora's stage 1 against formulas in NumPy; against PyTorch: parity/."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.training.reconstruction_losses import (
    denoising_loss,
    feature_mse,
    mae_loss,
    soft_dice_regression,
)

B, T, V = 3, 7, 12


@pytest.fixture
def patches(rng):
    """Prediction, patches and mask; the last sample has nothing removed."""
    prediction, patches = rng.normal(2, 3, (2, B, T, V)).astype(np.float32)
    mask = np.array([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0], [0] * T], np.float32)
    return prediction, patches, mask


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_loss(patches, norm_pix):
    prediction, target, mask = patches
    expected = []
    for p, y, m in zip(*patches, strict=True):
        errors = []
        for i in np.flatnonzero(m):
            wanted = y[i].astype(np.float64)
            if norm_pix:
                variance = ((wanted - wanted.mean()) ** 2).sum() / (V - 1)
                wanted = (wanted - wanted.mean()) / np.sqrt(variance + 1e-6)
            errors.append(((p[i] - wanted) ** 2).mean())
        expected.append(np.mean(errors) if errors else 0)
    ours = mae_loss(prediction, target, mask, norm_pix=norm_pix)
    assert ours.shape == (B,)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_mae_loss_of_a_plain_patch(patches):
    """A patch of one colour has no variance: its standardised numbers are 0."""
    prediction, target, mask = patches
    loss = mae_loss(jnp.asarray(prediction), jnp.full_like(target, 3.0), mask)
    errors = (prediction**2).mean(-1)
    np.testing.assert_allclose(loss[0], errors[0][mask[0] > 0].mean(), rtol=1e-5)


def test_mae_gradient_reaches_removed_patches_only(patches):
    step = jax.jit(jax.grad(lambda p: mae_loss(p, *patches[1:]).sum()))
    gradient = step(jnp.asarray(patches[0]))
    reached = np.abs(gradient).max(-1) > 0
    np.testing.assert_array_equal(reached, patches[2] > 0)


def test_soft_dice_regression(rng):
    p, y = rng.random((2, B, 5, 6, 3))
    y[2] = 0
    axes = (1, 2, 3)
    expected = 1 - (2 * (p * y).sum(axes) + 1e-5) / (p.sum(axes) + y.sum(axes) + 1e-5)
    np.testing.assert_allclose(
        soft_dice_regression(jnp.array(p), jnp.array(y)), expected, rtol=1e-5
    )
    nothing = jnp.zeros((1, 4))
    assert soft_dice_regression(nothing, nothing).tolist() == [0]
    binary = jnp.array([[0.0, 1, 1, 0]])
    np.testing.assert_allclose(soft_dice_regression(binary, binary), [0], atol=1e-6)


def test_soft_dice_prefers_a_thresholded_image():
    y = jnp.array([[0.1, 0.3, 0.6, 0.9]])
    itself, thresholded = (soft_dice_regression(p, y)[0] for p in (y, (y > 0.4) * 1.0))
    np.testing.assert_allclose(itself, 1 - 2 * 1.27 / 3.8, rtol=1e-4)
    np.testing.assert_allclose(thresholded, 1 - 2 * 1.5 / 3.9, rtol=1e-4)
    assert thresholded < itself


def test_denoising_loss(rng):
    p, y = (jnp.asarray(a, jnp.float32) for a in rng.random((2, B, 5, 6, 3)))
    squared = ((np.asarray(p) - np.asarray(y)) ** 2).mean((1, 2, 3))
    dice = soft_dice_regression(p, y)
    np.testing.assert_allclose(denoising_loss(p, y), 0.9 * dice + 0.1 * squared, rtol=1e-6)
    np.testing.assert_allclose(denoising_loss(p, y, dice_weight=0), squared, rtol=1e-6)


def test_feature_mse(rng):
    a, b = rng.normal(0, 2, (2, B, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(feature_mse(a, b), ((a - b) ** 2).mean((1, 2)), rtol=1e-5)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    ours = feature_mse(jnp.asarray(a), jnp.asarray(b), normalise=True)
    # |u - v|² = 2 - 2 cos of unit vectors, here of 5 numbers
    np.testing.assert_allclose(ours, (2 - 2 * cosine).mean(1) / 5, rtol=1e-5)


def test_feature_mse_of_a_vector_without_length():
    a, b = jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3))
    step = jax.jit(jax.value_and_grad(lambda a: feature_mse(a, b, normalise=True).sum()))
    loss, gradient = step(a)
    np.testing.assert_allclose(loss, 1 / 3, rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", [soft_dice_regression, denoising_loss, feature_mse])
def test_bfloat16_is_summed_in_float32(rng, loss):
    p, y = (jnp.asarray(a, jnp.bfloat16) for a in rng.random((2, B, 40, 50)))
    ours = loss(p, y)
    assert ours.dtype == jnp.float32
    exact = loss(p.astype(jnp.float32), y.astype(jnp.float32))
    np.testing.assert_allclose(ours, exact, rtol=1e-6)


def test_what_cannot_be_meant_is_refused(patches):
    prediction, target, mask = patches
    for call, message in (
        (lambda: mae_loss(prediction[:, 1:], target, mask), r"shapes \(3, 6, 12\) and \(3, 7, 12"),
        (lambda: mae_loss(prediction, target, mask[:, 1:]), r"mask has shape \(3, 6\), expected"),
        (lambda: feature_mse(prediction, target[:1]), "expected the same"),
        (lambda: denoising_loss(prediction, target, dice_weight=2), "dice_weight is 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
