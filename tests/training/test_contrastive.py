"""NT-Xent, LARS as upstream has it, and a step that takes over the statistics of norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from samjax.training.contrastive import (
    make_contrastive_step,
    nt_xent,
    scaled_learning_rate,
    simclr_optimizer,
    with_statistics,
)
from samjax.training.loop import fit, init_state
from samjax.trees import flatten

KEY = jax.random.key(0)


def loss_of_view(views: np.ndarray, i: int, j: int, temperature: float) -> float:
    """The paper's ℓ(i, j), equation 1."""
    unit = views / np.linalg.norm(views, axis=1, keepdims=True)
    similar = np.exp(unit @ unit[i] / temperature)
    return -np.log(similar[j] / (similar.sum() - similar[i]))


def test_nt_xent_is_the_papers(rng):
    b, temperature = 5, 0.3
    views = rng.normal(0, 3, (2 * b, 4))
    found = nt_xent(*jnp.split(jnp.asarray(views, jnp.float32), 2), temperature)
    losses = [loss_of_view(views, i, (i + b) % (2 * b), temperature) for i in range(2 * b)]
    np.testing.assert_allclose(found, np.reshape(losses, (2, b)).mean(0), rtol=2e-6)
    np.testing.assert_allclose(found.mean(), np.mean(losses), rtol=1e-6)


def test_nt_xent_knows_neither_length_nor_order(rng):
    z1, z2 = jnp.asarray(rng.normal(0, 1, (2, 4, 3)), jnp.float32)
    expected = nt_xent(z1, z2)
    np.testing.assert_allclose(nt_xent(7 * z1, 0.1 * z2), expected, rtol=1e-5)
    np.testing.assert_allclose(nt_xent(z2, z1), expected, rtol=1e-5)
    np.testing.assert_allclose(nt_xent(z1[::-1], z2[::-1]), expected[::-1], rtol=1e-5)


def test_nt_xent_of_perfect_and_of_empty_projections():
    apart = jnp.eye(3)
    np.testing.assert_allclose(nt_xent(apart, apart), np.log(1 + 4 * np.exp(-10)), atol=1e-6)
    equal = jnp.zeros((3, 2))
    np.testing.assert_allclose(nt_xent(equal, equal), np.log(5), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda z: nt_xent(z, z).sum())(equal)).all()
    rough = nt_xent(apart.astype(jnp.bfloat16), apart.astype(jnp.bfloat16))
    assert rough.dtype == jnp.float32


@pytest.mark.parametrize(
    ("shapes", "temperature", "complaint"),
    [
        (((3, 2), (4, 2)), 0.1, r"\(3, 2\) and \(4, 2\), expected twice the same"),
        (((1, 2), (1, 2)), 0.1, "b of 2 or more"),
        (((3,), (3,)), 0.1, "expected twice the same"),
        (((3, 2), (3, 2)), 0.0, "temperature is 0.0"),
        (((3, 2), (3, 2)), float("nan"), "temperature is nan"),
    ],
)
def test_nt_xent_refuses(shapes, temperature, complaint):
    with pytest.raises(ValueError, match=complaint):
        nt_xent(*(jnp.ones(shape) for shape in shapes), temperature)


def tree(rng) -> dict:
    def leaf(*shape):
        return jnp.asarray(rng.normal(0, 1, shape), jnp.float32)

    norm = {"scale": leaf(3), "bias": leaf(3), "mean": leaf(3), "variance": leaf(3)}
    return {"0": {"kernel": leaf(2, 3), "norm": norm}, "1": {"kernel": jnp.zeros((3, 4))}}


def upstream_step(params, momenta, gradients, rate, decay):
    """LARSOptimizer.apply_gradients with classic momentum, in float64."""
    for path, w in params.items():
        if path.endswith(("mean", "variance")):
            continue
        g, trust = gradients[path], 1.0
        if path.endswith("kernel"):
            g = g + decay * w
            sizes = np.linalg.norm(w), np.linalg.norm(g)
            trust = 0.001 * sizes[0] / sizes[1] if min(sizes) > 0 else 1.0
        momenta[path] = 0.9 * momenta[path] + rate * trust * g
        params[path] = w - momenta[path]


def test_optimizer_is_upstreams(rng):
    """Also for a kernel that is zero, a changing rate, and gradients of the statistics."""
    params, rates = tree(rng), np.array([0.5, 2.0, 0.1, 0.7])
    optimizer = simclr_optimizer(lambda count: jnp.asarray(rates, jnp.float32)[count], 0.3)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    expected = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}
    momenta = {path: np.zeros_like(leaf) for path, leaf in expected.items()}
    for rate in rates:
        gradients = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(0, 1, x.shape), jnp.float32), params
        )
        upstream_step(expected, momenta, flatten(gradients), rate, 0.3)
        updates, state = update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for path, leaf in flatten(params).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)
    sizes = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape]
    assert sorted(sizes) == [(2, 3), (3,), (3,), (3, 4)]  # no momentum of statistics


def test_optimizer_knows_all_names(rng):
    with pytest.raises(ValueError, match="no rule for 0/gamma"):
        simclr_optimizer(0.1).init({**tree(rng), "0": {"gamma": jnp.ones(3)}})


def test_learning_rates_meet_at_4096():
    assert scaled_learning_rate(4096) == pytest.approx(4.8)
    assert scaled_learning_rate(4096, "sqrt") == pytest.approx(4.8)
    assert scaled_learning_rate(256) == pytest.approx(0.3)
    assert scaled_learning_rate(256, "sqrt") == pytest.approx(1.2)
    with pytest.raises(ValueError, match="scaling is 'cubic'"):
        scaled_learning_rate(256, "cubic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size is 0"):
        scaled_learning_rate(0)


def test_statistics_replace_and_add_nothing():
    params = {"a": {"mean": 1, "kernel": 2}, "b": {"mean": 3}}
    assert with_statistics(params, {"b": {"mean": 4}}) == {
        "a": {"mean": 1, "kernel": 2},
        "b": {"mean": 4},
    }
    with pytest.raises(ValueError, match="lack these statistics: a/variance, c"):
        with_statistics(params, {"a": {"variance": 1}, "c": 2})


def project(params, images):
    """A linear map of mean colours, which counts what it has seen."""
    norm = params["0"]["norm"]
    z = images.mean((1, 2)) @ params["0"]["kernel"] + norm["bias"][None]
    seen = {"mean": norm["mean"] + len(images), "variance": norm["variance"]}
    return z, {"0": {"norm": seen}}


@pytest.fixture
def linear(rng) -> dict:
    kernel = jnp.asarray(rng.normal(0, 1, (3, 5)), jnp.float32)
    zeros = {name: jnp.zeros(5) for name in ("scale", "bias", "mean", "variance")}
    return {"0": {"kernel": kernel, "norm": zeros}}


@pytest.fixture
def batch(rng) -> dict:
    view1 = rng.normal(0, 1, (6, 2, 3, 3)).astype(np.float32)
    return {"view1": view1, "view2": view1 + rng.normal(0, 0.5, view1.shape).astype(np.float32)}


def test_steps_learn_and_take_over_statistics(linear, batch):
    optimizer = simclr_optimizer(0.01)  # the bias has plain momentum, and swings at larger rates
    step = make_contrastive_step(project, optimizer)
    state, losses = init_state(linear, optimizer, average=True), []
    state = fit(
        state,
        None,
        step,
        [batch] * 30,
        steps=30,
        key=KEY,
        arrays=("view1", "view2"),
        on_step=lambda _, metrics: losses.append(metrics["loss"]),
        progress=False,
    )
    first = nt_xent(*(project(linear, batch[name])[0] for name in ("view1", "view2"))).mean()
    assert losses[0] == pytest.approx(float(first), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    norm = state.trainable["0"]["norm"]
    np.testing.assert_array_equal(norm["mean"], 30 * 12)  # both views at once, every step
    np.testing.assert_array_equal(norm["variance"], 0)
    assert int(state.step) == 30
    assert 0 < float(state.tuned["0"]["norm"]["mean"][0]) < 30 * 12


def test_summed_is_twice(linear, batch):
    optimizer = simclr_optimizer(0.1)
    results = []
    for summed in (False, True):
        step = make_contrastive_step(project, optimizer, summed=summed)
        results.append(step(init_state(linear, optimizer), None, batch, KEY))
    (once, once_metrics), (twice, twice_metrics) = results
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(twice_metrics[name], 2 * once_metrics[name], rtol=1e-5)
    moved = [state.trainable["0"]["norm"]["bias"] for state in (once, twice)]
    np.testing.assert_allclose(moved[1], 2 * moved[0], rtol=1e-4, atol=1e-7)
