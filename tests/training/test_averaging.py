import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.training.averaging import init_average, update_average


def test_average_of_a_walk(rng):
    """Against the weighted mean that the recursion stands for, over more steps than the warmup."""
    decay, steps = 0.95, 300
    walk = rng.standard_normal((steps + 1, 5)).astype(np.float32)

    def body(average, part):
        params, count = part
        return update_average(average, {"w": params}, count, decay), None

    start = init_average({"w": jnp.array(walk[0])})
    average, _ = jax.jit(lambda *a: jax.lax.scan(body, *a))(
        start, (jnp.array(walk[1:]), jnp.arange(steps))
    )
    decays = np.minimum(decay, (1 + np.arange(steps)) / (10 + np.arange(steps)))
    kept = np.append(np.cumprod(decays[::-1])[::-1], 1)  # what is left of the average before step n
    weights = np.append(kept[0], (1 - decays) * kept[1:])
    np.testing.assert_allclose(weights.sum(), 1)
    np.testing.assert_allclose(average["w"], weights @ walk.astype(np.float64), atol=1e-6)


def test_small_changes_of_bfloat16_parameters_are_not_lost():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    average = update_average(init_average(params), {"w": params["w"] * 1.125}, 10**6, 0.999)
    np.testing.assert_allclose(average["w"], 1.000125, rtol=1e-6)


def test_the_average_is_a_copy():
    params = {"w": jnp.ones(3)}
    average = init_average(params)
    jax.jit(lambda p: p, donate_argnums=0)(params)
    assert average["w"].sum() == 3


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay is {decay}"):
        update_average({}, {}, 0, decay)
