"""H-SAM's two decoders against a transcription of upstream's: outputs and gradients.

Each decoder is fed with the same numbers on both sides, so that no rounding grows on the way; the
whole is compared once. The transcription has the names and the order of operations of
Cccccczh404/H-SAM@5bdf491 (`mask_decoder_224.py`, `transformer.py` and `sam.py` in
`segment_anything/modeling`) and computes in float64, so that what differs is our rounding. The grid
is no square; upstream's are.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import compiling  # noqa: E402
import tiny_models  # noqa: E402
from convert import bridge  # noqa: E402
from convert.sam import LEAVES  # noqa: E402
from convert.sam import NAMES as SAM_NAMES  # noqa: E402
from samjax.models.functional import bind, init_params  # noqa: E402
from samjax.models.hsam import HSamConfig, HSamPrediction, averaged_logits  # noqa: E402
from samjax.models.hsam_decoder import Prior  # noqa: E402
from samjax.models.prompt_encoder import EncodedPrompt  # noqa: E402
from samjax.trees import flatten, unflatten  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOLERANCE = 1e-5  # of the standard deviation of an output, of the largest entry of a gradient
# Adding the same to all keys changes no softmax: these gradients are nothing but rounding, and are
# measured by those of the values' bias in the same attention.
NO_GRADIENT = "k_proj/bias"
CMATTN = ("self_attn", "self_attn2", "norm1", "norm2", "mlp", "med_sel")  # upstream's names
BATCH = 2

# The embedding has its real width. Of 64 channels the last norm would see 4, which are almost equal
# at some pixels: PyTorch in float32 is then 3e-5 away from itself in float64.
CONFIG = HSamConfig(
    image_encoder=dataclasses.replace(
        tiny_models.SAM.image_encoder,
        image_size=(64, 80),
        depth=1,
        global_blocks=(),
        out_channels=256,
    ),
    num_multimask=2,
    decoder_heads=8,
    decoder_mlp_width=40,
    iou_head_width=20,
)
GRID, WIDTH, TOKENS = (4, 5), 256, 3
NAMES = [
    ("mask_decoder2/transformer/{p}", "mask_decoder2.transformer2.{p}"),
    ("mask_decoder2/output_upscaling/deconv1/{p}", "mask_decoder2.output_upscaling.0.{p}"),
    ("mask_decoder2/output_upscaling/norm/{p}", "mask_decoder2.output_upscaling.1.{p}"),
    ("mask_decoder2/output_upscaling/deconv2/{p}", "mask_decoder2.output_upscaling.3.{p}"),
    ("mask_decoder2/skip_connect/deconv1/{p}", "mask_decoder2.skip_connect.0.{p}"),
    ("mask_decoder2/skip_connect/norm1/{p}", "mask_decoder2.skip_connect.1.{p}"),
    ("mask_decoder2/skip_connect/deconv2/{p}", "mask_decoder2.skip_connect.3.{p}"),
    ("mask_decoder2/skip_connect/norm2/{p}", "mask_decoder2.skip_connect.4.{p}"),
    (
        "mask_decoder2/output_hypernetworks_mlps/{p}",
        "mask_decoder2.output_hypernetworks_mlps2.{p}",
    ),
    ("mask_decoder2/cmattn/med_sel/{p}", "mask_decoder2.med_sel.0.{p}"),
    ("mask_decoder2/cmattn/{p}", "mask_decoder2.{p}"),
    *SAM_NAMES,
]


class Attention(nn.Module):
    def __init__(self, width, heads, downsample=1):
        super().__init__()
        inner = width // downsample
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.v_proj, self.out_proj = nn.Linear(width, inner), nn.Linear(inner, width)

    def split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, q, k, v, mask=None):
        q, k, v = self.split(self.q_proj(q)), self.split(self.k_proj(k)), self.split(self.v_proj(v))
        weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)
        if mask is not None:  # after the softmax, the same for all heads
            fits = weights.shape[3] == mask.shape[2]
            weights = weights * (mask if fits else mask.transpose(1, 2)).unsqueeze(1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))


class MLPBlock(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return self.lin2(F.relu(self.lin1(x)))


class MLP(nn.Module):
    def __init__(self, width, hidden, out, depth):
        super().__init__()
        sizes = [width] + [hidden] * (depth - 1) + [out]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class LayerNorm2d(nn.LayerNorm):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    def __init__(self, width, heads, hidden, skip_first_layer_pe, downsample):
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.cross_attn_token_to_image = Attention(width, heads, downsample)
        self.cross_attn_image_to_token = Attention(width, heads, downsample)
        self.mlp = MLPBlock(width, hidden)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm3, self.norm4 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.skip_first_layer_pe = skip_first_layer_pe

    def forward(self, queries, keys, query_pe, key_pe, mask):
        q, k = queries + query_pe, keys + key_pe
        queries = self.norm2(queries + self.cross_attn_token_to_image(q, k, keys, mask))
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)
        queries = self.norm3(queries + self.mlp(queries))
        q, k = queries + query_pe, keys + key_pe
        keys = self.norm4(keys + self.cross_attn_image_to_token(k, q, queries, mask))
        return queries, keys


class Transformer(nn.Module):
    def __init__(self, width, depth, heads, hidden, cross_downsample):
        super().__init__()
        self.layers = nn.ModuleList(
            Block(width, heads, hidden, i == 0, cross_downsample) for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(width, heads, 2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, src, pos_src, tokens, mask=None):
        keys, key_pe = src.flatten(2).transpose(1, 2), pos_src.flatten(2).transpose(1, 2)
        queries = tokens
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, key_pe, mask)
        attended = self.final_attn_token_to_image(queries + tokens, keys + key_pe, keys)
        return self.norm_final_attn(queries + attended), keys


def upscaling(*channels, last_norm):
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(channels)):
        norm = [LayerNorm2d(b)] if last_norm or i + 2 < len(channels) else []
        layers += [nn.ConvTranspose2d(a, b, 2, stride=2), *norm, nn.GELU()]
    return nn.Sequential(*layers)


def masks_of(tokens, mlps, upscaled):
    hyper = torch.stack([mlp(tokens[:, i]) for i, mlp in enumerate(mlps)], dim=1)
    return (hyper @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])


class Decoder1(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, count = config.image_encoder.out_channels, config.num_multimask + 1
        self.transformer = Transformer(
            width, config.decoder_depth, config.decoder_heads, config.decoder_mlp_width, 2
        )
        self.iou_token, self.mask_tokens = nn.Embedding(1, width), nn.Embedding(count, width)
        self.output_upscaling = upscaling(width, width // 4, width // 8, last_norm=False)
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(width, width, width // 8, 3) for _ in range(count)
        )
        self.iou_prediction_head = MLP(width, config.iou_head_width, count, config.iou_head_depth)

    def forward(self, embedding, pe, dense):
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        tokens = tokens.expand(len(embedding), -1, -1)
        hs, src = self.transformer(embedding + dense, pe, tokens)
        mask_tokens = hs[:, 1:]
        msk_feat = mask_tokens @ src.transpose(1, 2)
        src = src.transpose(1, 2).reshape(embedding.shape)
        up_embed = self.output_upscaling(src)
        masks = masks_of(mask_tokens, self.output_hypernetworks_mlps, up_embed)
        return masks, self.iou_prediction_head(hs[:, 0]), msk_feat, up_embed


class Decoder2(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, count = config.image_encoder.out_channels, config.num_multimask + 1
        cells, heads = GRID[0] * GRID[1], 4
        self.transformer2 = Transformer(
            width, config.decoder_depth, config.decoder_heads, config.decoder_mlp_width, 1
        )
        self.mask_tokens = nn.Embedding(count, width)
        self.output_upscaling = upscaling(width, width // 4, width // 8, last_norm=False)
        self.skip_connect = upscaling(width // 4, width // 8, width // 16, last_norm=True)
        self.output_hypernetworks_mlps2 = nn.ModuleList(
            MLP(width, width, width // 16, 5) for _ in range(count)
        )
        self.self_attn, self.self_attn2 = Attention(cells, heads), Attention(cells, heads)
        self.norm1, self.norm2 = nn.LayerNorm(cells), nn.LayerNorm(cells)
        self.mlp = MLPBlock(cells, config.decoder_mlp_width)
        self.med_sel = nn.Sequential(nn.Linear(count, 1), nn.ReLU())
        self.gate = torch.sigmoid if config.cmattn == "intended" else nn.Softmax(dim=1)

    def forward(self, embedding, pe, dense, ps_mask, msk_feat, up_embed):
        src = embedding + dense
        mask = torch.softmax(ps_mask, dim=1).flatten(2)
        x = self.norm1(self.self_attn(msk_feat, msk_feat, msk_feat))
        x = self.self_attn2(x, x, x)
        x = self.med_sel(self.norm2(x + self.mlp(x)).transpose(1, 2))
        x = self.gate(x.transpose(1, 2).unflatten(2, GRID))  # one channel
        src = src + src * x
        tokens = self.mask_tokens.weight.expand(len(embedding), -1, -1)
        hs, keys = self.transformer2(src, pe, tokens, mask)
        upscaled = self.output_upscaling(keys.transpose(1, 2).reshape(src.shape))
        upscaled = self.skip_connect(torch.cat([upscaled, up_embed], dim=1))
        return masks_of(hs, self.output_hypernetworks_mlps2, upscaled)


class Decoders(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mask_decoder, self.mask_decoder2 = Decoder1(config), Decoder2(config)

    def forward(self, embedding, pe, dense):
        low_res, iou, msk_feat, up_embed = self.mask_decoder(embedding, pe, dense)
        ps_mask = F.interpolate(low_res, size=GRID, mode="bilinear")
        return low_res, iou, self.mask_decoder2(embedding, pe, dense, ps_mask, msk_feat, up_embed)


@pytest.fixture(autouse=True)
def quicker_compilation(monkeypatch):
    compiling.use_old_emitters(monkeypatch)


def doubles(array):
    return torch.tensor(np.asarray(array, np.float64))


def nchw(array):
    return doubles(array).movedim(-1, 1)


def decoders_of(tree):
    return {name: tree[name] for name in ("mask_decoder", "mask_decoder2")}


@functools.cache
def jittered_params():
    """An initialised model; what is constant at the start gets noise, because zeros hide errors."""
    rng = np.random.default_rng(1)
    flat = flatten(init_params(CONFIG, seed=3))
    for path, leaf in flat.items():
        if path.endswith(("bias", "scale")):
            flat[path] = leaf + 0.1 * rng.normal(size=leaf.shape).astype("f")
    return unflatten(flat)


@functools.cache
def sides(flag):
    """Our config and parameters, and the reference with the same weights."""
    config = dataclasses.replace(CONFIG, cmattn=flag)
    params = jittered_params()
    theirs = bridge.to_torch(jax.tree.map(np.asarray, decoders_of(params)), NAMES, LEAVES)
    reference = Decoders(config).double()
    reference.load_state_dict({name: torch.from_numpy(a) for name, a in theirs.items()})
    return config, params, reference


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


EMBEDDING, DENSE, POSITIONS = normal(3, *[(BATCH, *GRID, WIDTH)] * 2, (*GRID, WIDTH))
PROMPT = EncodedPrompt(jnp.zeros((BATCH, 0, WIDTH)), jnp.zeros((BATCH, 0), bool), DENSE)
THEIR_POSITIONS = nchw(np.broadcast_to(POSITIONS, EMBEDDING.shape))


def check(name, found, expected, scale):
    """Differences are divided by the scale; the largest one is printed."""
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape, name
    difference = np.abs(found - expected).max() / scale
    print(f"\n{name}: {difference:.1e}", end="")
    assert difference <= TOLERANCE, name


def check_outputs(name, found, expected):
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        wanted = theirs.detach().numpy()
        check(f"{name}, output {i}", ours, wanted, wanted.std())


def check_gradients(found, module, prefix):
    """`found` are ours of the decoder's tensors; upstream's are taken from `module`."""
    theirs = {f"{prefix}.{name}": p.grad.numpy() for name, p in module.named_parameters()}
    expected = flatten(bridge.from_torch(theirs, {prefix: found}, NAMES, LEAVES))
    for path, ours in flatten({prefix: found}).items():
        scale = np.abs(expected[path.replace(NO_GRADIENT, "v_proj/bias")]).max()
        check(path, ours, expected[path], scale)


def pull_back(outputs, cotangents):
    """PyTorch's backward pass from several outputs."""
    torch.autograd.backward(outputs, [doubles(c) for c in cotangents])


def prior_of(outputs):
    """Our `Prior` of what upstream's first decoder returns, rounded to float32.

    The class maps are drawn: an untrained decoder's resemble each other, and gradients through
    attention among them would be differences of almost equal numbers.
    """
    low_res, iou, maps, upscaled = (jnp.asarray(out.numpy(), jnp.float32) for out in outputs)
    (maps,) = normal(11, maps.shape)
    return Prior(low_res, iou, 3 * maps, jnp.moveaxis(upscaled, 1, -1))


def test_decoder_1():
    config, params, reference = sides("intended")
    source = nchw(EMBEDDING).requires_grad_()
    expected = reference.mask_decoder(source, THEIR_POSITIONS, nchw(DENSE))
    cotangents = normal(4, *(out.shape for out in expected))

    @jax.jit
    def run(decoder, embedding, cotangents):
        def outputs(decoder, embedding):
            model = bind(config, {**params, "mask_decoder": decoder})
            prior = model.mask_decoder(embedding, POSITIONS, PROMPT)
            return (*prior[:3], jnp.moveaxis(prior.upscaled, -1, 1))

        out, pull = jax.vjp(outputs, decoder, embedding)
        return out, pull(tuple(cotangents))

    found, (gradients, by_embedding) = run(params["mask_decoder"], EMBEDDING, cotangents)
    check_outputs("decoder 1", found, expected)
    pull_back(expected, cotangents)
    check_gradients(gradients, reference.mask_decoder, "mask_decoder")
    wanted = source.grad.movedim(1, -1).numpy()
    check("embedding", by_embedding, wanted, np.abs(wanted).max())


def test_decoder_2():
    """CMAttn's softmax over one channel replaced by a sigmoid, as we read the paper."""
    config, params, reference = sides("intended")
    with torch.no_grad():
        prior = prior_of(reference.mask_decoder(nchw(EMBEDDING), THEIR_POSITIONS, nchw(DENSE)))
    inputs = [nchw(EMBEDDING), *map(doubles, (prior.low_res_logits, prior.token_maps))]
    inputs = [tensor.requires_grad_() for tensor in (*inputs, nchw(prior.upscaled))]
    embedding, low_res, maps, upscaled = inputs
    ps_mask = F.interpolate(low_res, size=GRID, mode="bilinear")
    module = reference.mask_decoder2
    expected = module(embedding, THEIR_POSITIONS, nchw(DENSE), ps_mask, maps, upscaled)
    (cotangent,) = normal(5, expected.shape)

    @jax.jit
    def run(decoder, embedding, prior, cotangent):
        def output(decoder, embedding, prior):
            model = bind(config, {**params, "mask_decoder2": decoder})
            return model.mask_decoder2(embedding, POSITIONS, PROMPT, prior)

        out, pull = jax.vjp(output, decoder, embedding, prior)
        return out, pull(cotangent)

    found, gradients = run(params["mask_decoder2"], EMBEDDING, prior, cotangent)
    check_outputs("decoder 2", [found], [expected])
    pull_back([expected], [cotangent])
    by_decoder, by_embedding, by_prior = gradients
    check_gradients(by_decoder, module, "mask_decoder2")
    assert not np.any(by_prior.iou)
    found = [by_embedding, by_prior.low_res_logits, by_prior.token_maps, by_prior.upscaled]
    for i, (gradient, tensor) in enumerate(zip(found, inputs, strict=True)):
        wanted = tensor.grad if i in (1, 2) else tensor.grad.movedim(1, -1)
        check(f"input {i}", gradient, wanted.numpy(), wanted.abs().max().item())


def test_whole_model_as_released():
    """With upstream's softmax over one channel: nothing reaches CMAttn, there as here."""
    config, params, reference = sides("released")

    @jax.jit
    def run(embedding):
        model = bind(config, params)
        return model.decode(embedding, PROMPT), model.prompt_encoder.image_positions()

    prediction, positions = run(EMBEDDING)
    positions = nchw(np.broadcast_to(positions, EMBEDDING.shape))
    expected = reference(nchw(EMBEDDING), positions, nchw(DENSE))
    check_outputs("whole, as released", prediction, expected)
    expected[2].square().sum().backward()
    for name, parameter in reference.mask_decoder2.named_parameters():
        in_cmattn = name.split(".")[0] in CMATTN
        assert bool(parameter.grad.any()) == (not in_cmattn), name


def test_averaged_logits():
    """`--stage 3`: upstream brings both decoders' masks to the frame and takes the mean."""
    arrays = normal(6, (BATCH, TOKENS, 16, 20), (BATCH, TOKENS), (BATCH, TOKENS, 64, 80))
    low_res, _, fine = (torch.tensor(np.asarray(array)) for array in arrays)
    for size in ((64, 80), (90, 70)):
        masks = [F.interpolate(x, size, mode="bilinear") for x in (low_res, fine)]
        wanted = ((masks[0] + masks[1]) / 2).movedim(1, -1)
        found = averaged_logits(HSamPrediction(*arrays), size)
        check_outputs(f"average at {size}", [found], [wanted])
