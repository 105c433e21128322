"""Moments in 8 bits: bitsandbytes' code, how far it is off, and optimizers that do not mind."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from samjax.peft.eight_bit import Quantised, dequantise, dynamic_map, eight_bit, quantise
from samjax.peft.galore import galore, scale_by_galore

BLOCK = 16
# A decade with n values is cut into intervals of 0.9 / n of its upper end; half of one is lost.
# The upmost decade has the largest, with n 64, or 128 without a sign.
ERROR = {True: 0.9 / 64 / 2, False: 0.9 / 128 / 2}  # of the largest magnitude


def leaves_of(state):
    return jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Quantised))


def nbytes(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def there_and_back(values, *, signed, block=BLOCK):
    quantised = quantise(jnp.asarray(values), signed=signed, block=block)
    assert quantised.codes.dtype == jnp.uint8
    assert quantised.codes.shape == values.shape
    assert quantised.scales.dtype == jnp.float32
    assert quantised.scales.shape == (-(-values.size // block),)
    return np.asarray(dequantise(quantised, signed=signed, block=block))


def test_the_code_as_published():
    """Section 2.2 and figure 2 of the paper: values from 1e-7 to 1, ever denser; no two alike."""
    for signed in (True, False):
        table = dynamic_map(signed)
        assert table.shape == (256,)
        assert table.dtype == np.float32
        assert (np.diff(table) > 0).all()
        assert 0 in table
        assert table[-1] == 1
    np.testing.assert_allclose(dynamic_map(True)[[0, 128, 129]], [-0.99296875, 5.5e-7, 3.25e-6])
    np.testing.assert_allclose(dynamic_map(False)[[1, 2, -2]], [3.25e-7, 7.75e-7, 0.996484375])
    np.testing.assert_array_equal(dynamic_map(True)[:127], -dynamic_map(True)[-2:127:-1])


@pytest.mark.parametrize("signed", [True, False])
def test_bitsandbytes_has_the_same_code(rng, signed):
    """Its CPU kernel looks quotients up on a grid: close, but not always the nearest value."""
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("bitsandbytes.functional")
    code = theirs.create_dynamic_map(signed)
    np.testing.assert_allclose(dynamic_map(signed), code.numpy(), rtol=2e-7)
    values = rng.normal(size=(130, 97)).astype("f")
    values = values if signed else values**2
    codes, state = theirs.quantize_blockwise(torch.from_numpy(values), code=code, blocksize=256)
    ours = quantise(jnp.asarray(values), signed=signed)
    np.testing.assert_array_equal(ours.scales, state.absmax)
    their_values = theirs.dequantize_blockwise(codes, state).numpy()
    our_values = np.asarray(dequantise(ours, signed=signed))
    assert (codes.numpy() == np.asarray(ours.codes)).mean() > 0.95
    assert np.abs(our_values - values).sum() <= np.abs(their_values - values).sum() * (1 + 1e-6)


@settings(deadline=None, max_examples=40)
@given(
    arrays(
        np.float32,
        st.sampled_from([(48,), (3, 16), (2, 5, 5), (1,)]),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    ),
    st.booleans(),
)
def test_how_far_a_value_can_be_off(values, signed):
    values = values if signed else np.abs(values)
    found = there_and_back(values, signed=signed)
    padded = np.zeros(-(-values.size // BLOCK) * BLOCK, np.float32)
    padded[: values.size] = values.reshape(-1)
    absmax = np.abs(padded.reshape(-1, BLOCK)).max(1).repeat(BLOCK)[: values.size]
    x, y, absmax = (a.astype(np.float64) for a in (values.reshape(-1), found.reshape(-1), absmax))
    np.testing.assert_array_equal(y[x == 0], 0)
    assert (np.sign(y) * np.sign(x) >= 0).all()
    np.testing.assert_array_equal(y[x == absmax], x[x == absmax])
    normal = absmax > 1e-30  # below, quotients fall out of float32
    x, y, absmax = x[normal], y[normal], absmax[normal]
    assert (np.abs(y - x) <= absmax * ERROR[signed] * (1 + 1e-5)).all()
    # Where a decade has n values, the relative error is at most 0.9 / n / 2 by 0.1: so for the
    # largest three decades (64, 32, 16 values with a sign and twice as many without).
    for decade, count in enumerate((64, 32, 16)):
        here = np.abs(x) > absmax * 10.0 ** -(decade + 1)
        count = count if signed else 2 * count
        assert (np.abs(y - x)[here] <= 4.5 / count * np.abs(x)[here] * (1 + 1e-5)).all()
    if not signed:
        assert (y[x > absmax * 1e-30] > 0).all()


def test_every_code_is_its_own_nearest():
    for signed in (True, False):
        table = dynamic_map(signed)
        values = np.concatenate([table, [1]]).astype("f") * np.float32(0.125)
        quantised = quantise(jnp.asarray(values), signed=signed, block=257)
        np.testing.assert_array_equal(quantised.codes[:256], np.arange(256))
        np.testing.assert_array_equal(there_and_back(values, signed=signed, block=257), values)


def test_what_is_not_finite_or_has_the_wrong_sign_is_not_hidden():
    for bad in (np.nan, np.inf, -np.inf):
        values = np.ones(3 * BLOCK, np.float32)
        values[BLOCK + 2] = bad
        found = there_and_back(values, signed=True)
        assert not np.isfinite(found[BLOCK + 2])
        np.testing.assert_array_equal(found[:BLOCK], 1)
        np.testing.assert_array_equal(found[2 * BLOCK :], 1)
    values = np.ones(2 * BLOCK, np.float32)
    values[3] = -1e-6
    found = there_and_back(values, signed=False)
    assert np.isnan(found[:BLOCK]).all()
    np.testing.assert_array_equal(found[BLOCK:], 1)


def problem(rng):
    """A two-layer network that is to learn another; parameters, and loss(params, batch)."""
    x = rng.normal(size=(512, 96)).astype("f")
    y = np.tanh(x @ rng.normal(size=(96, 64)).astype("f") / 10)
    params = {
        "first": {"kernel": jnp.array(rng.normal(size=(96, 128)).astype("f") / 10)},
        "last": {
            "kernel": jnp.array(rng.normal(size=(128, 64)).astype("f") / 10),
            "bias": jnp.zeros(64),
        },
    }

    def loss(params, rows):
        hidden = jnp.tanh(jnp.asarray(x)[rows] @ params["first"]["kernel"])
        answer = hidden @ params["last"]["kernel"] + params["last"]["bias"][None]
        return jnp.mean((answer - jnp.asarray(y)[rows]) ** 2)

    return params, loss


def train(params, loss, optimizer, steps):
    """Parameters, state and the losses of all examples every 20 steps; the buffers are donated."""
    params = jax.tree.map(jnp.copy, params)
    state = optimizer.init(params)
    structure, shapes = jax.tree.structure(state), jax.tree.map(jnp.shape, state)

    def step(params, state, rows):
        updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    rng, losses = np.random.default_rng(1), []
    for index in range(1, steps + 1):
        before = jax.tree.leaves(state)
        params, state = step(params, state, rng.integers(0, 512, 64))
        assert all(leaf.is_deleted() for leaf in before)
        if index % 20 == 0:
            losses.append(float(loss(params, np.arange(512))))
    assert jax.tree.structure(state) == structure
    assert jax.tree.map(jnp.shape, state) == shapes
    return params, state, np.array(losses)


def test_adam_in_8_bits_follows_adam(rng):
    params, loss = problem(rng)
    exact, exact_state, exact_losses = train(params, loss, optax.adam(3e-3), 200)
    found, state, losses = train(params, loss, eight_bit(optax.adam(3e-3)), 200)
    way = optax.tree.norm(optax.tree.sub(exact, params))
    apart = float(optax.tree.norm(optax.tree.sub(found, exact)) / way)
    losses_apart = float(np.abs(losses / exact_losses - 1).max())
    bytes_left = nbytes(state) / nbytes(exact_state)
    assert apart < 0.08  # of the way that Adam goes; here 0.028
    assert losses_apart < 0.03  # 0.011
    assert bytes_left < 0.26  # 0.2562, the bias being in float32
    adam = state[0]
    assert isinstance(adam, optax.ScaleByAdamState)
    assert adam.count.dtype == jnp.int32
    assert adam.mu["last"]["bias"].dtype == jnp.float32
    for moment in (adam.mu, adam.nu):
        assert moment["last"]["kernel"].codes.shape == (128, 64)
        assert moment["last"]["kernel"].scales.shape == (32,)


def test_a_gradient_that_vanishes_for_a_step():
    """Its second moment is a hundred millionth of its block's largest, its first one 1e-4."""
    often = jnp.arange(4096) % 2 == 0
    optimizer = eight_bit(optax.scale_by_adam())
    state = optimizer.init(often.astype(jnp.float32))
    for gradient in (jnp.where(often, 1.0, 1e-4), jnp.where(often, 1.0, 0.0)):
        update, state = optimizer.update(gradient, state)
        assert float(jnp.abs(update).max()) < 1.01  # 4204, were it rounded to zero


def test_what_is_quantised():
    params = {
        "large": jnp.zeros((32, 8)),
        "small": jnp.zeros(255),
        "half": jnp.zeros(512, "bfloat16"),
    }
    optimizer = eight_bit(optax.scale_by_adam(), block=100, smallest=256)
    shapes = jax.eval_shape(optimizer.init, params)
    state = optimizer.init(params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(
        lambda a: (a.shape, a.dtype), shapes
    )
    assert isinstance(state.mu["large"], Quantised)
    assert state.mu["large"].scales.shape == (3,)
    assert state.nu["half"].dtype == jnp.bfloat16
    assert state.nu["small"].dtype == jnp.float32
    assert sum(isinstance(leaf, Quantised) for leaf in leaves_of(state)) == 2


def test_a_leaf_named_v_is_no_second_moment(rng):
    params = {
        "v": jnp.array(rng.normal(size=(64, 64)).astype("f")),
        "nu": {"v": jnp.ones((64, 64))},
    }
    optimizer = eight_bit(optax.trace(0.9))
    _, state = optimizer.update(params, optimizer.init(params))
    found = dequantise(state.trace["v"], signed=True)
    np.testing.assert_allclose(found, params["v"], atol=0.05)


def test_adan_s_v_has_signs(rng):
    gradients = [jnp.array(rng.normal(size=(64, 64)).astype("f")) for _ in range(3)]

    def run(optimizer):
        state = optimizer.init(gradients[0])
        for gradient in gradients:
            update, state = optimizer.update(gradient, state)
        return update

    exact = run(optax.scale_by_adan())
    assert np.isnan(run(eight_bit(optax.scale_by_adan()))).any()
    named = eight_bit(optax.scale_by_adan(), nonnegative=lambda path: path[0].name == "n")
    np.testing.assert_allclose(run(named), exact, atol=0.1)


def test_in_a_chain_with_labels_and_more_arguments(rng):
    """`value` reaches the inner transform; decay sees the parameters."""
    params = {"a": jnp.array(rng.normal(size=(64, 80)).astype("f")), "b": jnp.ones((64, 64))}

    def scaled_by_value():
        def update(updates, state, params=None, *, value, **extra):
            del params, extra
            return jax.tree.map(lambda u: u * value, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    inner = optax.chain(optax.adamw(1e-2, weight_decay=0.1), scaled_by_value())
    optimizer = optax.partition(
        {"eight": optax.chain(optax.clip(1.0), eight_bit(inner)), "plain": optax.sgd(1e-2)},
        {"a": "eight", "b": "plain"},
    )
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    updates, after = update(params, state, params, value=2.0)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    expected = -2e-2 * (jnp.sign(params["a"]) + 0.1 * params["a"])
    np.testing.assert_allclose(updates["a"], expected, rtol=1e-4)
    np.testing.assert_allclose(updates["b"], -0.01 * params["b"])


def test_inside_galore(rng):
    params, loss = problem(rng)
    options = {"update_gap": 20, "scale": 1.0}
    _, _, exact_losses = train(params, loss, galore(3e-3, 32, **options), 60)
    inner = eight_bit(optax.scale_by_adam(), smallest=1024)
    _, state, losses = train(params, loss, galore(3e-3, 32, inner=inner, **options), 60)
    np.testing.assert_allclose(losses, exact_losses, rtol=0.05)
    assert losses[-1] < 0.5 * float(loss(params, np.arange(512)))
    moments = state[0].inner
    assert moments.mu["first"]["kernel"].codes.shape == (32, 128)
    assert moments.nu["last"]["kernel"].codes.shape == (128, 32)
    assert moments.nu["last"]["bias"].dtype == jnp.float32
    around = eight_bit(scale_by_galore(optax.scale_by_adam(), 32), smallest=1024)
    bases = around.init(params).bases["first"]["kernel"]
    assert bases["in"].codes.shape == (96, 32)


@pytest.mark.parametrize("setting", [{"block": 0}, {"smallest": -1}])
def test_settings_out_of_range(setting):
    (name, value), *_ = setting.items()
    with pytest.raises(ValueError, match=rf"{name} {value}.*expected at least 1 element"):
        eight_bit(optax.scale_by_adam(), **setting)
