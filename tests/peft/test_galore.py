"""GaLore as a transform: what is projected, when a basis changes, and what it may not be asked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from samjax.peft.galore import (
    canonical_signs,
    galore,
    project,
    project_back,
    scale_by_galore,
    sides,
)
from samjax.peft.paths import in_order, label_by_path

SHAPES = {"tall": (7, 19), "wide": (19, 7), "square": (11, 11)}  # (in, out): as torch has them
PROJECTIONS = ("std", "reverse_std", "left", "right", "full")
REFRESHERS = ("eigh", "svd", "randomized", "power")


def tree(rng, **more):
    kernels = {
        name: {"kernel": jnp.array(rng.normal(size=s).astype("f"))} for name, s in more.items()
    }
    return {**kernels, "norm": {"scale": jnp.array(rng.normal(size=5).astype("f"))}}


def low_rank(matrix, rank):
    """The nearest matrix of that rank."""
    u, s, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


@pytest.mark.parametrize(
    ("shape", "projection", "expected"),
    [
        ((7, 19), "std", ("in",)),
        ((19, 7), "std", ("out",)),
        ((11, 11), "std", ("in",)),
        ((7, 19), "reverse_std", ("out",)),
        ((19, 7), "reverse_std", ("in",)),
        ((11, 11), "reverse_std", ("out",)),
        ((19, 7), "right", ("in",)),
        ((7, 19), "left", ("out",)),
        ((7, 19), "full", ("in", "out")),
    ],
)
def test_the_side_that_is_projected(shape, projection, expected):
    assert sides(shape, projection) == expected


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_without_an_inner_step_it_is_the_nearest_matrix_of_the_rank(rng, projection):
    """Eckart-Young, on any side; `optax.identity` as the inner transform."""
    gradients = tree(rng, **SHAPES)
    transform = scale_by_galore(optax.identity(), 3, scale=0.5, projection=projection)
    updates, _ = transform.update(gradients, transform.init(gradients))
    for name in SHAPES:
        expected = 0.5 * low_rank(gradients[name]["kernel"], 3)
        np.testing.assert_allclose(updates[name]["kernel"], expected, atol=1e-5)
    np.testing.assert_array_equal(updates["norm"]["scale"], gradients["norm"]["scale"])


@pytest.mark.parametrize("refresher", REFRESHERS)
def test_every_refresher_finds_the_same_space(rng, refresher):
    spectrum = 2.0 ** -np.arange(12)
    u, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    v, _ = np.linalg.qr(rng.normal(size=(30, 12)))
    gradient = {"kernel": jnp.array((u * spectrum @ v.T).astype("f"))}
    for projection in ("std", "reverse_std", "full"):
        transform = scale_by_galore(
            optax.identity(), 4, scale=1.0, projection=projection, refresher=refresher
        )
        update, state = transform.update(gradient, transform.init(gradient))
        best = np.linalg.norm(low_rank(gradient["kernel"], 4))
        assert np.linalg.norm(update["kernel"]) > 0.995 * best
        for basis in state.bases["kernel"].values():
            np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
            assert (basis.max(axis=0) >= -basis.min(axis=0)).all()


def test_power_iterations_converge_from_refresh_to_refresh(rng):
    gradient = {"kernel": jnp.array(rng.normal(size=(40, 60)).astype("f"))}
    transform = scale_by_galore(
        optax.identity(), 4, scale=1.0, update_gap=1, refresher="power", projection="std"
    )
    state = transform.init(gradient)
    for _ in range(60):
        update, state = transform.update(gradient, state)
    np.testing.assert_allclose(update["kernel"], low_rank(gradient["kernel"], 4), atol=1e-2)


def test_a_full_basis_gives_everything_back(rng):
    gradients = tree(rng, **SHAPES)
    for projection in PROJECTIONS:
        transform = scale_by_galore(optax.identity(), 7, scale=1.0, projection=projection)
        updates, _ = transform.update(gradients, transform.init(gradients))
        for name in ("tall", "wide"):
            kernel = gradients[name]["kernel"]
            np.testing.assert_allclose(updates[name]["kernel"], kernel, atol=1e-5)


def test_a_basis_changes_every_gap_and_moments_stay(rng):
    gradients = [tree(rng, **SHAPES) for _ in range(7)]
    transform = scale_by_galore(optax.scale_by_adam(), 3, update_gap=3)
    state = transform.init(gradients[0])
    step = jax.jit(transform.update)
    changed, before = [], state
    for gradient in gradients:
        _, state = step(gradient, before)
        old, new = (s.bases["wide"]["kernel"]["out"] for s in (before, state))
        changed.append(not np.array_equal(old, new))
        small = project(gradient["wide"]["kernel"], state.bases["wide"]["kernel"])
        moment = 0.9 * before.inner.mu["wide"]["kernel"] + 0.1 * small
        np.testing.assert_allclose(state.inner.mu["wide"]["kernel"], moment, atol=1e-6)
        before = state
    assert changed == [True, False, False, True, False, False, True]
    assert state.inner.mu["wide"]["kernel"].shape == (19, 3)
    assert state.inner.mu["tall"]["kernel"].shape == (3, 19)


def test_deciding_the_refresh_on_the_host_is_the_same(rng):
    gradients = [tree(rng, **SHAPES) for _ in range(5)]
    transform = scale_by_galore(optax.scale_by_adam(), 3, update_gap=2)
    inside = outside = transform.init(gradients[0])
    for index, gradient in enumerate(gradients):
        first, inside = transform.update(gradient, inside)
        second, outside = transform.update(gradient, outside, refresh=index % 2 == 0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), first, second)
    plain = jax.jit(transform.update, static_argnames="refresh").lower(
        gradients[0], inside, refresh=False
    )
    assert "eigh" not in plain.as_text()
    assert "cond" not in plain.as_text()


def test_stacks_and_convolutions(rng):
    stack = jnp.array(rng.normal(size=(4, 9, 13)).astype("f"))
    one = scale_by_galore(optax.identity(), 2, scale=1.0, stacked=True)
    update, state = one.update({"kernel": stack}, one.init({"kernel": stack}))
    np.testing.assert_allclose(update["kernel"], low_rank(stack, 2), atol=1e-5)
    assert state.bases["kernel"]["in"].shape == (4, 9, 2)
    kernel = jnp.array(rng.normal(size=(3, 3, 5, 8)).astype("f"))
    one = scale_by_galore(optax.identity(), 2, scale=1.0)
    update, _ = one.update({"kernel": kernel}, one.init({"kernel": kernel}))
    expected = low_rank(kernel.reshape(45, 8), 2).reshape(3, 3, 5, 8)
    np.testing.assert_allclose(update["kernel"], expected, atol=1e-5)


def test_a_rank_for_each_label(rng):
    """`optax.partition`, with a schedule, decay, and the refresh decided on the host."""
    params = tree(rng, **SHAPES)
    rules = [("(tall|wide)/.*", "few"), ("square/.*", "many"), (".*", "all")]
    labels = label_by_path(params, in_order(rules))
    optimizer = optax.partition(
        {
            "few": galore(optax.linear_schedule(1e-2, 0, 10), 2, weight_decay=0.1),
            "many": galore(1e-2, 6, projection="full"),
            "all": optax.adam(1e-2),
        },
        labels,
    )
    state = optimizer.init(params)
    gradients = tree(rng, **SHAPES)
    updates, state = optimizer.update(gradients, state, params, refresh=True)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    inner = state.inner_states["many"].inner_state[0].inner.mu["square"]["kernel"]
    assert inner.shape == (6, 6)


def test_signs_are_the_same_on_every_machine(rng):
    vectors = jnp.array(rng.normal(size=(2, 9, 4)).astype("f"))
    flipped = vectors * jnp.array([1.0, -1.0, -1.0, 1.0])[None, None]
    np.testing.assert_array_equal(canonical_signs(vectors), canonical_signs(flipped))


def test_a_gradient_of_zeros_does_no_harm():
    gradient = {"kernel": jnp.zeros((6, 9))}
    for refresher in REFRESHERS:
        transform = galore(1e-2, 2, refresher=refresher, projection="full")
        updates, _ = transform.update(gradient, transform.init(gradient), gradient)
        np.testing.assert_array_equal(updates["kernel"], 0)


def test_projecting_is_undone_in_the_span(rng):
    basis = {"in": jnp.linalg.qr(rng.normal(size=(9, 3)).astype("f")).Q}
    small = jnp.array(rng.normal(size=(3, 5)).astype("f"))
    np.testing.assert_allclose(project(project_back(small, basis), basis), small, atol=1e-6)


def test_a_rank_that_exceeds_a_matrix_is_named(rng):
    with pytest.raises(ValueError, match=r"rank 8 exceeds.*\n  tall/kernel, 7 x 19\n  wide/kernel"):
        scale_by_galore(optax.identity(), 8).init(tree(rng, **SHAPES))


@pytest.mark.parametrize("refresher", REFRESHERS)
def test_with_any_rank_such_a_matrix_keeps_its_side(rng, refresher):
    gradients = tree(rng, **SHAPES)
    transform = scale_by_galore(optax.identity(), 8, scale=1.0, refresher=refresher, any_rank=True)
    updates, state = transform.update(gradients, transform.init(gradients))
    columns = {name: found["kernel"] for name, found in state.bases.items() if name != "norm"}
    columns = {name: next(iter(basis.values())).shape[-1] for name, basis in columns.items()}
    assert columns == {"tall": 7, "wide": 7, "square": 8}
    for name in ("tall", "wide"):
        expected = gradients[name]["kernel"]
        np.testing.assert_allclose(updates[name]["kernel"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 2, "update_gap": 0}, "update_gap 0"),
        ({"rank": 2, "projection": "both"}, "projection 'both': expected one of std, reverse_std"),
        ({"rank": 2, "refresher": "lanczos"}, "refresher 'lanczos': expected one of eigh, svd"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        scale_by_galore(optax.identity(), **settings)


def test_decay_needs_parameters(rng):
    params = tree(rng, **SHAPES)
    optimizer = galore(1e-2, 2, weight_decay=0.1)
    with pytest.raises(ValueError, match="weight decay needs the parameters"):
        optimizer.update(params, optimizer.init(params))


def test_optax_s_galore_is_the_reverse_of_the_paper_s(rng):
    """`optax.contrib.galore` projects the longer side: upstream's reverse_std, not its std."""
    params = {
        name: leaf for name, leaf in tree(rng, tall=(7, 19), wide=(19, 7)).items() if name != "norm"
    }
    theirs = optax.contrib.scale_by_galore(rank=3, update_proj_gap=100, scale=0.25)
    ours = {
        projection: scale_by_galore(optax.scale_by_adam(), 3, update_gap=100, projection=projection)
        for projection in ("std", "reverse_std")
    }
    states = {name: transform.init(params) for name, transform in ours.items()}
    their_state = theirs.init(params)
    apart = dict.fromkeys(ours, 0.0)
    for _ in range(5):  # Adam does not mind the signs of a basis, until the basis changes
        gradients = jax.tree.map(lambda p: jnp.array(rng.normal(size=p.shape).astype("f")), params)
        expected, their_state = theirs.update(gradients, their_state, params)
        for name, transform in ours.items():
            update, states[name] = transform.update(gradients, states[name])
            difference = optax.tree.norm(optax.tree.sub(update, expected))
            apart[name] = max(apart[name], float(difference / optax.tree.norm(expected)))
    assert apart["reverse_std"] < 1e-4
    assert apart["std"] > 0.3
