"""Resizing and windows; PyTorch judges the resizing where it is installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from samjax.models import ops

SIZES = [  # (height, width) from and to: up, down, mixed, odd, and to or from a single pixel
    ((6, 10), (23, 41)),
    ((64, 48), (17, 9)),
    ((30, 20), (11, 77)),
    ((256, 171), (64, 256)),
    ((5, 1), (13, 4)),
    ((9, 7), (1, 1)),
    ((8, 12), (8, 31)),
    ((37, 256), (600, 1100)),  # far from the origin a float32 position has few digits left
]


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_resize_on_host_equals_device(rng, size, target):
    x = rng.normal(size=(2, 3, *size)).astype(np.float32)
    device = np.asarray(ops.resize_bilinear(jnp.asarray(x), target))
    host = ops.resize_bilinear_numpy(x, target)
    assert device.shape == host.shape == (2, 3, *target)
    assert host.dtype == np.float32
    np.testing.assert_allclose(device, host, atol=1e-6)


@pytest.mark.parametrize(("size", "target"), SIZES)
def test_resize_equals_torch(rng, size, target):
    torch = pytest.importorskip("torch")
    x = rng.normal(size=(2, 3, *size)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x), size=target, mode="bilinear", align_corners=False
    ).numpy()
    np.testing.assert_allclose(ops.resize_bilinear_numpy(x, target), expected, atol=2e-6)
    np.testing.assert_allclose(ops.resize_bilinear(jnp.asarray(x), target), expected, atol=2e-6)


def test_resize_to_the_same_size_changes_nothing(rng):
    x = rng.normal(size=(4, 6, 9)).astype(np.float32)
    np.testing.assert_array_equal(ops.resize_bilinear(jnp.asarray(x), (6, 9)), x)
    np.testing.assert_array_equal(ops.resize_bilinear_numpy(x, (6, 9)), x)


@pytest.mark.parametrize(("size_in", "size_out"), [(6, 23), (64, 17), (7, 7), (1, 5), (5, 1)])
def test_linear_weights(size_in, size_out):
    low, high, weight = ops.linear_weights(size_in, size_out)
    assert low.shape == high.shape == weight.shape == (size_out,)
    assert (low >= 0).all()
    assert (high < size_in).all()
    assert (high - low <= 1).all()
    assert (weight >= 0).all()
    assert (weight <= 1).all()
    matrix = ops.linear_matrix(size_in, size_out)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)


def test_windows_hold_what_they_cover(rng):
    x = rng.normal(size=(2, 5, 8, 3)).astype(np.float32)
    windows, padded = ops.partition_windows(jnp.asarray(x), 3)
    assert padded == (6, 9)
    assert windows.shape == (2 * 2 * 3, 3, 3, 3)
    expected = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    for image in range(2):
        for row in range(2):
            for column in range(3):
                np.testing.assert_array_equal(
                    windows[image * 6 + row * 3 + column],
                    expected[image, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3],
                )


@pytest.mark.parametrize(("grid", "window"), [((5, 8), 3), ((6, 9), 3), ((2, 3), 4), ((7, 4), 1)])
def test_merging_undoes_partitioning(rng, grid, window):
    x = rng.normal(size=(2, *grid, 3)).astype(np.float32)
    windows, padded = ops.partition_windows(jnp.asarray(x), window)
    np.testing.assert_array_equal(ops.merge_windows(windows, padded, grid), x)


def test_relative_index():
    index = ops.relative_index(4)
    assert index.min() == 0
    assert index.max() == 6
    for query in range(4):
        for key in range(4):
            assert index[query, key] == query - key + 3
