"""SimCLRv2's ResNet with selective kernels: the teacher of SAMora's image expert.

Papers: Chen et al., "Big Self-Supervised Models are Strong Semi-Supervised Learners" (SimCLRv2,
arXiv 2006.10029); selective kernels, arXiv 1903.06586; the stem and the shortcuts are ResNet-D's,
arXiv 1812.01187. SAMora (arXiv 2511.08626) takes the ResNet-50 of width 2. Upstream:
google-research/simclr@383d414, ``resnet.py`` and ``model_util.py``.

Batch norm keeps its running statistics among the parameters, as the leaves ``mean`` and
``variance``. A pass with ``train=True`` normalises by the batch and hands the new running
statistics back; nothing changes in place.

Differs from upstream: networks without selective kernels are left out, and fresh parameters are
those of `init_params`, where upstream starts the last norm of a block at scale 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from samjax.models.layers import Remat, conv

EPSILON = 1e-5  # of batch norm
DECAY = 0.9  # of the running statistics; 0.1 of what the batch has comes in

Statistics = dict[str, Any]
"""A part of the parameter tree: nested, only the leaves ``mean`` and ``variance``, float32."""


@dataclass(frozen=True, kw_only=True)
class SkResNetConfig:
    """Sizes of the network; the defaults are ``r50_2x_sk1``'s, 140 M parameters without the head.

    Raises ``ValueError`` for a size that is not positive.
    """

    family: ClassVar[str] = "simclr"  # as a weights file calls it

    image_size: tuple[int, int] = (224, 224)  # (height, width) it was trained at; any other works
    blocks: tuple[int, ...] = (3, 4, 6, 3)  # bottlenecks a stage; these make depth 50
    width_multiplier: int = 2
    channels: int = 64  # of the stem and within the first stage's bottlenecks, at width 1
    sk_ratio: float = 0.0625  # hidden channels of a kernel's selection per channel
    sk_min_channels: int = 32  # and at least so many
    head_layers: int = 3  # of the projection head
    head_channels: int = 128  # of what it returns

    def __post_init__(self):
        sizes = {
            "blocks": min(self.blocks, default=0),
            **{name: getattr(self, name) for name in ("width_multiplier", "sk_ratio")},
            **{name: getattr(self, name) for name in ("sk_min_channels", "head_layers")},
            **{"head_channels": self.head_channels, "half of channels": self.width // 2},
        }
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"{name} is {size}, expected more than 0")

    @property
    def width(self) -> int:
        """Channels of the stem, and within the bottlenecks of the first stage."""
        return self.channels * self.width_multiplier

    @property
    def feature_channels(self) -> int:
        """Channels of ``SkResNet.features``: 4096 for the defaults."""
        return 4 * self.width * 2 ** (len(self.blocks) - 1)

    def selection_channels(self, width: int) -> int:
        """Hidden channels of the selection between two kernels of ``width`` channels."""
        return max(int(width * self.sk_ratio), self.sk_min_channels)

    def to_dict(self) -> dict:
        """JSON-able; read back by ``from_dict``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> SkResNetConfig:
        """Lists become tuples again; an unknown field is a ``TypeError``."""
        fields: dict[str, Any] = dict(values)
        for name in ("image_size", "blocks"):
            if name in fields:
                fields[name] = tuple(fields[name])
        return cls(**fields)

    def build(self, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs) -> SkResNet:
        """The module; called abstractly by ``samjax.models.functional``."""
        return SkResNet(self, dtype=dtype, remat=remat, rngs=rngs)


def _exact(dtype: DTypeLike) -> DTypeLike:
    """What norms, softmax and means compute in: float32, or float64 where the model does."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nnx.Module):
    """``y = x kernel``: a 1x1 convolution or a dense layer without bias, which a norm follows."""

    def __init__(self, channels_in: int, channels_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.xavier_uniform()
        self.kernel = nnx.Param(init(rngs.params(), (channels_in, channels_out)))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
        y = rows @ self.kernel[...].astype(self.dtype)
        return y.reshape(*x.shape[:-1], -1)


class BatchNorm(nnx.Module):
    """Normalises each channel over everything else, in float32 at least.

    The variance is the biased one throughout, also in the running statistics: so does the form of
    TensorFlow's batch norm that upstream trains with (PyTorch keeps the unbiased one). On arrays
    that lie on several devices, the batch is the whole batch, upstream's ``global_bn``.
    """

    def __init__(self, channels: int, *, bias: bool = True, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,))) if bias else None
        self.mean = nnx.Param(jnp.zeros((channels,)))
        self.variance = nnx.Param(jnp.ones((channels,)))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*b c"], train: bool) -> tuple[Array, Statistics]:
        values = x.astype(_exact(self.dtype)).reshape(-1, x.shape[-1])  # n c
        mean, variance = self.mean[...], self.variance[...]
        running = {"mean": mean, "variance": variance}
        if train:
            mean = values.mean(0)
            variance = jnp.square(values - mean[None]).mean(0)
            seen = {"mean": mean, "variance": variance}
            running = {k: DECAY * running[k] + (1 - DECAY) * seen[k] for k in running}
        factor = self.scale[...] * jax.lax.rsqrt(variance + EPSILON)
        y = (values - mean[None]) * factor[None]
        if self.bias is not None:
            y = y + self.bias[...][None]
        return y.astype(self.dtype).reshape(x.shape), jax.lax.stop_gradient(running)


class ConvNorm(nnx.Module):
    """A 1x1 or 3x3 convolution and its norm, then ReLU if ``relu``.

    ``stride`` is for 3x3: one pixel of zeros on each side, whatever the size, as upstream pads.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: Literal[1, 3],
        *,
        stride: int = 1,
        relu: bool = True,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        if kernel == 1:
            self.conv = Linear(channels_in, channels_out, dtype=dtype, rngs=rngs)
        else:
            self.conv = conv(
                channels_in,
                channels_out,
                3,
                stride=stride,
                padding=1,
                bias=False,
                dtype=dtype,
                rngs=rngs,
            )
        self.norm = BatchNorm(channels_out, dtype=dtype)
        self.relu = relu

    def __call__(self, x: Float[Array, "*b i"], train: bool) -> tuple[Array, Statistics]:
        y, seen = self.norm(self.conv(x), train)
        return jax.nn.relu(y) if self.relu else y, {"norm": seen}


class SelectiveKernel(nnx.Module):
    """Two 3x3 kernels, mixed channel by channel with weights that the whole image decides."""

    def __init__(self, width: int, hidden: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.kernels = ConvNorm(width, 2 * width, 3, stride=stride, dtype=dtype, rngs=rngs)
        self.squeeze = ConvNorm(width, hidden, 1, dtype=dtype, rngs=rngs)
        self.select = Linear(hidden, 2 * width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> tuple[Array, Statistics]:
        y, seen = self.kernels(x, train)
        y = y.reshape(*y.shape[:3], 2, x.shape[-1])  # b h w 2 c
        squeezed, seen_squeezed = self.squeeze(y.sum(3).mean((1, 2)), train)
        logits = self.select(squeezed).reshape(-1, 1, 1, 2, x.shape[-1])
        weights = jax.nn.softmax(logits.astype(_exact(y.dtype)), axis=3).astype(y.dtype)
        return (y * weights).sum(3), {"kernels": seen, "squeeze": seen_squeezed}


class Bottleneck(nnx.Module):
    """1x1 down to ``width``, a selective kernel, 1x1 up to four times that, around a shortcut.

    The first block of a stage has a shortcut of its own: the average of 2x2 pixels, then 1x1.
    """

    def __init__(
        self,
        config: SkResNetConfig,
        channels_in: int,
        width: int,
        stride: int,
        *,
        project: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        out, hidden = 4 * width, config.selection_channels(width)
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        shortcut = ConvNorm(channels_in, out, 1, relu=False, **options) if project else None
        self.shortcut = shortcut
        self.reduce = ConvNorm(channels_in, width, 1, **options)
        self.selective = SelectiveKernel(width, hidden, stride, **options)
        self.expand = ConvNorm(width, out, 1, relu=False, **options)
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w i"], train: bool) -> tuple[Array, Statistics]:
        seen: Statistics = {}
        residual = x
        if self.shortcut is not None:
            pooled = _average_of_four(x, self.stride)
            residual, seen["shortcut"] = self.shortcut(pooled, train)
        y, seen["reduce"] = self.reduce(x, train)
        y, seen["selective"] = self.selective(y, train)
        y, seen["expand"] = self.expand(y, train)
        return jax.nn.relu(y + residual), seen


def _average_of_four(x: Array, stride: int) -> Array:
    """Means of 2x2 pixels, the output of the size of a strided convolution's.

    Beyond the last row and column lie zeros that a stride of 2 counts and one of 1 does not:
    upstream pads for the one by hand and leaves the other to TensorFlow.
    """
    padding: Any = ((0, 1), (0, 1))  # flax declares a string here
    return nnx.avg_pool(x, (2, 2), (stride, stride), padding, count_include_pad=stride > 1)


class HeadLayer(nnx.Module):
    """One layer of the projection head; the last has neither a bias nor a ReLU."""

    def __init__(
        self, channels_in: int, channels_out: int, last: bool, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.dense = Linear(channels_in, channels_out, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(channels_out, bias=not last, dtype=dtype)
        self.last = last

    def __call__(self, x: Float[Array, "b i"], train: bool) -> tuple[Array, Statistics]:
        y, seen = self.norm(self.dense(x), train)
        return y if self.last else jax.nn.relu(y), {"norm": seen}


class SkResNet(nnx.Module):
    """The network with its projection head.

    ``dtype`` is the type of the computation (norms and results are float32 at least); ``remat``
    says what of each bottleneck the backward pass computes anew, as in ``layers.with_remat``, but
    XLA's CPU compiler may merge the two computations again.
    """

    def __init__(self, config: SkResNetConfig, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        width, half = config.width, config.width // 2
        self.stem = nnx.List(
            [
                ConvNorm(3, half, 3, stride=2, **options),
                ConvNorm(half, half, 3, **options),
                ConvNorm(half, width, 3, **options),
            ]
        )
        stages, channels = [], width
        for index, count in enumerate(config.blocks):
            inner, stage = width * 2**index, []
            for i in range(count):
                stride = 2 if i == 0 and index > 0 else 1
                block = Bottleneck(config, channels, inner, stride, project=i == 0, **options)
                stage.append(block)
                channels = 4 * inner
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)
        last = config.head_layers - 1
        outs = [channels] * last + [config.head_channels]
        self.head = nnx.List(
            [HeadLayer(channels, out, i == last, **options) for i, out in enumerate(outs)]
        )
        self.dtype = dtype
        self.remat: Remat = remat

    @overload
    def features(
        self, images: Num[Array, "b h w 3"], train: Literal[False] = False
    ) -> Float[Array, "b c"]: ...
    @overload
    def features(
        self, images: Num[Array, "b h w 3"], train: Literal[True]
    ) -> tuple[Float[Array, "b c"], Statistics]: ...
    def features(
        self, images: Num[Array, "b h w 3"], train: bool = False
    ) -> Float[Array, "b c"] | tuple[Float[Array, "b c"], Statistics]:
        """Images with values 0..255, of any size, to the mean of the last feature map.

        Channels: ``config.feature_channels``. With ``train``, norms take the statistics of this
        batch, and the new running statistics of stem and stages come back as well.
        """
        pooled, seen = self._features(images, train)
        return (pooled, seen) if train else pooled

    @overload
    def __call__(
        self, images: Num[Array, "b h w 3"], train: Literal[False] = False
    ) -> Float[Array, "b c"]: ...
    @overload
    def __call__(
        self, images: Num[Array, "b h w 3"], train: Literal[True]
    ) -> tuple[Float[Array, "b c"], Statistics]: ...
    def __call__(
        self, images: Num[Array, "b h w 3"], train: bool = False
    ) -> Float[Array, "b c"] | tuple[Float[Array, "b c"], Statistics]:
        """As ``features``, but what the projection head makes of them, not normalised to length 1.

        With ``train``, the new running statistics are those of the whole model.
        """
        x, seen = self._features(images, train)
        seen["head"] = {}
        for i, layer in enumerate(self.head):
            x, seen["head"][str(i)] = layer(x, train)
        x = x.astype(_exact(self.dtype))
        return (x, seen) if train else x

    def _features(self, images: Array, train: bool) -> tuple[Array, Statistics]:
        stem: Statistics = {}
        stages: Statistics = {}
        # SimCLR's pixels lie in 0..1; no mean is taken off.
        x = (images.astype(_exact(self.dtype)) / 255).astype(self.dtype)
        for i, layer in enumerate(self.stem):
            x, stem[str(i)] = layer(x, train)
        # TensorFlow's SAME here too: at an even size, only the last row and column lack a pixel.
        x = nnx.max_pool(x, (3, 3), (2, 2), "SAME")
        for index, stage in enumerate(self.stages):
            seen = stages[str(index)] = {}
            for i, block in enumerate(stage):
                x, seen[str(i)] = _run(block, x, train, self.remat)
        return x.astype(_exact(self.dtype)).mean((1, 2)), {"stem": stem, "stages": stages}


def _run(block: Bottleneck, x: Array, train: bool, remat: Remat) -> tuple[Array, Statistics]:
    if not remat:
        return block(x, train)
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(lambda x: block(x, train), policy=policy)(x)
