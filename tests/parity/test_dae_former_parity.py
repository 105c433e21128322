"""DAE-Former against a transcription in torch: outputs, gradients, sizes and initialisation.

The transcription has the modules and names of mindflow-institue/DAEFormer@9460d3a,
``networks/DAEFormer.py`` and ``networks/segformer.py``, also those that no output depends on.
"""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from compiling import use_old_emitters  # noqa: E402
from samjax.models.dae_former import DaeFormerConfig, init_as_upstream  # noqa: E402
from samjax.models.functional import abstract_params, bind  # noqa: E402
from samjax.trees import flatten, unflatten  # noqa: E402

EVERY_SIZE = "SAMJAX_EVERY_SIZE"
TOLERANCE = 1e-5  # of the standard deviation of an output, of the largest entry of a gradient
TINY = DaeFormerConfig(
    image_size=(48, 80),
    num_multimask=4,
    dims=(12, 20, 28),
    depths=(1, 2, 1),
    decoder_depth=1,
    channel_heads=4,
)
WIDER = DaeFormerConfig(image_size=(16, 32), dims=(48, 64, 80), depths=(1, 1, 1), decoder_depth=1)
UNUSED = re.compile(
    r"decoder_2\.(?!layer_up)"  # the deepest level has no skip connection
    r"|.*\.mlp\d?\.norm[23]\."  # two norms that the Mix-FFN does not call
)
RENAMES = [
    (r"^image_encoder/", "backbone/"),
    *((rf"stages/{i}/patch_embed/", rf"patch_embed{i + 1}/") for i in range(3)),
    *((rf"stages/{i}/blocks/", rf"block{i + 1}/") for i in range(3)),
    *((rf"stages/{i}/norm/", rf"norm{i + 1}/") for i in range(3)),
    (r"^decoder_2/", "decoder_2/layer_up/"),
    *((rf"^(decoder_\d)/blocks/{i}/", rf"\1/layer_former_{i + 1}/") for i in range(2)),
    (r"(mlp\d?)/norm/", r"\1/norm1/"),
    (r"dwconv/", "dwconv/dwconv/"),
    (r"temperature/scale$", "temperature"),
    (r"(kernel|scale)$", "weight"),
    (r"/", "."),
]


@pytest.fixture(autouse=True)
def compiled_quickly(quick_compilation, monkeypatch):
    use_old_emitters(monkeypatch)


def as_image(tokens, grid):
    return tokens.transpose(1, 2).unflatten(2, grid)


def as_tokens(image):
    return image.flatten(2).transpose(1, 2)


def efficient(keys, queries, values):
    """All (b, n, c)."""
    context = keys.softmax(dim=1).transpose(1, 2) @ values
    return queries.softmax(dim=2) @ context


class Efficient(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.keys, self.queries = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.values, self.reprojection = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, tokens, grid):
        image = as_image(tokens, grid)
        parts = [as_tokens(f(image)) for f in (self.keys, self.queries, self.values)]
        return as_tokens(self.reprojection(as_image(efficient(*parts), grid)))


class Channel(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, tokens):
        heads = self.temperature.shape[0]
        parts = self.qkv(tokens).chunk(3, dim=-1)
        q, k, v = (p.unflatten(2, (heads, -1)).permute(0, 2, 3, 1) for p in parts)  # b h c n
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3)
        attended = (scores * self.temperature).softmax(dim=-1) @ v
        return self.proj(attended.permute(0, 3, 1, 2).flatten(2))


class Depthwise(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)


class FFN(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dwconv = Depthwise(hidden)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(hidden) for _ in range(3))

    def forward(self, tokens, grid):
        hidden = self.fc1(tokens)
        mixed = as_tokens(self.dwconv.dwconv(as_image(hidden, grid)))
        return self.fc2(F.gelu(self.norm1(mixed + hidden)))


class Dual(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))
        self.attn, self.channel_attn = Efficient(width), Channel(width, heads)
        self.mlp1, self.mlp2 = FFN(width, 4 * width), FFN(width, 4 * width)

    def forward(self, x, grid):
        x = x + self.attn(self.norm1(x), grid)
        x = x + self.mlp1(self.norm2(x), grid)
        x = x + self.channel_attn(self.norm3(x))
        return x + self.mlp2(self.norm4(x), grid)


class Embed(nn.Module):
    def __init__(self, width_in, width, *patch):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(width_in, width, *patch), nn.LayerNorm(width)

    def forward(self, image):
        image = self.proj(image)
        return self.norm(as_tokens(image)), image.shape[2:]


class Backbone(nn.Module):
    def __init__(self, dims, depths, heads):
        super().__init__()
        patches = (7, 4, 3), (3, 2, 1), (3, 2, 1)
        for i, (width_in, width) in enumerate(zip((3, *dims), dims, strict=False), 1):
            blocks = nn.ModuleList(Dual(width, heads) for _ in range(depths[i - 1]))
            setattr(self, f"patch_embed{i}", Embed(width_in, width, *patches[i - 1]))
            setattr(self, f"block{i}", blocks)
            setattr(self, f"norm{i}", nn.LayerNorm(width))

    def forward(self, image):
        outputs = []
        for i in (1, 2, 3):
            x, grid = getattr(self, f"patch_embed{i}")(image)
            for block in getattr(self, f"block{i}"):
                x = block(x, grid)
            image = as_image(getattr(self, f"norm{i}")(x), grid)
            outputs.append(image)
        return outputs


class CrossAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.reprojection = nn.Conv2d(width, 2 * width, 1)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x, skip, grid):
        attended = as_image(efficient(skip, skip, x), grid)
        return self.norm(as_tokens(self.reprojection(attended)))


class Cross(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(2 * width)
        self.attn, self.mlp = CrossAttention(width), FFN(2 * width, 4 * width)

    def forward(self, x, skip, grid):
        x = torch.cat([x, skip], dim=2) + self.attn(self.norm1(x), self.norm1(skip), grid)
        return x + self.mlp(self.norm2(x), grid)


class Expand(nn.Module):
    def __init__(self, width, out, factor):
        super().__init__()
        self.expand = nn.Linear(width, factor * factor * out, bias=False)
        self.norm, self.factor = nn.LayerNorm(out), factor

    def forward(self, x, grid):
        side = self.factor
        # (row, column, channel) of the cell, from slowest to fastest
        cells = self.expand(x).unflatten(2, (side, side, -1)).unflatten(1, grid)
        return self.norm(cells.permute(0, 1, 3, 2, 4, 5).flatten(1, 4))


class Decoder(nn.Module):
    def __init__(self, below, width, heads, depth, classes=None):
        super().__init__()
        self.x1_linear, self.cross_attn = nn.Linear(below, width), Cross(width)
        self.concat_linear = nn.Linear(2 * width, width)
        last = classes is not None
        self.layer_up = Expand(width, width, 4) if last else Expand(width, width // 2, 2)
        self.last_layer = nn.Conv2d(width, classes, 1) if last else None
        self.depth = depth  # upstream: 2
        for i in range(depth):
            setattr(self, f"layer_former_{i + 1}", Dual(width, heads))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x, grid, skip=None):
        if skip is None:
            return self.layer_up(x, grid)
        x = self.concat_linear(self.cross_attn(self.x1_linear(x), as_tokens(skip), grid))
        for i in range(self.depth):
            x = getattr(self, f"layer_former_{i + 1}")(x, grid)
        x = self.layer_up(x, grid)
        if self.last_layer is None:
            return x
        return self.last_layer(as_image(x, (4 * grid[0], 4 * grid[1])))


class Reference(nn.Module):
    def __init__(self, config):
        super().__init__()
        first, second, third = config.dims
        shared = config.channel_heads, config.decoder_depth
        self.backbone = Backbone(config.dims, config.depths, config.channel_heads)
        self.decoder_2 = Decoder(third, third, *shared)
        self.decoder_1 = Decoder(third // 2, second, *shared)
        self.decoder_0 = Decoder(second // 2, first, *shared, config.num_multimask + 1)

    def forward(self, image):
        """Normalised (b, 3, h, w) to logits (b, classes, h, w)."""
        first, second, third = self.backbone(image)
        x = self.decoder_2(as_tokens(third), third.shape[2:])
        x = self.decoder_1(x, second.shape[2:], second)
        return self.decoder_0(x, first.shape[2:], first)


def torch_name(path):
    for ours, theirs in RENAMES:
        path = re.sub(ours, theirs, path)
    return path


def as_ours(array, shape):
    """A tensor of the transcription in our layout: 1 x 1 convolutions are dense layers."""
    array = np.asarray(array)
    match len(shape):
        case 1:
            array = array.reshape(-1)
        case 2:
            array = array.reshape(array.shape[:2]).T
        case 4:
            array = array.transpose(2, 3, 1, 0)
    assert array.shape == shape
    return array


def carried_over(tensors, config):
    """{name: tensor} of the transcription as our flat tree."""
    flat = flatten(abstract_params(config))
    return {path: as_ours(tensors[torch_name(path)], leaf.shape) for path, leaf in flat.items()}


def randomised(config):
    """The transcription in float64, so that differences are ours, and our parameters.

    Everything is noise, also norms and biases. Keys and queries get larger kernels: of softmaxes
    that are nearly uniform, the gradient is a small difference of large numbers.
    """
    torch.manual_seed(0)
    model = Reference(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() in (2, 4):
                gain = 3 if re.search(r"keys|queries", name) else 1
                nn.init.normal_(parameter, std=gain * parameter[0].numel() ** -0.5)
            else:
                parameter += 0.3 * torch.randn(parameter.shape)
    flat = carried_over({k: v.detach() for k, v in model.named_parameters()}, config)
    return model.double(), unflatten({path: jnp.asarray(leaf) for path, leaf in flat.items()})


def frames(config, count):
    return np.random.default_rng(0).integers(0, 256, (count, *config.image_size, 3), np.uint8)


def for_torch(images):
    """ToTensor, then Normalize(0.5, 0.5)."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    return (scaled - 0.5) / 0.5


def run_ours(config, params, images):
    sizes = jnp.full((len(images), 2), jnp.array(config.image_size))
    prompt = jnp.zeros((len(images), 1, 2)), jnp.zeros((len(images), 1), int)
    return bind(config, params)(jnp.asarray(images), sizes, *prompt).low_res_logits


def relative(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / expected.std()


def assert_same_logits(config, images):
    model, params = randomised(config)
    with torch.inference_mode():
        expected = model(for_torch(images))
    found = jax.jit(run_ours, static_argnums=0)(config, params, images)
    difference = relative(found, expected)
    print(f"\n{difference:.1e} of the standard deviation")
    assert difference <= TOLERANCE


def test_logits():
    assert_same_logits(TINY, frames(TINY, 2))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(EVERY_SIZE), reason=f"set {EVERY_SIZE}=1 for 224²")
def test_logits_of_the_real_size():
    assert_same_logits(DaeFormerConfig(), frames(DaeFormerConfig(), 1))


@pytest.mark.slow
def test_gradients():
    """Of a weighted sum of the logits, with respect to every parameter that they depend on."""
    model, params = randomised(TINY)
    images = frames(TINY, 2)
    weights = np.random.default_rng(1).normal(size=(2, 5, 48, 80)).astype(np.float32)
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(run_ours(TINY, p, images) * weights)))(params)
    (model(for_torch(images)) * torch.from_numpy(weights)).sum().backward()

    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {name for name, _ in model.named_parameters() if UNUSED.match(name)}
    theirs = {name: p.grad for name, p in model.named_parameters() if name not in unused}
    expected = carried_over(theirs, TINY)
    assert sorted(map(torch_name, expected)) == sorted(theirs)

    differences = {}
    for path, gradient in flatten(gradients).items():
        # A softmax over the tokens does not see what is added to all keys: the gradient is zero.
        measure = path.replace("keys/bias", "keys/kernel")
        largest = np.abs(expected[measure]).max()
        differences[path] = np.abs(np.asarray(gradient) - expected[path]).max() / largest
    worst = max(differences, key=lambda path: differences[path])
    print(f"\n{worst}: {differences[worst]:.1e} of the largest entry")
    assert {k: v for k, v in differences.items() if v > TOLERANCE} == {}


def test_number_of_parameters():
    """The paper states 48.1 M, of which 38 % are never used."""
    config = DaeFormerConfig()
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Reference(config).named_parameters()}
    unused = sum(size for name, size in sizes.items() if UNUSED.match(name))
    assert (sum(sizes.values()), unused) == (48_073_065, 18_382_864)
    ours = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    assert ours == 48_073_065 - 18_382_864


def test_initialisation():
    """The same standard deviation and bounds, tensor by tensor, as far as chance allows."""
    torch.manual_seed(0)
    theirs = {k: v.detach() for k, v in Reference(WIDER).named_parameters()}
    expected = carried_over(theirs, WIDER)
    for path, leaf in flatten(init_as_upstream(WIDER)).items():
        found, theirs = np.asarray(leaf), expected[path]
        if theirs.std() == 0:
            assert (found == theirs).all(), path
        else:
            chance = theirs.size**-0.5
            assert abs(found.std() / theirs.std() - 1) < 3 * chance, path
            assert abs(np.abs(found).max() / np.abs(theirs).max() - 1) < chance, path
