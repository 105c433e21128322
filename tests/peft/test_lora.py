"""LoRA as data: the side path, the merge, and what is trained."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny_models
from samjax.models import functional
from samjax.models.layers import Dense, SidePath
from samjax.models.sam import vit_b
from samjax.peft.adapter_files import read_adapter
from samjax.peft.lora import (
    Adapter,
    LoraConfig,
    count,
    factor_pairs,
    find_targets,
    init_factors,
    merge,
)
from samjax.trees import flatten, unflatten

TINY = dataclasses.replace(tiny_models.SAM, decoder_depth=1)
EVERYTHING = LoraConfig(
    rank=3,
    alpha=1.5,
    projections=("q", "k", "v", "o", "mlp"),
    parts=("image_encoder", "mask_decoder"),
)
QKV = "image_encoder/blocks/{}/attn/qkv"
pytestmark = pytest.mark.usefixtures("quick_compilation")


def noise(rng, tree, size=0.1):
    return jax.tree.map(lambda v: v + size * rng.normal(size=v.shape).astype("f"), tree)


@pytest.fixture(scope="module")
def params():
    """Random everywhere: position tables and biases, which start at zero, as well."""
    return noise(np.random.default_rng(1), functional.init_params(TINY, seed=3))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(2)
    return {
        "images": jnp.asarray(rng.uniform(0, 255, (2, 48, 80, 3)), jnp.float32),
        "sizes": jnp.array([[48, 70], [31, 80]]),
        "coords": jnp.asarray(rng.uniform(0, 48, (2, 2, 2)), jnp.float32),
        "labels": jnp.array([[1, 0], [2, 3]]),
    }


@pytest.fixture(scope="module")
def predict(batch):
    """All outputs of the model as one vector, given parameters and an adapter's factors or none."""

    @jax.jit
    def run(params, factors):
        model = functional.bind(TINY, params, adapter=factors, adapter_scale=EVERYTHING.scale)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(model(**batch))])

    return run


def test_config_refuses_nonsense():
    for values, message in (
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, "dropout must lie in"),
        ({"projections": ("q", "w")}, r"projections must be some of \['q', .* got \['q', 'w'\]"),
        ({"projections": ()}, "projections must be some of"),
        ({"parts": ("prompt_encoder",)}, r"parts must be some of .* got \['prompt_encoder'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraConfig(**values)


def test_scale():
    assert LoraConfig(rank=4).scale == 1
    assert LoraConfig(rank=4, alpha=2).scale == 0.5


def test_default_targets_are_those_of_samed():
    abstract = functional.abstract_params(TINY)
    expected = [(QKV.format(i), block) for i in (0, 1) for block in ("q", "v")]
    assert find_targets(abstract, LoraConfig()) == expected


def test_targets_of_all_projections():
    found = find_targets(functional.abstract_params(TINY), EVERYTHING)
    encoder = [
        ("attn/proj", "all"),
        *(("attn/qkv", block) for block in "kqv"),
        ("mlp/lin1", "all"),
        ("mlp/lin2", "all"),
    ]
    attentions = ["self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token"]
    decoder = [f"layers/0/{a}/{p}_proj" for a in attentions for p in ("q", "k", "v", "out")]
    decoder += [f"final_attn_token_to_image/{p}_proj" for p in ("q", "k", "v", "out")]
    decoder += ["layers/0/mlp/lin1", "layers/0/mlp/lin2"]
    expected = [(f"image_encoder/blocks/{i}/{p}", block) for i in (0, 1) for p, block in encoder]
    expected += [(f"mask_decoder/transformer/{p}", "all") for p in decoder]
    assert sorted(found) == sorted(expected)
    assert len(set(found)) == len(found)


def test_a_projection_without_a_layer_is_an_error():
    encoder_only = {"image_encoder": functional.abstract_params(TINY)["image_encoder"]}
    with pytest.raises(ValueError, match="LoRA on 'k' of 'mask_decoder': no layer matches"):
        find_targets(encoder_only, LoraConfig(projections=("k",), parts=("mask_decoder",)))


def test_fresh_factors():
    abstract = functional.abstract_params(TINY)
    factors = init_factors(abstract, EVERYTHING, jax.random.key(0))
    pairs = {(layer, block): (a, b) for layer, block, a, b in factor_pairs(factors)}
    shapes = {key: (a.shape, b.shape) for key, (a, b) in pairs.items()}
    assert sorted(pairs) == sorted(find_targets(abstract, EVERYTHING))
    assert shapes[QKV.format(1), "v"] == ((24, 3), (3, 24))
    assert shapes["image_encoder/blocks/0/mlp/lin1", "all"] == ((24, 3), (3, 36))
    assert shapes["image_encoder/blocks/0/mlp/lin2", "all"] == ((36, 3), (3, 24))
    cross = "mask_decoder/transformer/layers/0/cross_attn_image_to_token/out_proj"
    assert shapes[cross, "all"] == ((16, 3), (3, 32))
    for a, b in pairs.values():
        assert a.dtype == b.dtype == jnp.float32
        assert not b.any()
        bound = a.shape[0] ** -0.5  # Kaiming-uniform with a = √5, as in loralib and PEFT
        assert 0.8 * bound < np.abs(a).max() <= bound
    first = [np.asarray(a).ravel()[:9] for a, _ in pairs.values()]
    assert len({tuple(values) for values in first}) == len(pairs)  # no two alike
    again = init_factors(abstract, EVERYTHING, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, factors, again)


def test_size_is_that_of_samed():
    abstract = functional.abstract_params(vit_b())
    factors = jax.eval_shape(lambda key: init_factors(abstract, LoraConfig(rank=4), key), KEY)
    assert count(factors) == 147_456


KEY = jax.random.key(7)


def test_rank_that_exceeds_the_matrix():
    abstract = functional.abstract_params(TINY)
    init_factors(abstract, LoraConfig(rank=24), KEY)
    with pytest.raises(ValueError, match=r"rank 25 exceeds image_encoder/.*qkv \[q\], .* 24 x 24"):
        init_factors(abstract, LoraConfig(rank=25), KEY)
    config = LoraConfig(rank=17, projections=("q",), parts=("mask_decoder",))
    with pytest.raises(ValueError, match=r"rank 17 exceeds .*token_to_image/q_proj .* 32 x 16"):
        init_factors(abstract, config, KEY)


def test_the_start_is_the_base_model(params, predict):
    factors = init_factors(params, EVERYTHING, KEY)
    base = predict(params, None)
    np.testing.assert_array_equal(predict(params, factors), base)


def test_side_path_equals_merged_model(params, predict, rng):
    factors = noise(rng, init_factors(params, EVERYTHING, KEY))
    base = predict(params, None)
    side = predict(params, factors)
    merged = predict(merge(params, Adapter(factors=factors, scale=EVERYTHING.scale)), None)
    spread = np.std(base)
    assert np.std(side - base) > 0.1 * spread
    np.testing.assert_allclose(side / spread, merged / spread, atol=1e-5)


def test_merge_touches_only_its_columns(rng):
    kernel = rng.normal(size=(10, 21)).astype("f")
    params = {"qkv": {"kernel": jnp.asarray(kernel), "bias": jnp.ones(21)}}
    factors = {
        "qkv": {
            block: {"a": rng.normal(size=(10, r)).astype("f"), "b": rng.normal(size=(r, 7))}
            for block, r in (("q", 2), ("v", 3))
        }
    }
    merged = merge(params, Adapter(factors=factors, scale=0.5))["qkv"]
    expected = np.float64(kernel)
    for block, start in (("q", 0), ("v", 14)):
        pair = factors["qkv"][block]
        expected[:, start : start + 7] += 0.5 * np.float64(pair["a"]) @ pair["b"]
    np.testing.assert_allclose(merged["kernel"], expected, atol=1e-6)
    np.testing.assert_array_equal(merged["kernel"][:, 7:14], kernel[:, 7:14])
    np.testing.assert_array_equal(merged["bias"], params["qkv"]["bias"])
    np.testing.assert_array_equal(params["qkv"]["kernel"], kernel)  # the base stays as it was


def test_factors_lie_on_top_of_what_was_tuned_outright():
    params = {"out": {"kernel": jnp.zeros((4, 5)), "bias": jnp.zeros(5)}}
    factors = {"out": {"all": {"a": jnp.ones((4, 1)), "b": jnp.full((1, 5), 2.0)}}}
    tuned = {"out": {"kernel": jnp.full((4, 5), 3.0)}}
    merged = merge(params, Adapter(factors=factors, params=tuned))
    np.testing.assert_array_equal(merged["out"]["kernel"], np.full((4, 5), 5.0))


def test_merge_names_everything_that_does_not_fit():
    params = {"qkv": {"kernel": jnp.zeros((4, 9)), "bias": jnp.zeros(9)}, "odd": {}}
    params["odd"]["kernel"] = jnp.zeros((4, 10))
    params["conv"] = {"kernel": jnp.zeros((3, 3, 4, 9))}

    def pair(features_in, out):
        return {"a": jnp.zeros((features_in, 2)), "b": jnp.zeros((2, out))}

    factors = {
        "qkv": {"q": pair(4, 3), "v": pair(4, 4), "all": pair(5, 9)},
        "odd": {"q": pair(4, 3)},
        "conv": {"all": pair(4, 9)},
        "absent": {"all": pair(4, 9)},
    }
    tuned = {"qkv": {"bias": jnp.zeros(8)}, "nowhere": jnp.zeros(1)}
    with pytest.raises(ValueError, match="the adapter does not fit the model") as error:
        merge(params, Adapter(factors=factors, params=tuned))
    assert sorted(str(error.value).splitlines()[1:]) == [
        "  absent: the model has no such dense layer",
        "  conv: the model has no such dense layer",
        "  nowhere: the adapter has shape (1,), the model no such parameter",
        "  odd: unknown block 'q' of 10 columns; expected q, k, v or all",
        "  qkv [all]: the factors make 5 x 9, the model has 4 x 9",
        "  qkv [v]: the factors make 4 x 4, the model has 4 x 3",
        "  qkv/bias: the adapter has shape (8,), the model (9,)",
    ]


def test_malformed_factors_are_named():
    factors = {
        "qkv": {
            "q": {"a": jnp.zeros((4, 2))},
            "k": {"a": jnp.zeros((4, 2)), "b": jnp.zeros((3, 4))},
            "v": {"a": jnp.zeros((4, 2)), "b": jnp.zeros((2, 4)), "c": jnp.zeros(1)},
            "w": {"a": jnp.zeros((4, 2)), "b": jnp.zeros((2, 4))},
        }
    }
    with pytest.raises(ValueError, match="no low-rank factors") as error:
        factor_pairs(factors)
    assert str(error.value).splitlines()[1:] == [
        "  qkv/q/a: its other half is missing",
        "  qkv/k: a (4, 2) and b (3, 4) make no product",
        "  qkv/v/c: expected '<layer>/<q, k, v or all>/<a or b>'",
        "  qkv/w/a: expected '<layer>/<q, k, v or all>/<a or b>'",
        "  qkv/w/b: expected '<layer>/<q, k, v or all>/<a or b>'",
    ]


@pytest.mark.parametrize("rank", [2, 4, 6, 8])
def test_merging_real_files(shared_data, rng, rank):
    """Upstream's definition, on torch's orientation and in float64: rows q and v of W + B A."""
    from safetensors.numpy import load_file

    file = shared_data / "sam_vit_b_lora" / f"lora_rank{rank}.safetensors"
    stored = load_file(file)
    kernels = [f"{QKV.format(i)}/kernel" for i in range(12)]
    base = dict.fromkeys(kernels, jnp.asarray(0.05 * rng.normal(size=(768, 2304)), "f"))
    params = unflatten(base)
    merged = flatten(merge(params, read_adapter(file)))
    for index, path in enumerate(kernels):
        weight = np.float64(base[path]).T  # (out, in) as torch has it
        for number, rows in ((2 * index, slice(0, 768)), (2 * index + 1, slice(1536, 2304))):
            a, b = stored[f"w_a_{number:03d}"], stored[f"w_b_{number:03d}"]
            weight[rows] += np.float64(b) @ np.float64(a)
        ours = np.asarray(merged[path]).T
        assert np.abs(ours - weight).max() < 1e-6
        assert np.abs(ours - np.asarray(base[path]).T).max() > 1e-3
        np.testing.assert_array_equal(merged[path][:, 768:1536], base[path][:, 768:1536])


@pytest.fixture
def dense(rng):
    layer = Dense(7, 9, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray(rng.normal(size=9), jnp.float32)
    return layer


def with_side(layer, rng, **options):
    a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((7, 2), (2, 3)))
    set_side(layer, SidePath(a, b, (3, 6), **options))
    return layer, np.asarray(a @ b)


def set_side(layer, side):
    object.__setattr__(layer, "side_paths", (side,))  # as bind does it


def test_side_path_of_a_block(dense, rng):
    x = jnp.asarray(rng.normal(size=(4, 5, 7)), jnp.float32)
    base = np.asarray(dense(x))
    layer, product = with_side(dense, rng, scale=0.25)
    expected = base.copy()
    expected[..., 3:6] += 0.25 * np.asarray(x) @ product
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)
    np.testing.assert_array_equal(layer(x)[..., :3], base[..., :3])
    np.testing.assert_array_equal(layer(x)[..., 6:], base[..., 6:])


def test_dropout_keeps_the_expectation(dense, rng):
    x = jnp.asarray(rng.normal(size=(7,)), jnp.float32)
    layer, _ = with_side(dense, rng)
    exact = layer(x)
    side = layer.side_paths[0]

    @jax.jit
    @jax.vmap
    def sample(key):
        set_side(layer, side._replace(dropout=0.3, key=key))
        return layer(x)

    samples = np.asarray(sample(jax.random.split(KEY, 20_000)))
    spread = samples.std(axis=0)
    assert (spread[3:6] > 0.1).all()
    assert not np.ptp(samples[:, :3], axis=0).any()  # the base path knows no dropout
    assert not np.ptp(samples[:, 6:], axis=0).any()
    error = samples.mean(axis=0) - exact
    assert (np.abs(error[3:6]) < 5 * spread[3:6] / 20_000**0.5).all()


def test_no_dropout_without_a_key(dense, rng):
    x = jnp.asarray(rng.normal(size=(4, 7)), jnp.float32)
    layer, _ = with_side(dense, rng)
    exact = layer(x)
    side = layer.side_paths[0]
    set_side(layer, side._replace(dropout=0.9))
    np.testing.assert_array_equal(layer(x), exact)
    set_side(layer, side._replace(key=KEY))  # nor with a key but a probability of zero
    np.testing.assert_array_equal(layer(x), exact)


def test_dropout_through_bind(params, rng):
    """Each factor pair drops other entries; the same key drops the same ones."""
    config = LoraConfig(rank=2, dropout=0.5)
    factors = noise(rng, init_factors(params, config, KEY))
    x = jnp.asarray(rng.normal(size=(1, 2, 2, 24)), jnp.float32)

    def qkv(block, key=None):
        bound = functional.bind(
            TINY, params, adapter=factors, adapter_dropout=config.dropout, dropout_key=key
        )
        return bound.image_encoder.blocks[block].attn.qkv(x), bound

    exact, _ = qkv(0)
    dropped, bound = qkv(0, KEY)
    again, _ = qkv(0, KEY)
    other, _ = qkv(0, jax.random.key(8))
    np.testing.assert_array_equal(again, dropped)
    for one, two in ((dropped, exact), (dropped, other)):
        assert np.abs(one - two)[..., :24].max() > 1e-3
        assert np.abs(one - two)[..., 48:].max() > 1e-3
        np.testing.assert_array_equal(one[..., 24:48], two[..., 24:48])
    sides = [s for block in bound.image_encoder.blocks for s in block.attn.qkv.side_paths]
    keys = {tuple(np.asarray(jax.random.key_data(side.key))) for side in sides}
    assert len(keys) == len(sides) == 4


def products(jaxpr, shapes):
    """How many matrix products of these shapes a program holds, in whatever depth."""
    found = 0
    for step in jaxpr.eqns:
        if step.primitive.name == "dot_general":
            found += step.outvars[0].aval.shape in shapes
        for value in step.params.values():
            inner = getattr(value, "jaxpr", value)
            found += products(inner, shapes) if hasattr(inner, "eqns") else 0
    return found


def test_no_gradient_of_frozen_kernels_is_formed(params, batch):
    factors = init_factors(params, LoraConfig(rank=2), KEY)

    def loss(factors, params):
        model = functional.bind(TINY, params, adapter=factors)
        return model.encode_image(batch["images"], batch["sizes"]).std()

    kernels = {(24, 72), (72, 24), (24, 36), (36, 24)}  # qkv and mlp, either way round
    of_factors = jax.make_jaxpr(jax.grad(loss))(factors, params)
    of_params = jax.make_jaxpr(jax.grad(loss, argnums=1))(factors, params)
    assert products(of_params.jaxpr, kernels) == 6
    assert products(of_factors.jaxpr, kernels) == 0


def test_first_gradient(params, batch):
    """At the start b is zero: only b moves, and every block's does."""
    factors = init_factors(params, LoraConfig(rank=2), KEY)

    @jax.jit
    @jax.grad
    def gradient(factors):
        model = functional.bind(TINY, params, adapter=factors)
        return model.encode_image(batch["images"], batch["sizes"])[0, 1, 2].std()

    for _, _, a, b in factor_pairs(gradient(factors)):
        assert not a.any()
        assert np.isfinite(b).all()
        assert b.any()


def test_adapter_of_another_model(params):
    factors = {"image_encoder": {"blocks": {"5": {"attn": {"qkv": {"q": {}}}}}}}
    factors["image_encoder"]["blocks"]["5"]["attn"]["qkv"]["q"] = {
        "a": jnp.zeros((24, 2)),
        "b": jnp.zeros((2, 24)),
    }
    layer = re.escape(QKV.format(5))
    with pytest.raises(ValueError, match=f"{layer}: the model has no such dense layer"):
        merge(params, Adapter(factors=factors))
    with pytest.raises(ValueError, match=f"{layer}/q/a: the model has no such layer"):
        functional.bind(TINY, params, adapter=factors)
