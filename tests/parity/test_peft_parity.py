"""LoRA against PyTorch: loralib's definition, and PEFT itself where it is installed."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny_models
from samjax.models import functional
from samjax.models.layers import Dense, SidePath
from samjax.peft.adapter_files import read_adapter
from samjax.peft.lora import Adapter, LoraConfig, init_factors, merge
from samjax.peft.peft_files import write_peft
from samjax.trees import flatten

torch = pytest.importorskip("torch")

TINY = dataclasses.replace(tiny_models.SAM, decoder_depth=1)
EVERYTHING = LoraConfig(
    rank=3,
    alpha=2.0,
    projections=("q", "v", "o", "mlp"),
    parts=("image_encoder", "mask_decoder"),
)
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def peft():
    """PEFT imports transformers and that torchvision, which needs the same care as upstream."""
    try:
        from convert.reference import import_segment_anything

        import_segment_anything()
        import peft
    except ImportError as error:
        pytest.skip(f"PEFT with transformers, and segment-anything, are not installed: {error}")
    return peft


@pytest.fixture(scope="module")
def upstream(peft):
    """Meta's own modules, random everywhere."""
    from convert.reference import build_reference_sam, randomise

    torch.manual_seed(0)
    return randomise(build_reference_sam(TINY), seed=1)


@pytest.fixture(scope="module")
def params(upstream):
    from convert.bridge import from_torch
    from convert.sam import LEAVES, NAMES

    state = {name: tensor.numpy() for name, tensor in upstream.state_dict().items()}
    own = from_torch(state, functional.abstract_params(TINY), NAMES, LEAVES)
    return jax.tree.map(jnp.asarray, own)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(2)
    return {
        "images": rng.normal(size=(2, 48, 80, 3)).astype("f"),
        "coords": rng.uniform(0, 48, (2, 2, 2)).astype("f"),
    }


def run_torch(sam, inputs):
    """All outputs of an upstream model, LoRA modules in it or not, as one vector."""
    coords = torch.from_numpy(inputs["coords"])
    labels = torch.ones(len(coords), coords.shape[1], dtype=torch.int)
    with torch.no_grad():
        embedding = sam.image_encoder(torch.from_numpy(inputs["images"]).permute(0, 3, 1, 2))
        sparse, dense = sam.prompt_encoder(points=(coords, labels), boxes=None, masks=None)
        positions = sam.prompt_encoder.get_dense_pe()
        outputs = [embedding.permute(0, 2, 3, 1).reshape(-1).numpy()]
        for i in range(len(coords)):  # upstream decodes the prompts of one image at a time
            outputs += sam.mask_decoder.predict_masks(
                embedding[i : i + 1], positions, sparse[i : i + 1], dense[i : i + 1]
            )
    return np.concatenate([np.asarray(output).ravel() for output in outputs])


def run_ours(params, inputs, **options):
    sam = functional.bind(TINY, params, **options)
    coords = jnp.asarray(inputs["coords"])
    coords = jnp.pad(coords, ((0, 0), (0, 1), (0, 0)))
    labels = jnp.array([[1, 1, -1]] * len(coords))  # upstream's padding point

    @jax.jit
    def run(images):
        embedding = sam.image_encoder(images)
        logits, iou = sam.decode(embedding, sam.encode_prompt(coords, labels))[:2]
        outputs = [embedding]
        for i in range(len(coords)):
            outputs += [logits[i], iou[i]]
        return jnp.concatenate([output.ravel() for output in outputs])

    return np.asarray(run(jnp.asarray(inputs["images"])))


def random_adapter(params, config, seed=0):
    rng = np.random.default_rng(seed)
    factors = init_factors(params, config, jax.random.key(seed))
    factors = jax.tree.map(lambda v: v + 0.1 * rng.normal(size=v.shape).astype("f"), factors)
    return Adapter(factors=factors, scale=config.scale)


def close(one, other, relative=1e-5):
    spread = np.std(other)
    np.testing.assert_allclose(np.asarray(one) / spread, np.asarray(other) / spread, atol=relative)


def dense_with_side_paths(weight, bias, pairs, scale):
    """``pairs`` is [(a, b, columns)] in our orientation."""
    layer = Dense(*weight.T.shape, rngs=nnx.Rngs(0))
    layer.kernel[...], layer.bias[...] = jnp.asarray(weight.T), jnp.asarray(bias)

    def run(x, pairs):
        sides = tuple(
            SidePath(a, b, columns, scale)
            for (a, b), (_, _, columns) in zip(pairs, original, strict=True)
        )
        object.__setattr__(layer, "side_paths", sides)  # as bind does it
        return layer(x)

    original = pairs
    return run, [(jnp.asarray(a), jnp.asarray(b)) for a, b, _ in pairs]


def test_dense_equals_peft(peft, rng):
    """Forward and gradient of PEFT's Linear, scale α/r."""
    module = torch.nn.Sequential(torch.nn.Linear(7, 9))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=0.0)
    tuned = peft.get_peft_model(module, config)
    layer = tuned.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x, target = rng.normal(size=(5, 6, 7)).astype("f"), rng.normal(size=(5, 6, 9)).astype("f")
    out = tuned(torch.from_numpy(x))
    (out * torch.from_numpy(target)).sum().backward()

    weight, bias = layer.base_layer.weight.detach().numpy(), layer.base_layer.bias.detach().numpy()
    run, pairs = dense_with_side_paths(
        weight, bias, [(a.detach().numpy().T, b.detach().numpy().T, (0, 9))], scale=6 / 4
    )
    close(run(jnp.asarray(x), pairs), out.detach().numpy())
    gradient = jax.grad(lambda pairs: jnp.vdot(run(jnp.asarray(x), pairs), target))(pairs)
    close(gradient[0][0].T, a.grad.numpy())
    close(gradient[0][1].T, b.grad.numpy())
    assert layer.base_layer.weight.grad is None


def test_peft_loads_what_we_write(peft, upstream, params, inputs, tmp_path):
    """The folder on Meta's own modules, the merged weights in them, and our side path agree."""
    adapter = random_adapter(params, EVERYTHING)
    write_peft(tmp_path, adapter, base_model="a small SAM")
    tuned = peft.PeftModel.from_pretrained(copy.deepcopy(upstream), str(tmp_path)).eval()
    by_peft = run_torch(tuned.base_model.model, inputs)

    from convert.sam import to_torch

    merged = copy.deepcopy(upstream)
    state = {k: torch.from_numpy(v) for k, v in to_torch(merge(params, adapter)).items()}
    merged.load_state_dict(state, strict=True)
    base = run_torch(upstream, inputs)
    assert np.std(by_peft - base) > 0.1 * np.std(base)
    close(by_peft, run_torch(merged, inputs))
    ours = run_ours(params, inputs, adapter=adapter.factors, adapter_scale=adapter.scale)
    close(ours, by_peft)


def test_nothing_is_left_over_in_peft(peft, upstream, params, tmp_path):
    """Every tensor of the folder finds its place, and every LoRA layer in PEFT gets its tensors."""
    adapter = random_adapter(params, EVERYTHING)
    write_peft(tmp_path, adapter)
    config = peft.PeftConfig.from_pretrained(str(tmp_path))
    tuned = peft.get_peft_model(copy.deepcopy(upstream), config)
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(tuned, stored)
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora" in key] == []
    own = peft.get_peft_model_state_dict(tuned)
    assert sorted(own) == sorted(stored)
    assert all(torch.equal(own[key], tensor) for key, tensor in stored.items())


def test_sam2_by_its_module_s_names(peft, tmp_path):
    """What PEFT merges into Meta's SAM 2 from our folder, and we from PEFT's, is what we merge."""
    from convert.families import family_of
    from convert.reference import build_reference_sam2

    family = family_of(tiny_models.SAM2)
    params = tiny_models.random_params(tiny_models.SAM2)
    adapter = random_adapter(params, EVERYTHING)
    sam2 = build_reference_sam2(tiny_models.SAM2)
    sam2.load_state_dict({k: torch.from_numpy(v) for k, v in family.to_torch(params).items()})
    write_peft(tmp_path / "ours", adapter, modules=family.modules(params))
    tuned = peft.PeftModel.from_pretrained(sam2, str(tmp_path / "ours"))
    tuned.save_pretrained(str(tmp_path / "theirs"))
    by_peft = tuned.merge_and_unload().state_dict()
    for folder in ("ours", "theirs"):
        read = read_adapter(tmp_path / folder, family.modules(params))
        ours = family.to_torch(merge(params, read))
        assert ours.keys() == by_peft.keys()
        for name, array in ours.items():
            np.testing.assert_allclose(array, by_peft[name].numpy(), atol=1e-6, err_msg=name)
    with pytest.raises(ValueError, match=r"image_encoder\S+: the model has no such layer"):
        read_adapter(tmp_path / "ours", {"image_encoder/x": "image_encoder.x"})
    with pytest.raises(ValueError, match="layers that the model does not have"):
        write_peft(tmp_path / "no", adapter, modules={"image_encoder/x": "image_encoder.x"})


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {
            "r": 2,
            "lora_alpha": 2,
            "rank_pattern": {"blocks.1.attn.qkv": 5},
            "alpha_pattern": {r"image_encoder\.blocks\.0\.attn\.proj": 8, "q_proj": 3},
        },
    ],
    ids=["uniform", "rank-stabilised", "patterns"],
)
def test_we_read_what_peft_writes(peft, upstream, params, tmp_path, settings):
    config = peft.LoraConfig(target_modules=["attn.qkv", "attn.proj", "q_proj", "lin1"], **settings)
    torch.manual_seed(2)
    tuned = peft.get_peft_model(copy.deepcopy(upstream), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(str(tmp_path))
    expected = tuned.merge_and_unload().state_dict()

    merged = flatten(merge(params, read_adapter(tmp_path)))
    changed = 0
    for path, leaf in merged.items():
        if path.endswith("kernel") and leaf.ndim == 2:
            name = path.replace("/", ".").removesuffix("kernel") + "weight"
            np.testing.assert_allclose(leaf, expected[name].numpy().T, atol=1e-6, err_msg=path)
            changed += not np.array_equal(leaf, flatten(params)[path])
    assert changed == 2 * 3 + 4 + 1  # qkv, proj and lin1 of two blocks; the decoder's own


def test_dora_is_refused(peft, upstream, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["attn.qkv"], use_dora=True)
    peft.get_peft_model(copy.deepcopy(upstream), config).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="use_dora = true: not supported"):
        read_adapter(tmp_path)
