"""SimCLRv2's network and loss against PyTorch, written here after upstream's description.

google-research/simclr@383d414, ``resnet.py`` and ``objective.py``: explicit zeros around what is
strided, TensorFlow's SAME for the rest, batch norm with the biased variance. The modules are made
in upstream's order, so that the bridge's numbers of layers are checked as well. The measure is the
largest difference over the standard deviation of PyTorch's output. PyTorch computes in float64; so
does ours for the gradients, which in float32 have rounding of 1e-4 on either side: a norm over few
pictures divides by how little they differ.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402

from convert.simclr import convert  # noqa: E402
from samjax.models.functional import bind  # noqa: E402
from samjax.models.sk_resnet import SkResNetConfig  # noqa: E402
from samjax.training.contrastive import nt_xent  # noqa: E402
from samjax.trees import flatten, unflatten  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOLERANCE = 1e-5  # of the standard deviation
TOLERANCE_64 = 1e-6  # where both compute in float64: the bridge rounds what is expected

TINY = SkResNetConfig(
    blocks=(1, 2),
    width_multiplier=1,
    channels=6,
    sk_ratio=1.25,
    sk_min_channels=9,
    head_layers=2,
    head_channels=7,
)
BATCH = 8
SIZE = (38, 27)  # at each halving one side is odd and one even: 38 19 10 5, 27 14 7 4
NORMS = 3 + 3 * 4 + 2 + 2  # stem, bottlenecks, shortcuts, head


class Upstream:
    """The network as functions over named tensors {upstream's name: tensor}."""

    def __init__(self, config, train, tensors=None, seed=0):
        self.config, self.train = config, train
        self.tensors = {} if tensors is None else tensors
        self.generator = torch.Generator().manual_seed(seed)
        self.statistics = {}

    def variable(self, name, shape, low, high):
        if name not in self.tensors:
            values = torch.rand(shape, generator=self.generator, dtype=torch.float64)
            self.tensors[name] = (low + (high - low) * values).requires_grad_()
        return self.tensors[name]

    def numbered(self, kind):
        number = self.counts[kind] = self.counts.get(kind, -1) + 1
        return f"base_model/{kind}" + (f"_{number}" if number else "")

    def conv(self, x, filters, size, stride=1):
        bound = (3 / (size * size * x.shape[1])) ** 0.5
        name = self.numbered("conv2d") + "/kernel"
        kernel = self.variable(name, (size, size, x.shape[1], filters), -bound, bound)
        before = (size - 1) // 2
        x = F.pad(x, (before, size - 1 - before) * 2)
        return F.conv2d(x, kernel.permute(3, 2, 0, 1), stride=stride)

    def norm(self, x, relu=True, center=True, name=None):
        name = name or self.numbered("batch_normalization")
        c = x.shape[1]
        gamma = self.variable(f"{name}/gamma", (c,), 0.5, 1.5)
        beta = self.variable(f"{name}/beta", (c,), -0.5, 0.5) if center else torch.zeros(c)
        moving = [
            self.variable(f"{name}/moving_mean", (c,), -0.3, 0.3).detach(),
            self.variable(f"{name}/moving_variance", (c,), 0.5, 1.5).detach(),
        ]
        if self.train:
            axes = [axis for axis in range(x.ndim) if axis != 1]
            batch = x.mean(axes), x.var(axes, unbiased=False)
            for old, new, leaf in zip(moving, batch, ("mean", "variance"), strict=True):
                self.statistics[f"{name}/moving_{leaf}"] = 0.9 * old + 0.1 * new
            moving = [None, None]
        y = F.batch_norm(x, *moving, gamma, beta.to(x), self.train, eps=1e-5)
        return F.relu(y) if relu else y

    def selective(self, x, filters, stride):
        hidden = max(int(filters * self.config.sk_ratio), self.config.sk_min_channels)
        streams = self.norm(self.conv(x, 2 * filters, 3, stride))
        streams = torch.stack(torch.split(streams, filters, dim=1))
        pooled = streams.sum(0).mean((2, 3), keepdim=True)
        pooled = self.norm(self.conv(pooled, hidden, 1))
        mixing = torch.stack(torch.split(self.conv(pooled, 2 * filters, 1), filters, dim=1))
        return (streams * torch.softmax(mixing, 0)).sum(0)

    def bottleneck(self, x, filters, stride, project):
        shortcut = x
        if project:
            padded = F.pad(x, (0, 1, 0, 1))
            counted = F.pad(torch.ones_like(x), (0, 1, 0, 1), value=float(stride > 1))
            shortcut = F.avg_pool2d(padded, 2, stride) / F.avg_pool2d(counted, 2, stride)
            shortcut = self.norm(self.conv(shortcut, 4 * filters, 1), relu=False)
        y = self.norm(self.conv(x, filters, 1))
        y = self.selective(y, filters, stride)
        y = self.norm(self.conv(y, 4 * filters, 1), relu=False)
        return F.relu(y + shortcut)

    def features(self, images):
        self.counts = {}
        width = self.config.channels * self.config.width_multiplier
        x = images.permute(0, 3, 1, 2) / 255
        for filters, stride in ((width // 2, 2), (width // 2, 1), (width, 1)):
            x = self.norm(self.conv(x, filters, 3, stride))
        lacking = [max((-(-side // 2) - 1) * 2 + 3 - side, 0) for side in x.shape[2:]]
        pads = [(total // 2, total - total // 2) for total in lacking]
        x = F.max_pool2d(F.pad(x, (*pads[1], *pads[0]), value=-torch.inf), 3, 2)
        for stage, blocks in enumerate(self.config.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = self.bottleneck(x, width * 2**stage, stride, project=block == 0)
        return x.mean((2, 3))

    def project(self, x):
        for i in range(self.config.head_layers):
            last = i == self.config.head_layers - 1
            out = self.config.head_channels if last else x.shape[1]
            name = f"head_contrastive/nl_{i}"
            bound = (6 / (x.shape[1] + out)) ** 0.5
            x = x @ self.variable(f"{name}/dense/kernel", (x.shape[1], out), -bound, bound)
            x = self.norm(x, not last, not last, f"{name}/batch_normalization")
        return x


def as_ours(tensors) -> dict[str, np.ndarray]:
    """{our path: array}, by way of the bridge."""
    return flatten(convert({k: v.detach().numpy() for k, v in tensors.items()}, TINY).params)


def relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())


@pytest.fixture(scope="module")
def tensors() -> dict:
    """Upstream's variables at random; scales, biases and statistics too. float64 of float32."""
    network = Upstream(TINY, train=False)
    with torch.no_grad():
        network.project(network.features(torch.zeros(1, 8, 8, 3, dtype=torch.float64)))
    return {k: v.float().double().requires_grad_() for k, v in network.tensors.items()}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Of a colour and a roughness each: the norms divide by how much pictures differ."""
    rng = np.random.default_rng(0)
    roughness = np.linspace(10, 110, BATCH)[:, None, None, None]
    noise = rng.uniform(-1, 1, (BATCH, *SIZE, 3))
    images = rng.uniform(40, 215, (BATCH, 1, 1, 3)) + roughness * noise
    return np.clip(images, 0, 255).astype(np.float32)


def run_upstream(tensors, images, train):
    network = Upstream(TINY, train, tensors)
    pixels = torch.from_numpy(images).double().requires_grad_()
    features = network.features(pixels)
    return network, pixels, features, network.project(features)


def test_training(tensors, images):
    """Projections, new statistics, and the gradient of each parameter."""
    weights = np.random.default_rng(1).normal(0, 1, (BATCH, 7)).astype(np.float32)
    upstream, _, _, projections = run_upstream(tensors, images, train=True)
    loss = (torch.from_numpy(weights) * projections).sum()
    trained = {k: v for k, v in tensors.items() if "/moving_" not in k}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    expected = as_ours({**tensors, **dict(zip(trained, gradients, strict=True))})
    new = as_ours({**tensors, **upstream.statistics})

    def ours(params):
        model = bind(TINY, params, dtype=jnp.float64)
        projections, statistics = model(jnp.asarray(images), train=True)
        return (weights * projections).sum(), (projections, statistics)

    params = unflatten(as_ours(tensors))
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(ours, has_aux=True))
        result = run(jax.tree.map(jnp.float64, params))
    (_, (found, statistics)), found_gradients = jax.tree.map(np.asarray, result)
    differences = {"projections": relative(found, projections.detach())}
    statistics = flatten(statistics)
    assert len(statistics) == len(upstream.statistics) == 2 * NORMS
    for path, leaf in statistics.items():
        differences[path] = relative(leaf, new[path])
    for path, leaf in flatten(found_gradients).items():
        if path.endswith(("/mean", "/variance")):
            assert not leaf.any()
        else:
            differences[f"gradient of {path}"] = relative(leaf, expected[path])
    worst = max(differences, key=differences.__getitem__)
    print(f"\nat most {differences[worst]:.1e}, of {worst}")
    assert differences[worst] <= TOLERANCE_64


def test_inference(tensors, images):
    """Features, projections, and the gradient of the pixels through both, in float32."""
    rng = np.random.default_rng(1)
    weights = rng.normal(0, 1, (BATCH, 7)).astype(np.float32)
    _, pixels, features, projections = run_upstream(tensors, images, train=False)
    (torch.from_numpy(weights) * projections).sum().backward()

    def ours(images):
        model = bind(TINY, unflatten(as_ours(tensors)))
        projections = model(images)
        return (weights * projections).sum(), (model.features(images), projections)

    run = jax.jit(jax.value_and_grad(ours, has_aux=True))
    (_, found), gradient = run(jnp.asarray(images))
    pairs = zip([*found, gradient], [features, projections, pixels.grad], strict=True)
    differences = [relative(ours, theirs.detach()) for ours, theirs in pairs]
    print("\nfeatures, projections, gradient:", *(f"{d:.1e}" for d in differences))
    assert max(differences) <= TOLERANCE


def test_features_of_another_size(tensors, images):
    """10 x 9 pixels become one."""
    small = images[:, :10, :9]
    with torch.no_grad():
        _, _, expected, _ = run_upstream(tensors, small, train=False)
    params = unflatten(as_ours(tensors))
    found = jax.jit(lambda images: bind(TINY, params).features(images))(jnp.asarray(small))
    assert found.shape == (BATCH, TINY.feature_channels)
    assert relative(found, expected) <= TOLERANCE


def test_nt_xent_is_a_cross_entropy():
    """Of the 2b - 1 other views, the right one; with its gradient, in both views."""
    rng = np.random.default_rng(0)
    for b, c, temperature in ((2, 5, 0.1), (7, 3, 0.5)):
        views = [rng.normal(0, 2, (b, c)).astype(np.float32) for _ in range(2)]
        z1, z2 = (torch.from_numpy(view).double().requires_grad_() for view in views)
        joined = F.normalize(torch.cat([z1, z2]), dim=1)
        others = ~torch.eye(2 * b, dtype=torch.bool)
        logits = (joined @ joined.T / temperature)[others].reshape(2 * b, 2 * b - 1)
        partner = torch.cat([torch.arange(b) + b - 1, torch.arange(b)])  # without the diagonal
        expected = F.cross_entropy(logits, partner)
        expected.backward()
        run = jax.jit(jax.value_and_grad(lambda views, t=temperature: nt_xent(*views, t).mean()))
        value, gradients = run([jnp.asarray(view) for view in views])
        np.testing.assert_allclose(value, expected.detach(), rtol=1e-6)
        for found, z in zip(gradients, (z1, z2), strict=True):
            assert relative(found, z.grad) <= TOLERANCE
