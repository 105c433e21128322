import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.training.schedules import (
    by_name,
    constant,
    cosine_restarts,
    warmup_cosine,
    warmup_poly,
)


def values(schedule, steps):
    """As a jitted step has them: for int32 counts."""
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps, dtype=jnp.int32)))


def test_cosine_warms_up_and_decays():
    rates = values(warmup_cosine(1.0, 100, 10), 101)
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10, rtol=1e-6)
    expected = (1 + np.cos(np.pi * np.arange(91) / 90)) / 2
    np.testing.assert_allclose(rates[10:], expected, atol=1e-6)
    assert float(warmup_cosine(1.0, 1, 10)(0)) == 1.0, "a run shorter than its warmup"


@pytest.mark.parametrize(("warmup", "steps"), [(250, 1000), (25, 140), (1, 30), (0, 30), (50, 20)])
def test_poly_is_sameds_loop(warmup, steps):
    """trainer.py: the optimizer is made with b_lr, and the rate is set after each step."""
    base_lr, used = 0.005, []
    rate = base_lr / warmup if warmup else base_lr
    for iter_num in range(steps):
        used.append(rate)  # optimizer.step()
        if warmup and iter_num < warmup:
            rate = base_lr * ((iter_num + 1) / warmup)
        else:
            shift_iter = iter_num - warmup if warmup else iter_num
            rate = base_lr * (1.0 - shift_iter / steps) ** 0.9
    ours = values(warmup_poly(base_lr, steps, warmup), steps)
    np.testing.assert_allclose(ours / base_lr, np.array(used) / base_lr, atol=1e-6)


@pytest.mark.parametrize("multiplier", [1, 2, 3])
def test_restarts_are_torchs(multiplier):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        optimizer, T_0=7, T_mult=multiplier, eta_min=0.1
    )
    used = []
    for _ in range(300):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    ours = values(cosine_restarts(1.0, 7, 0.1, multiplier), 300)
    np.testing.assert_allclose(ours, used, atol=1e-6)


def test_constant_and_counts_after_the_end():
    np.testing.assert_allclose(values(constant(2.0, 4), 6), [0.5, 1, 1.5, 2, 2, 2], rtol=1e-6)
    assert float(constant(2.0)(0)) == 2
    for schedule in (warmup_cosine(1.0, 20, 5), warmup_poly(1.0, 20, 5)):
        assert float(schedule(10**6)) == 0
    for schedule in (cosine_restarts(1.0, 3), cosine_restarts(1.0, 3, multiplier=2)):
        assert 0 <= float(schedule(2**31 - 1)) <= 1


def test_names():
    for name, schedule in (
        ("cosine", warmup_cosine(0.1, 50, 0)),
        ("poly", warmup_poly(0.1, 50, 0, 7.0)),
        ("restarts", cosine_restarts(0.1, 9)),
        ("constant", constant(0.1)),
    ):
        named = by_name(name, 0.1, 50, 0, power=7.0, period=9)
        np.testing.assert_array_equal(values(named, 50), values(schedule, 50))
    with pytest.raises(ValueError, match="the schedule is 'linear', expected cosine"):
        by_name("linear", 0.1, 50, 5)
    with pytest.raises(ValueError, match="warmup is 5, expected 0"):
        by_name("restarts", 0.1, 50, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: warmup_cosine(-1.0, 10, 2), r"peak is -1\.0"),
        (lambda: warmup_cosine(1.0, -10, 2), "steps is -10"),
        (lambda: warmup_poly(float("nan"), 10), "peak is nan"),
        (lambda: warmup_poly(1.0, 10, power=-0.9), r"power is -0\.9"),
        (lambda: cosine_restarts(1.0, 0), "period is 0"),
        (lambda: cosine_restarts(1.0, 5, multiplier=0), "multiplier 0"),
        (lambda: constant(1.0, -3), "warmup is -3"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
