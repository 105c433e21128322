"""LoRA as a transform: the same weights as the adapter beside the model, on any tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tiny_models
from samjax.models.functional import bind
from samjax.peft.lora import Adapter, LoraConfig, init_factors, merge
from samjax.peft.lora_transform import lora
from samjax.trees import flatten

CONFIG = LoraConfig(
    rank=3, alpha=4.0, projections=("q", "v", "mlp"), parts=("image_encoder", "mask_decoder")
)
MLP = LoraConfig(rank=2, alpha=3.0, targets=((r"first", "all"), (r"fused", "q"), (r"fused", "v")))


def small_mlp(rng):
    """A plain tree: no model of ours."""
    return {
        "first": {"kernel": jnp.array(rng.normal(size=(5, 7))), "bias": jnp.zeros(7)},
        "fused": {"kernel": jnp.array(rng.normal(size=(7, 12)))},
        "last": {"kernel": jnp.array(rng.normal(size=(12, 2)))},
    }


def run_mlp(params, x):
    x = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return jnp.tanh(x @ params["fused"]["kernel"]) @ params["last"]["kernel"]


@pytest.mark.usefixtures("quick_compilation")
def test_both_forms_agree_over_a_hundred_steps_of_adamw():
    """Float64, a small SAM, the same first factors: to 1e-10."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        config, key = tiny_models.SAM, jax.random.key(5)
        base = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), tiny_models.noisy_params(config))
        images = jnp.array(rng.uniform(0, 255, (1, *config.image_size, 3)))
        inputs = (
            images,
            jnp.array([config.image_size]),
            jnp.array(rng.uniform(0, 40, (1, 2, 2))),
            jnp.array([[1, -1]]),
        )
        target = jnp.array(rng.normal(size=(1, config.mask_tokens, *config.low_res_size)))

        def distance(module):
            return jnp.square(module(*inputs).low_res_logits - target).mean()

        def beside(factors):
            scale = CONFIG.scale
            options = {"adapter": factors, "adapter_scale": scale, "dtype": jnp.float64}
            return distance(bind(config, base, **options))

        def merged(params):
            return distance(bind(config, params, dtype=jnp.float64))

        optimizer = optax.adamw(1e-3)
        forms = (
            (beside, optimizer, init_factors(base, CONFIG, key)),
            (merged, lora(optimizer, CONFIG, key), base),
        )
        ends, losses = [], []
        for loss, transform, params in forms:

            @jax.jit
            def step(params, state, loss=loss, transform=transform):
                value, gradients = jax.value_and_grad(loss)(params)
                updates, state = transform.update(gradients, state, params)
                return optax.apply_updates(params, updates), state, value

            state = transform.init(params)
            for _ in range(100):
                params, state, value = step(params, state)
            ends.append((params, state))
            losses.append(float(value))
        (factors, _), (params, state) = ends
        assert losses[1] == pytest.approx(losses[0], rel=1e-10)
        for path, leaf in flatten(state.factors).items():
            np.testing.assert_allclose(leaf, flatten(factors)[path], atol=1e-10, err_msg=path)
        start = flatten(base)
        targets = {path.rsplit("/", 2)[0] for path in flatten(factors)}
        for path, leaf in flatten(params).items():
            if path.removesuffix("/kernel") not in targets:
                np.testing.assert_array_equal(leaf, start[path])
        for layer in targets:
            assert (
                np.abs(flatten(params)[f"{layer}/kernel"] - start[f"{layer}/kernel"]).max() > 1e-3
            )


def test_the_factors_are_an_adapter_to_the_start(rng):
    params = start = small_mlp(rng)
    x, y = rng.normal(size=(16, 5)), rng.normal(size=(16, 2))
    optimizer = lora(optax.sgd(0.05), MLP, jax.random.key(0))
    state = optimizer.init(params)
    losses = []
    for _ in range(20):
        value, gradients = jax.value_and_grad(lambda p: jnp.square(run_mlp(p, x) - y).mean())(
            params
        )
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    adapter = Adapter(factors=state.factors, scale=MLP.scale)
    folded = merge(start, adapter)
    for path, leaf in flatten(params).items():
        np.testing.assert_allclose(leaf, flatten(folded)[path], atol=1e-5, err_msg=path)
    fused = np.asarray(params["fused"]["kernel"] - start["fused"]["kernel"])
    np.testing.assert_array_equal(fused[:, 4:8], 0)  # k
    assert np.abs(fused[:, :4]).max() > 1e-3
    np.testing.assert_array_equal(params["last"]["kernel"], start["last"]["kernel"])


def test_a_plain_flax_model():
    """As the README's example: an NNX model of nobody's, tuned by its state."""
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    params = {"layer": nnx.to_pure_dict(state)}
    optimizer = lora(
        optax.adam(1e-2), LoraConfig(rank=2, targets=((".*", "all"),)), jax.random.key(0)
    )

    def loss(params):
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, params["layer"])
        return jnp.square(nnx.merge(graph, filled)(jnp.ones((1, 6)))).sum()

    opt_state = optimizer.init(params)
    before = loss(params)
    for _ in range(10):
        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    assert loss(params) < before
    np.testing.assert_array_equal(params["layer"]["bias"], 0)


def test_errors(rng):
    params = small_mlp(rng)
    with pytest.raises(ValueError, match="no dropout"):
        lora(optax.sgd(1.0), LoraConfig(dropout=0.1), jax.random.key(0))
    wrong = LoraConfig(targets=(("second", "all"),))
    with pytest.raises(ValueError, match=r"LoRA on targets\[0\]: no layer matches 'second'"):
        lora(optax.sgd(1.0), wrong, jax.random.key(0)).init(params)
    large = LoraConfig(rank=6, targets=(("first", "all"),))
    with pytest.raises(ValueError, match="rank 6 exceeds first"):
        lora(optax.sgd(1.0), large, jax.random.key(0)).init(params)
