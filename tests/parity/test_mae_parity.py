"""The masked autoencoder, its bridge, the denoiser and their losses against PyTorch.

Upstream's modules as written in this file, with upstream's names and their order: facebookresearch/
mae needs an old timm, and SAMora is no package. The measure is the largest difference over the
standard deviation of PyTorch's output.
"""

import dataclasses
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from convert import bridge  # noqa: E402
from convert.mae import LEAVES, convert, infer_config, load, main, save, to_torch  # noqa: E402
from samjax.models.denoiser import DenoiserConfig  # noqa: E402
from samjax.models.functional import abstract_params, bind, init_params  # noqa: E402
from samjax.models.mae import MaeConfig, vit_large, vit_tiny  # noqa: E402
from samjax.models.projector import ProjectorConfig  # noqa: E402
from samjax.models.weights import save_tensors  # noqa: E402
from samjax.training.reconstruction_losses import (  # noqa: E402
    denoising_loss,
    feature_mse,
    mae_loss,
)
from samjax.trees import flatten  # noqa: E402
from tiny_models import noisy_params, random_params  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOLERANCE = 1e-5  # of the standard deviation
RECTANGLE = MaeConfig(
    image_size=(12, 20), patch_size=4, width=24, depth=2, heads=3, mlp_ratio=1.5,
    decoder_width=16, decoder_depth=2, decoder_heads=2,
)  # fmt: skip
SQUARE = vit_tiny((48, 48))


class TheirMlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class TheirAttention(nn.Module):
    """timm's: one product for q, k and v."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


class TheirBlock(nn.Module):
    def __init__(self, width: int, heads: int, ratio: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = TheirAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = TheirMlp(width, int(width * ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def their_positions(grid: tuple[int, int], width: int) -> torch.Tensor:
    """In float32 as upstream's present version: x first, then y, each sines and cosines."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    omega = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float32) / (width / 4))
    angles = [torch.outer(axis.flatten(), omega) for axis in (x, y)]
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, width), table])[None]


class TheirMae(nn.Module):
    """MaskedAutoencoderViT, whose shuffle is given instead of drawn."""

    def __init__(self, config: MaeConfig):
        super().__init__()
        width, narrow, patch = config.width, config.decoder_width, config.patch_size
        self.patch, self.config = patch, config

        def blocks(width: int, heads: int, depth: int):
            return nn.ModuleList(TheirBlock(width, heads, config.mlp_ratio) for _ in range(depth))

        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(their_positions(config.grid, width), requires_grad=False)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = blocks(width, config.heads, config.depth)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, narrow)
        self.mask_token = nn.Parameter(torch.randn(1, 1, narrow))
        positions = their_positions(config.grid, narrow)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = blocks(narrow, config.decoder_heads, config.decoder_depth)
        self.decoder_norm = nn.LayerNorm(narrow, eps=1e-6)
        self.decoder_pred = nn.Linear(narrow, patch * patch * 3)

    def encode(self, pixels, keep):
        x = self.patch_embed.proj(pixels).flatten(2).mT + self.pos_embed[:, 1:]
        x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        first = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, tokens, restore):
        x = self.decoder_embed(tokens)
        hidden = restore.shape[1] + 1 - x.shape[1]
        grid = torch.cat([x[:, 1:], self.mask_token.expand(len(x), hidden, -1)], dim=1)
        grid = grid.gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], grid], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def patchify(self, pixels):
        b, _, h, w = pixels.shape
        p = self.patch
        x = pixels.view(b, 3, h // p, p, w // p, p)
        return torch.einsum("nchpwq->nhwpqc", x).reshape(b, -1, p * p * 3)

    def loss(self, pixels, prediction, mask, norm_pix: bool):
        target = self.patchify(pixels)
        if norm_pix:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        errors = ((prediction - target) ** 2).mean(-1)
        return (errors * mask).sum() / mask.sum()


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), expected.detach().double().numpy()
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())


def noisy(model: nn.Module) -> nn.Module:
    """Noise on every parameter but the fixed positions: nothing stays 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.1 * noise
    return model.eval()


def arrays(model: nn.Module) -> dict[str, np.ndarray]:
    return {key: tensor.numpy().copy() for key, tensor in model.state_dict().items()}


def encoder_only(tensors: dict) -> dict:
    return {k: v for k, v in tensors.items() if not k.startswith(("decoder_", "mask_"))}


@pytest.fixture(scope="module")
def pair():
    """Upstream's model of the rectangle, and our parameters of it."""
    torch.manual_seed(0)
    model = noisy(TheirMae(RECTANGLE))
    return model, jax.tree.map(jnp.asarray, convert(arrays(model), RECTANGLE).params)


def test_tokens_prediction_loss_and_gradient(pair, record_property):
    model, params = pair
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 255, (3, 12, 20, 3)).astype(np.float32)
    normalised = (images - np.float32(RECTANGLE.pixel_mean)) / np.float32(RECTANGLE.pixel_std)
    pixels = torch.from_numpy(np.moveaxis(normalised, -1, 1).copy())
    shuffle = torch.rand(3, 15).argsort(1)
    keep, restore = shuffle[:, :4], shuffle.argsort(1)
    mask = torch.ones(3, 15)
    mask[:, :4] = 0
    mask = mask.gather(1, restore)
    tokens = model.encode(pixels, keep)
    prediction = model.decode(tokens, restore)
    losses = [model.loss(pixels, prediction, mask, norm_pix) for norm_pix in (True, False)]
    losses[0].backward()

    @jax.jit
    def ours(params):
        def loss(params):
            mae, ids = bind(RECTANGLE, params), jnp.asarray(keep.numpy())
            tokens = mae.encode(jnp.asarray(images), ids)
            prediction = mae.decode(tokens, ids)
            patches = mae.patches(jnp.asarray(images))
            removed = jnp.asarray(mask.numpy())
            losses = [
                mae_loss(prediction, patches, removed, norm_pix=norm_pix).mean()
                for norm_pix in (True, False)
            ]
            return losses[0], (losses, (tokens, prediction, patches))

        (_, (losses, outputs)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return outputs, losses, gradient

    outputs, our_losses, gradient = ours(params)
    theirs = tokens, prediction, model.patchify(pixels)
    for name, found, expected in zip(("tokens", "prediction", "target"), outputs, theirs):  # noqa: B905
        difference = relative(found, expected)
        record_property(name, float(difference))
        print(f"\n{name}: {difference:.1e} of the standard deviation", end="")
        assert difference <= TOLERANCE
    for found, expected in zip(our_losses, losses, strict=True):
        np.testing.assert_allclose(found, expected.item(), rtol=1e-6)
    back = to_torch(RECTANGLE, jax.tree.map(np.asarray, gradient))
    worst = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            worst = max(worst, relative(back[name], parameter.grad))
    print(f"\ngradient: {worst:.1e} of the standard deviation of each")
    assert worst <= TOLERANCE


def test_there_and_back(pair):
    """Every tensor returns bit for bit, and upstream loads them strictly."""
    model, params = pair
    original, back = arrays(model), to_torch(RECTANGLE, params)
    assert back.keys() == original.keys()
    for key, array in original.items():
        if "pos_embed" in key:
            np.testing.assert_allclose(back[key], array, atol=1e-6, err_msg=key)
        else:
            np.testing.assert_array_equal(back[key], array, err_msg=key)
    fresh = TheirMae(RECTANGLE)
    fresh.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()}, strict=True)


def test_count_of_the_published_model():
    """Upstream's ViT-L on no device: 303.3 M without the decoder, 329.5 M with it."""
    with torch.device("meta"):
        tensors = TheirMae(vit_large()).state_dict()
    sizes = {key: tensor.numel() for key, tensor in tensors.items()}
    assert sum(encoder_only(sizes).values()) == 303_301_632
    assert sum(sizes.values()) == 329_541_888
    assert infer_config(tensors) == infer_config(encoder_only(tensors)) == vit_large()
    ours = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(vit_large())))
    assert ours == 329_541_888 - sizes["pos_embed"] - sizes["decoder_pos_embed"]


@pytest.fixture
def checkpoint(tmp_path):
    """A small square model, and a function that writes its tensors as upstream writes files."""
    tensors = {k: torch.from_numpy(v) for k, v in to_torch(SQUARE, random_params(SQUARE)).items()}

    def write(tensors: dict, name: str = "mae_pretrain.pth", **beside):
        torch.save({"model": tensors, **beside}, tmp_path / name)
        return tmp_path / name

    return tensors, write


def test_file_with_a_decoder(checkpoint):
    tensors, write = checkpoint
    loaded = load(write(tensors, epoch=799))
    assert loaded.config == SQUARE
    assert loaded.metadata["decoder"] == "converted"
    assert loaded.metadata["variant"] == "vit_tiny"
    expected = flatten(random_params(SQUARE))
    for path, leaf in flatten(loaded.params).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_file_of_an_encoder_gets_a_fresh_decoder(checkpoint):
    tensors, write = checkpoint
    config, params, metadata = load(write(encoder_only(tensors)))
    assert config == SQUARE
    assert metadata["decoder"] == "fresh"
    converted, initialised = flatten(random_params(SQUARE)), flatten(init_params(SQUARE))
    found = flatten(params)
    assert found.keys() == converted.keys()
    for path, leaf in found.items():
        source = initialised if path.startswith(("decoder_", "mask_")) else converted
        np.testing.assert_array_equal(leaf, source[path], err_msg=path)


def test_all_mismatches_at_once(checkpoint):
    tensors, write = checkpoint
    broken = dict(tensors)
    del broken["blocks.1.attn.qkv.bias"], broken["decoder_pred.bias"]
    broken["head.weight"] = torch.ones(2, 3)
    broken["norm.bias"] = torch.ones(65)
    path = write(broken)
    with pytest.raises(bridge.BridgeError, match=f"{path} does not fit") as caught:
        load(path)
    assert caught.value.missing == {"blocks.1.attn.qkv.bias": (192,), "decoder_pred.bias": (768,)}
    assert caught.value.unexpected == {"head.weight": (2, 3)}
    assert caught.value.misshaped == {"norm.bias": ((64,), (65,))}


def test_wrong_files(checkpoint):
    tensors, write = checkpoint
    positions = tensors["pos_embed"].clone()
    positions[0, 3, 5] += 2e-5
    longer = torch.cat([positions, positions[:, :1]], dim=1)
    for change, message in (
        ({"pos_embed": positions}, r"\(pos_embed by up to 2\.0e-05, decoder_pos_embed by up to 0"),
        ({"pos_embed": longer, "decoder_pos_embed": longer}, "10 positions are no square grid"),
        ({f"blocks.{i}.norm{j}.bias": torch.ones(20) for i in (0, 1) for j in (1, 2)}
         | {f"blocks.{i}.norm{j}.weight": torch.ones(20) for i in (0, 1) for j in (1, 2)},
         r"its width is 20; known are \[64, 768, 1024, 1280\]"),
    ):  # fmt: skip
        path = write({**tensors, **change})
        with pytest.raises(ValueError, match=message) as caught:
            load(path)
        assert str(path) in str(caught.value)
    path = write({"conv.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"not a masked autoencoder \(its first tensors are conv"):
        load(path)


def test_command(checkpoint, capsys, monkeypatch):
    tensors, write = checkpoint
    source = write(encoder_only(tensors))
    assert main(["--ckpt", str(source)]) == 0
    said = capsys.readouterr().out
    assert "MAE vit_tiny, image 48 x 48" in said
    assert "parameters     218,544" in said
    assert "decoder        fresh" in said
    converted, back = source.with_suffix(".safetensors"), source.with_name("back.pth")
    assert main(["--ckpt", str(converted), "--to-torch", str(back)]) == 0
    returned = torch.load(back, weights_only=True)["model"]
    assert all(torch.equal(returned[key], tensors[key]) for key in encoder_only(tensors))

    before, again = load(source), load(converted)
    assert (again.config, again.metadata) == (before.config, before.metadata)
    assert set(again.metadata) == {"variant", "decoder", "sha256", "source"}
    monkeypatch.setitem(sys.modules, "torch", None)
    assert flatten(load(converted).params).keys() == flatten(before.params).keys()

    capsys.readouterr()
    for wrong in (["--ckpt", str(converted)], ["--ckpt", str(source.with_name("none.pth"))]):
        assert main(wrong) == 1
    said = capsys.readouterr().err
    assert "would overwrite the checkpoint itself" in said
    assert "none.pth: cannot be read" in said


def test_converted_file_that_does_not_fit(tmp_path):
    path, params = tmp_path / "mae.safetensors", random_params(SQUARE)
    save(path, dataclasses.replace(SQUARE, depth=3), params)
    with pytest.raises(bridge.BridgeError, match=r"12 missing, 0 left over"):
        load(path)
    unknown = json.dumps({**SQUARE.to_dict(), "colour": 1})
    save_tensors(path, params, {"family": "mae", "config": unknown})
    with pytest.raises(ValueError, match=r"config in its metadata cannot be used .*colour"):
        load(path)
    save_tensors(path, params, {"family": "sam", "config": "{}"})
    with pytest.raises(ValueError, match="a model of family 'sam'; expected 'mae'"):
        load(path)


class TheirConvNorm(nn.Sequential):
    def __init__(self, i: int, o: int, kernel: int, norm):
        super().__init__(nn.Conv2d(i, o, kernel, padding=kernel // 2, bias=False), norm(o))


class TheirResidual(nn.Module):
    def __init__(self, i: int, o: int, norm):
        super().__init__()
        self.conv1, self.conv2 = TheirConvNorm(i, o, 3, norm), TheirConvNorm(o, o, 3, norm)
        self.shortcut = TheirConvNorm(i, o, 1, norm) if i != o else nn.Identity()

    def forward(self, x):
        return F.gelu(F.gelu(self.conv2(F.gelu(self.conv1(x)))) + self.shortcut(x))


class TheirDenoiser(nn.Module):
    """DenoiseUNetDecoder."""

    def __init__(self, config: DenoiserConfig):
        super().__init__()
        norm = nn.BatchNorm2d if config.norm == "batch" else lambda width: nn.GroupNorm(8, width)
        widths = config.widths
        self.stem = TheirResidual(config.features, widths[0], norm)
        self.up_blocks = nn.ModuleList()
        for i, o in zip(widths, widths[1:]):  # noqa: B905, RUF007
            block = nn.Module()
            block.up = nn.ConvTranspose2d(i, o, 2, stride=2, bias=False)
            block.refine = TheirResidual(o, o, norm)
            self.up_blocks.append(block)
        self.head = TheirConvNorm(widths[-1], widths[-1], 3, norm)
        self.out = nn.Conv2d(widths[-1], 3, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.up_blocks:
            x = block.refine(block.up(x))
        return torch.sigmoid(self.out(F.gelu(self.head(x))))


DENOISER_NAMES = [
    ("{p}/deconv/{q}", "{p}.up.{q}"),
    ("{p}/conv/{q}", "{p}.0.{q}"),
    ("{p}/norm/{q}", "{p}.1.{q}"),
    ("{p}/conv/{q}", "{p}.0.{q}"),
    ("{p}", "{p}"),
]


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_denoiser_and_its_loss(norm, record_property):
    config = DenoiserConfig(features=12, widths=(16, 8), norm=norm)
    params = noisy_params(config)
    leaves = [("deconv/kernel", "weight", "i o h w -> h w o i"), *LEAVES]
    tensors = bridge.to_torch(params, DENOISER_NAMES, leaves)
    tensors["out.weight"] = tensors["out.weight"][..., None, None]
    model = TheirDenoiser(config).train()
    left = model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
    assert not left.unexpected_keys
    assert all("running" in key or "tracked" in key for key in left.missing_keys)
    rng = np.random.default_rng(3)
    features = rng.normal(0.3, 1, (3, 2, 3, 12)).astype(np.float32)
    target = rng.random((3, 4, 6, 3)).astype(np.float32)
    given = torch.from_numpy(np.moveaxis(features, -1, 1).copy()).requires_grad_()
    clean = torch.from_numpy(np.moveaxis(target, -1, 1).copy())
    out = model(given)
    p, y = out.flatten(1), clean.flatten(1)
    dice = 1 - ((2 * (p * y).sum(1) + 1e-5) / (p.sum(1) + y.sum(1) + 1e-5)).mean()
    loss = 0.9 * dice + 0.1 * F.mse_loss(out, clean)
    loss.backward()

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def ours(features):
        image = bind(config, params)(features)
        return denoising_loss(image, jnp.asarray(target)).mean(), image

    (found, image), gradient = ours(jnp.asarray(features))
    difference = relative(image, out.movedim(1, -1))
    slope = relative(gradient, given.grad.movedim(1, -1))
    record_property("image", float(difference))
    print(f"\n{norm}: image {difference:.1e}, gradient {slope:.1e} of the standard deviation")
    assert difference <= TOLERANCE
    assert slope <= TOLERANCE
    np.testing.assert_allclose(found, loss.item(), rtol=1e-6)


@pytest.mark.parametrize("normalise", [False, True])
def test_projector_and_distillation(normalise):
    config = ProjectorConfig(features_in=12, hidden=20, features_out=28)
    params = noisy_params(config)
    net = nn.Sequential(nn.Linear(12, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 28))
    names = [("lin1/{p}", "0.{p}"), ("norm/{p}", "1.{p}"), ("lin2/{p}", "3.{p}")]
    tensors = bridge.to_torch(params, names, LEAVES)
    net.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=True)
    rng = np.random.default_rng(4)
    x, teacher = rng.normal(size=(3, 7, 12)), rng.normal(size=(3, 7, 28))
    given = torch.tensor(x, dtype=torch.float32, requires_grad=True)
    student, fixed = net(given), torch.tensor(teacher, dtype=torch.float32)
    if normalise:
        loss = F.mse_loss(F.normalize(student, dim=-1), F.normalize(fixed, dim=-1))
    else:
        loss = F.mse_loss(student, fixed)
    loss.backward()

    @jax.jit
    @jax.value_and_grad
    def ours(x):
        student = bind(config, params)(x)
        return feature_mse(student, jnp.asarray(teacher, jnp.float32), normalise=normalise).mean()

    found, gradient = ours(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, loss.item(), rtol=1e-6)
    assert relative(gradient, given.grad) <= TOLERANCE
