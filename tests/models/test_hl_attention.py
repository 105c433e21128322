"""Properties of the encoder with experts that need no reference: sizes, start, windows, files."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from samjax.models import hiera, vit
from samjax.models.functional import abstract_params, bind, init_params
from samjax.models.hiera import HieraConfig
from samjax.models.hl_attention import (
    HLAttention,
    SamoraConfig,
    SamoraHieraConfig,
    SamoraSam2Config,
    SamoraViTConfig,
    install_experts,
)
from samjax.models.vit import ViTConfig
from samjax.peft.lora import LoraConfig, init_factors
from samjax.trees import flatten, unflatten
from tiny_models import SAM_PADDED

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("pixel", "patch", "image")


@dataclasses.dataclass(frozen=True)
class EncoderOnly:
    """A model that is nothing but an image encoder; less to trace than a SAM."""

    image_encoder: Any  # ViTConfig or HieraConfig

    def build(self, **options):
        sam = isinstance(self.image_encoder, ViTConfig)
        encoder: Any = vit.ImageEncoder if sam else hiera.ImageEncoder
        model: Any = nnx.Module()
        model.image_encoder = encoder(self.image_encoder, **options)
        return model


# A windowed block with padding on a 6 × 10 grid, and a global one.
SAM = EncoderOnly(dataclasses.replace(SAM_PADDED.image_encoder, depth=2))
# A plain block, then two that pool: one with windows that tile, one with windows of padding.
HIERA = EncoderOnly(
    HieraConfig(
        image_size=(64, 96),
        width=24,
        heads=2,
        stages=(1, 1, 1),
        windows=(8, 6, 3),
        global_blocks=(),
        position_grid=(5, 3),
        out_channels=20,
        top_down_levels=(1, 2),
    )
)
SHALLOW = EncoderOnly(
    dataclasses.replace(HIERA.image_encoder, stages=(1, 1), windows=(8, 6), top_down_levels=(0, 1))
)
BASES = pytest.mark.parametrize("base", [SAM, HIERA], ids=["sam", "sam2"])


def with_experts(base, **fields):
    """The same encoder with experts."""
    plain = base.image_encoder
    encoder = SamoraViTConfig if isinstance(plain, ViTConfig) else SamoraHieraConfig
    return EncoderOnly(encoder(**{**vars(plain), "expert_rank": 3, **fields}))


def noisy(config):
    """Noise on every parameter, added in NumPy, which compiles nothing."""
    rng, tree = np.random.default_rng(1), {}
    for path, leaf in flatten(abstract_params(config)).items():
        start = path.endswith(("scale", "gain", "gate"))
        tree[path] = jnp.asarray(start + rng.normal(0, 0.1, leaf.shape), jnp.float32)
    return unflatten(tree)


def blocks_of(model):
    encoder = model.image_encoder
    return list(getattr(encoder, "trunk", encoder).blocks)


def size(tree, part=""):
    return sum(leaf.size for path, leaf in flatten(tree).items() if part in path)


def encode(config, params, images, **options):
    """The image encoder's last output on normalised images."""
    out = bind(config, params, **options).image_encoder(images)
    return out[-1] if isinstance(out, list) else out


def picture(config, seed=0):
    shape = (2, *config.image_encoder.image_size, 3)
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def factors(config, seed):
    """Factors as stage 1 leaves them: none is zero."""
    tree = init_factors(abstract_params(config), LoraConfig(rank=3), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype("f"), tree)


def relative(found, expected):
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.std(expected))


def one_block(**fields):
    return EncoderOnly(SamoraViTConfig(depth=1, global_blocks=(), **fields))


def test_released_sizes():
    tree = abstract_params(SamoraConfig())
    encoder = tree["image_encoder"]
    assert size(encoder["blocks"]["7"]["fusion"]) == 5_916_674
    assert size(tree, "/fusion/") == 71_000_088
    assert size(tree, "/experts/") == 12 * 3 * (2 * 2 * 4 * 768 + 1)
    assert size(tree) == 93_735_728 + 71_000_088 + 442_404
    reduced = abstract_params(one_block(fusion_width=96))
    level = 3 * 2 * 768 + 3 * (768 * 96 + 96) + (96 * 96 + 96) + (96 * 768 + 768) + 1
    assert size(reduced, "/fusion/") == 2 * level + 2 * 768


@pytest.mark.parametrize(
    ("experts", "count"), [(("patch",), 1_536), (("image", "pixel"), 2_959_105), (NAMES, 5_916_674)]
)
def test_sizes_of_the_ablation(experts, count):
    assert size(abstract_params(one_block(experts=experts)), "/fusion/") == count
    assert size(abstract_params(one_block(experts=experts, fusion="sum")), "/fusion/") == 0


@BASES
def test_names_and_first_values(base):
    config = with_experts(base, fusion_width=8)
    params, plain = (
        {path: np.asarray(leaf) for path, leaf in flatten(init_params(c, seed=4)).items()}
        for c in (config, base)
    )
    assert plain.keys() < params.keys()
    assert all((params[path] == plain[path]).all() for path in plain)
    added = {path: leaf for path, leaf in params.items() if path not in plain}
    block = "image_encoder/blocks/1" if base is SAM else "image_encoder/trunk/blocks/2"
    width_in, width, inner = (24, 24, 8) if base is SAM else (48, 96, 32)
    expected = {
        "experts/pixel/gain": (1,),
        "experts/patch/q/a": (width_in, 3),
        "experts/image/v/b": (3, width),
        "fusion/levels/0/gate": (1,),
        "fusion/levels/1/v_proj/kernel": (width, inner),
        "fusion/levels/1/attn_proj/kernel": (inner, inner),
        "fusion/levels/0/out_proj/kernel": (inner, width),
        "fusion/levels/0/value_norm/scale": (width,),
        "fusion/norm/bias": (width,),
    }
    assert expected == {path: added[f"{block}/{path}"].shape for path in expected}
    for path, leaf in added.items():
        match path.rsplit("/", 1)[-1]:
            case "a":
                bound = leaf.shape[0] ** -0.5
                assert 0.8 * bound < np.abs(leaf).max() <= bound
            case "b" | "bias":
                assert not leaf.any()
            case "gain" | "gate" | "scale":
                assert (leaf == 1).all()


@pytest.mark.parametrize(
    ("base", "fusion", "tolerance"),
    [(SAM, "sum", 1e-6), (SAM, "hl_attn", 1e-6), (SHALLOW, "sum", 1e-5)],
    ids=["sam-sum", "sam-hl_attn", "sam2-sum"],
)
def test_starts_as_the_plain_encoder(base, fusion, tolerance):
    """With b = 0 the differences are exactly zero, and so is what HL-Attn makes of zeros.

    SAM 2's products over a fourfold batch round otherwise: so do the plain encoder's.
    """
    plain, images = noisy(base), picture(base)
    config = with_experts(base, fusion=fusion)
    params = unflatten({**flatten(init_params(config)), **flatten(plain)})
    found = jax.jit(lambda p: encode(config, p, images))(params)
    expected = jax.jit(lambda p: encode(base, p, images))(plain)
    assert relative(found, expected) <= tolerance


@pytest.mark.parametrize(
    ("base", "index", "shape"),
    [
        (SAM, 0, (2, 6, 10, 24)),
        (SAM, 1, (2, 6, 10, 24)),
        (HIERA, 1, (2, 16, 24, 24)),
        (HIERA, 2, (2, 8, 12, 48)),
    ],
    ids=["windowed", "global", "pooled", "pooled with padding"],
)
def test_one_summed_expert_is_stage_one(base, index, shape, rng):
    """base + (A(expert) − base) is what the block gives with the expert as an adapter."""
    config = with_experts(base, fusion="sum", experts=("patch",))
    plain, expert = noisy(base), factors(base, seed=3)
    params = unflatten({**flatten(noisy(config)), **flatten(plain)})
    params = install_experts(params, {"patch": expert}, {"patch": 0.7})
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)

    @jax.jit
    def run(params, plain, expert):
        adapted = bind(base, plain, adapter=expert, adapter_scale=0.7)
        return [blocks_of(m)[index](x) for m in (bind(config, params), adapted, bind(base, plain))]

    found, expected, bare = run(params, plain, expert)
    assert relative(found, expected) < 1e-5
    assert relative(bare, expected) > 0.1


def test_one_expert_is_normalised_only(rng):
    fuse = HLAttention(1, 24, 2, 24, dtype=jnp.float32, rngs=nnx.Rngs(0))
    d = rng.normal(3, 2, (2, 3, 5, 24)).astype("f")
    expected = (d - d.mean(-1, keepdims=True)) / np.sqrt(d.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(fuse([jnp.asarray(d)]), expected, atol=2e-6)


def test_experts_are_fused_from_fine_to_coarse_in_whatever_order_they_are_named():
    config = with_experts(SAM, experts=("image", "pixel"))
    assert config.image_encoder.fusion_order == ("pixel", "image")
    other = with_experts(SAM, experts=("pixel", "image"))
    params = noisy(config)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 10, 24)), jnp.float32)
    assert jax.tree.structure(noisy(other)) == jax.tree.structure(params)
    first, second = (jax.jit(blocks_of(bind(c, params))[0])(x) for c in (config, other))
    np.testing.assert_array_equal(first, second)


def test_windows_do_not_see_each_other(rng):
    """A 6 × 10 grid in windows of 4, the last of which hold padding."""
    config = with_experts(SAM)
    run = jax.jit(blocks_of(bind(config, noisy(config)))[0])
    x = rng.normal(size=(1, 6, 10, 24)).astype("f")
    other = x.copy()
    other[0, 5, 6] = rng.normal(size=24)
    changed = np.abs(run(jnp.asarray(other)) - run(jnp.asarray(x))).max(axis=-1)[0]
    inside = np.zeros((6, 10), bool)
    inside[4:, 4:8] = True
    assert (changed[inside] > 1e-3).all()
    assert (changed[~inside] == 0).all()


def gradients(config, params, remat):
    images = picture(config)

    def loss(params):
        out = encode(config, params, images, remat=remat)
        return jnp.vdot(out, jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    found = flatten(jax.jit(jax.grad(loss))(params))
    return {path: leaf for path, leaf in found.items() if "/fusion/" in path or "/experts/" in path}


def test_remat_changes_no_gradient():
    one = dataclasses.replace(SAM.image_encoder, depth=1, global_blocks=())
    config = with_experts(EncoderOnly(one), experts=("patch",))
    params = noisy(config)
    plain, again = (gradients(config, params, remat) for remat in (False, True))
    assert len(plain) == 2 + 5
    for path, leaf in plain.items():
        atol = 1e-5 * np.abs(leaf).max()
        np.testing.assert_allclose(again[path], leaf, atol=atol, rtol=1e-4, err_msg=path)


def test_backward_reaches_everything_in_sam2():
    config = with_experts(SHALLOW, experts=("image", "pixel"))
    found = gradients(config, noisy(config), remat=True)
    assert len(found) == 2 * ((6 + 10 + 1 + 2) + 2 * 5)
    for path, leaf in found.items():
        assert np.isfinite(leaf).all()
        # Biases of keys move all scores of a query alike: no gradient but rounding.
        assert path.endswith(("k_proj/bias", "key_norm/bias")) or np.any(leaf), path


def test_the_whole_model_in_bfloat16():
    encoder = SamoraViTConfig(**{**vars(SAM.image_encoder), "fusion_width": 8})
    config = SamoraConfig(**{**vars(SAM_PADDED), "image_encoder": encoder})
    images, sizes = jnp.zeros((2, 48, 80, 3)), jnp.full((2, 2), 40)
    coords, labels = jnp.zeros((2, 3, 2)), jnp.ones((2, 3), int)

    def run(params):
        model = bind(config, params, dtype=jnp.bfloat16)
        embedding = model.encode_image(images, sizes)
        return embedding, model.answer(embedding, coords, labels)

    embedding, prediction = jax.eval_shape(run, abstract_params(config))
    assert (embedding.dtype, embedding.shape) == (jnp.bfloat16, (2, 6, 10, 32))
    assert prediction.low_res_logits.shape == (2, 5, 24, 40)


@pytest.mark.parametrize("family", [SamoraConfig, SamoraSam2Config])
def test_configs_survive_json(family):
    encoder = family.encoder(experts=("pixel", "image"), fusion_width=24, fusion="sum")
    config = family(image_encoder=encoder, num_multimask=8)
    assert family.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("encoder", [SamoraViTConfig, SamoraHieraConfig])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": ()}, r"experts must be some of \('pixel', 'patch', 'image'\), each once"),
        ({"experts": ("pixel", "pixel")}, r"each once; got \('pixel', 'pixel'\)"),
        ({"experts": ("pixel", "voxel")}, "'voxel'"),
        ({"expert_rank": 0}, "expert_rank must be 1 to 48, got 0"),
        ({"fusion_width": 9}, "fusion_width 9 is not a multiple of heads 4"),
        ({"width": 50}, "width 50 is not a multiple of heads 4"),
    ],
)
def test_config_refuses(encoder, fields, message):
    with pytest.raises(ValueError, match=message):
        encoder(**{"width": 48, "heads": 4, **fields})


def test_config_refuses_another_fusion():
    config = SamoraViTConfig()
    object.__setattr__(config, "fusion", "mean")  # what tests check at each call, others do not
    with pytest.raises(ValueError, match="fusion must be 'hl_attn' or 'sum', got 'mean'"):
        config.check_experts(config.width, config.heads)


def test_install_experts_puts_each_factor_in_its_place():
    config = with_experts(SAM)
    params = noisy(config)
    experts = {name: factors(SAM, seed) for seed, name in enumerate(NAMES)}
    scales = {"image": 2.0, "pixel": [0.5, 4.0]}
    before, after = flatten(params), flatten(install_experts(params, experts, scales))
    assert list(after) == list(before)
    for path, leaf in after.items():
        _, _, expert = path.partition("/experts/")
        if not expert:
            assert leaf is before[path]
            continue
        name, place = expert.split("/", 1)
        block = path.split("/")[2]
        if place == "gain":
            expected = {"image": [2.0] * 2, "patch": [1.0] * 2, "pixel": scales["pixel"]}
            assert leaf.tolist() == [expected[name][int(block)]]
        else:
            source = f"image_encoder/blocks/{block}/attn/qkv/{place}"
            np.testing.assert_array_equal(leaf, flatten(experts[name])[source])


def test_install_experts_names_everything_that_does_not_fit():
    config = with_experts(SAM, experts=("image", "patch"))
    params = init_params(config)
    patch = flatten(factors(SAM, 0))
    qkv = "image_encoder/blocks/{}/attn/qkv"
    del patch[qkv.format(1) + "/v/b"]
    patch[qkv.format(0) + "/q/a"] = np.zeros((24, 2), "f")
    patch[qkv.format(0) + "/k/a"] = np.zeros((24, 3), "f")
    experts = {"patch": unflatten(patch), "pixel": {}}
    with pytest.raises(ValueError, match="the experts do not fit the model") as error:
        install_experts(params, experts, {"image": [1.0, 2.0, 3.0], "pixel": 1.0})
    lines = str(error.value).splitlines()[1:]
    own = [line.strip() for line in lines if not line.startswith("  image:")]
    assert own == [
        "pixel: the model has no such expert",
        f"patch: no place for {qkv.format(0)}/k/a",
        f"patch: {qkv.format(0)}/q/a has shape (24, 2), expected (24, 3)",
        f"patch: {qkv.format(1)}/v/b is missing",
        "scales: 3 for the 2 blocks of image",
        "scales: the model has no expert pixel",
    ]
    assert len(lines) - len(own) == 2 * 4, "every factor of the expert that was not given"
    assert f"  image: {qkv.format(1)}/v/a is missing" in lines
