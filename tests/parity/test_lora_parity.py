"""LoRA against PEFT and loralib: one layer, forwards, backwards and over fifty steps of AdamW."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from samjax.models.functional import bind, init_params
from samjax.models.layers import Dense
from samjax.peft.lora import Adapter, LoraConfig, init_factors, merge
from samjax.peft.lora_transform import lora

torch = pytest.importorskip("torch")

WIDTH, BLOCK, RANK, ALPHA = 24, 20, 4, 6
STEPS, LEARNING_RATE, WEIGHT_DECAY = 50, 1e-2, 0.1
TOLERANCE = 1e-5  # of the norm; half of it is Optax's, which takes 1 - 0.999^t in float32
TARGETS = {"peft": ("all",), "loralib": ("q", "v")}


class Layer(nnx.Module):
    def __init__(self, *, dtype, rngs):
        self.qkv = Dense(WIDTH, 3 * BLOCK, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.qkv(x)


@dataclass(frozen=True)
class LayerConfig:
    """What `bind` makes a model of."""

    def build(self, *, dtype, remat, rngs):
        return Layer(dtype=dtype, rngs=rngs)


@pytest.fixture(params=TARGETS)
def library(request):
    if request.param == "loralib":
        pytest.importorskip("loralib")
    else:
        try:  # PEFT imports transformers and that torchvision, which needs care
            from convert.reference import import_segment_anything

            import_segment_anything()
            import peft  # noqa: F401
        except ImportError as error:
            pytest.skip(f"PEFT with transformers, and segment-anything, are not installed: {error}")
    return request.param


@pytest.fixture
def problem(library, rng):
    """Our parameters, LoRA's config and fresh factors; a regression that the base cannot solve."""
    config = LoraConfig(
        rank=RANK, alpha=ALPHA, targets=tuple(("qkv", block) for block in TARGETS[library])
    )
    params = init_params(LayerConfig())
    params["qkv"]["bias"] += rng.normal(size=3 * BLOCK).astype("f")
    x = rng.normal(size=(7, 9, WIDTH)).astype("f")
    y = np.tanh(x @ rng.normal(size=(WIDTH, 3 * BLOCK))).astype("f")
    return params, config, init_factors(params, config, jax.random.key(5)), x, y


def build(library, params, factors):
    """The library's layer with our weights and factors, and its pair of trained tensors."""
    linear = torch.nn.Linear(WIDTH, 3 * BLOCK)
    if library == "peft":
        import peft

        settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], lora_dropout=0.0)
        model = peft.get_peft_model(torch.nn.Sequential(linear), settings)
        layer = model.base_model.model[0]
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    else:
        import loralib

        model = linear = loralib.MergedLinear(
            WIDTH, 3 * BLOCK, r=RANK, lora_alpha=ALPHA, enable_lora=[True, False, True]
        )
        loralib.mark_only_lora_as_trainable(model)
        a, b = model.lora_A, model.lora_B
    with torch.no_grad():
        linear.weight.copy_(as_torch(params["qkv"]["kernel"].T))
        linear.bias.copy_(as_torch(params["qkv"]["bias"]))
        for tensor, side in ((a, "a"), (b, "b")):
            tensor.copy_(as_torch(stacked(library, factors)[side]))
    return model, a, b


def stacked(library, factors):
    """Factors as the library has them: its blocks are rows of one matrix, each (out, in)."""
    pairs = [factors["qkv"][block] for block in TARGETS[library]]
    return {side: np.concatenate([np.asarray(pair[side]).T for pair in pairs]) for side in "ab"}


def as_torch(array):
    return torch.from_numpy(np.array(array))


def compare(name, found, expected):
    found, expected = np.asarray(found), expected.detach().numpy()
    assert found.shape == expected.shape
    difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"{name}: {difference:.1e}")
    assert difference <= TOLERANCE


def run(params, scale, factors, x):
    return bind(LayerConfig(), params, adapter=factors, adapter_scale=scale)(x)


def squared_error(params, scale, y, factors, x):
    return jnp.square(run(params, scale, factors, x) - y).sum() / len(x)


def test_output_and_gradient(library, problem, rng):
    params, config, factors, x, y = problem
    factors = jax.tree.map(lambda v: v + 0.3 * rng.normal(size=v.shape).astype("f"), factors)
    model, a, b = build(library, params, factors)
    out = model(as_torch(x))
    ((out - as_torch(y)).square().sum() / len(x)).backward()

    compare("output", run(params, config.scale, factors, jnp.asarray(x)), out)
    loss = partial(squared_error, params, config.scale, y)
    gradient = stacked(library, jax.grad(loss)(factors, jnp.asarray(x)))
    compare("gradient of a", gradient["a"], a.grad)
    compare("gradient of b", gradient["b"], b.grad)
    base = [p for p in model.parameters() if p is not a and p is not b]
    assert [p.grad for p in base] == [None, None]


def test_fifty_steps(library, problem):
    """The factors, and the weight with them folded in; also by our form as an Optax transform."""
    params, config, factors, x, y = problem
    model, a, b = build(library, params, factors)
    optimizer = torch.optim.AdamW([a, b], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(STEPS):
        optimizer.zero_grad()
        ((model(as_torch(x)) - as_torch(y)).square().sum() / len(x)).backward()
        optimizer.step()

    adamw = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    x = jnp.asarray(x)
    loss = partial(squared_error, params, config.scale, y)
    beside = descend(adamw, lambda tree: loss(tree, x), factors)[0]
    transform = lora(adamw, config, jax.random.key(5))
    plain, state = descend(transform, lambda tree: squared_error(tree, 1.0, y, {}, x), params)

    assert loss(beside, x) < 0.8 * loss(factors, x)
    for form, found in (("beside", beside), ("transform", state.factors)):
        pairs = stacked(library, found)
        assert np.linalg.norm(pairs["b"]) > 0.1 * np.linalg.norm(pairs["a"])  # it began at zero
        compare(f"{form}: a", pairs["a"], a)
        compare(f"{form}: b", pairs["b"], b)
    expected = folded(library, model)
    merged = merge(params, Adapter(factors=beside, scale=config.scale))
    for form, tree in (("beside", merged), ("transform", plain)):
        kernel = np.asarray(tree["qkv"]["kernel"])
        compare(f"{form}: weight", kernel.T, expected)
        moved = kernel - params["qkv"]["kernel"]
        compare(f"{form}: its change", moved.T, expected - as_torch(params["qkv"]["kernel"].T))
        assert (moved[:, BLOCK : 2 * BLOCK].any()) == (library == "peft")  # loralib's k stays


def descend(optimizer, loss, tree):
    @jax.jit
    def step(tree, state):
        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    state = optimizer.init(tree)
    for _ in range(STEPS):
        tree, state = step(tree, state)
    return tree, state


def folded(library, model):
    """The weight that the library saves for use without it."""
    if library == "peft":
        return model.merge_and_unload()[0].weight
    model.eval()  # folds the factors in; train() takes them out again
    return model.weight
