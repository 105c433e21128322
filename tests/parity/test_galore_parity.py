"""GaLore against jiaweizzhao/GaLore's own optimizer, `galore_torch.GaLoreAdamW`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convert.reference import galore_module
from samjax.peft.galore import canonical_signs, galore

torch = pytest.importorskip("torch")

SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}  # torch's: (out, in)
STEPS, GAP = 50, 10


@pytest.fixture(scope="module")
def upstream():
    """Its optimizer.

    Singular vectors get the same signs there: which ones LAPACK gives is chance.
    """
    try:
        adamw = galore_module("adamw")
    except ImportError as error:
        pytest.skip(str(error))
    projector = galore_module("galore_projector").GaLoreProjector
    find = projector.get_orthogonal_matrix

    def with_signs(self, weights, rank, type):
        found = find(self, weights, rank, type)
        rows = {"right": [True], "left": [False], "full": [False, True]}[type]
        each = found if type == "full" else [found]
        fixed = [
            torch.from_numpy(np.array(canonical_signs(jnp.asarray(m.T if row else m))))
            for m, row in zip(each, rows, strict=True)
        ]
        fixed = [m.T if row else m for m, row in zip(fixed, rows, strict=True)]
        return fixed if type == "full" else fixed[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projector, "get_orthogonal_matrix", with_signs)
        yield adamw.AdamW


def problem():
    """A regression through each matrix, whose gradient changes with its weight."""
    rng = np.random.default_rng(3)
    return {
        name: {
            "weight": rng.normal(size=shape).astype("f"),
            "x": rng.normal(size=(64, shape[1])).astype("f"),
            "y": rng.normal(size=(64, shape[0])).astype("f"),
        }
        for name, shape in SHAPES.items()
    }


def run_upstream(adamw, settings, **group):
    data = problem()
    weights = {
        name: torch.nn.Parameter(torch.from_numpy(d["weight"].copy())) for name, d in data.items()
    }
    bias = torch.nn.Parameter(torch.zeros(24))
    optimizer = adamw(
        [{"params": list(weights.values()), **group}, {"params": [bias]}],
        no_deprecation_warning=True,
        **settings,
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = bias.square().sum() + (bias - 1).mean()
        for name, d in data.items():
            out = torch.from_numpy(d["x"]) @ weights[name].T
            loss = loss + (out - torch.from_numpy(d["y"])).square().mean()
        loss.backward()
        optimizer.step()
    return {n: w.detach().numpy() for n, w in weights.items()}, bias.detach().numpy()


def run_ours(optimizer):
    data = problem()
    params = {name: {"kernel": jnp.asarray(d["weight"].T)} for name, d in data.items()}
    params["bias"] = jnp.zeros(24)

    def loss(params):
        value = jnp.square(params["bias"]).sum() + (params["bias"] - 1).mean()
        for name, d in data.items():
            value += jnp.square(d["x"] @ params[name]["kernel"] - d["y"]).mean()
        return value

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize(
    ("projection", "refresher", "rank"),
    [
        *itertools.product(["std", "reverse_std", "left", "right", "full"], ["eigh", "svd"], [6]),
        ("std", "svd", 28),  # above a side of two of the weights
    ],
)
def test_fifty_steps_over_five_refreshes(upstream, projection, refresher, rank):
    """Weights tall, wide and square, and a bias that is not projected: within 1e-5 relative.

    Projected on both sides, a gradient is diagonal at a refresh; beside the diagonal there is only
    rounding, which Adam takes for a gradient unless eps is above it. With 1e-6 upstream differs
    from itself by 2e-5 when each weight is moved by its last digit.
    """
    eps = 1e-4 if projection == "full" else 1e-6
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": eps}
    theirs, their_bias = run_upstream(
        upstream, settings, rank=rank, update_proj_gap=GAP, scale=0.25, proj_type=projection
    )
    ours = run_ours(
        galore(
            1e-2,
            rank,
            any_rank=rank > 24,
            update_gap=GAP,
            scale=0.25,
            projection=projection,
            refresher=refresher,
            weight_decay=0.1,
            b2=0.99,
            eps=eps,
        )
    )
    start = problem()
    for name, weight in theirs.items():
        kernel = np.asarray(ours[name]["kernel"]).T
        difference = np.linalg.norm(kernel - weight) / np.linalg.norm(weight)
        print(f"{projection} {refresher} {name}: {difference:.1e}")
        assert difference <= 1e-5
        moved = np.linalg.norm(weight - start[name]["weight"]) / np.linalg.norm(weight)
        assert moved > 1e-2
    np.testing.assert_allclose(ours["bias"], their_bias, rtol=1e-5, atol=1e-7)
