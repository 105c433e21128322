"""H-SAM: SAM without prompts, with a second mask decoder that the first one's masks lead.

Paper: Cheng et al., CVPR 2024 (arXiv 2403.18271).  Upstream: Cccccczh404/H-SAM@5bdf491,
``segment_anything/build_sam.py``, ``modeling/sam.py``, ``utils.py: test_single_volume`` and
``trainer.py``.  The decoders and what differs from upstream in them: ``hsam_decoder.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int, Integer, Num

from samjax.models.hsam_decoder import GuidedDecoder, PriorDecoder, drop
from samjax.models.layers import Remat
from samjax.models.ops import resize_bilinear
from samjax.models.prompt_encoder import EncodedPrompt
from samjax.models.sam import Sam, SamConfig


class HSamPrediction(NamedTuple):
    """Logits of k foreground classes and, in channel 0, of the background; all float32.

    low_res_logits: decoder 1's, a quarter of the frame's size; iou: as decoder 1 predicts it;
    logits: decoder 2's, of the frame's size.
    """

    low_res_logits: Float[Array, "b m h4 w4"]
    iou: Float[Array, "b m"]
    logits: Float[Array, "b m h w"]


@dataclass(frozen=True, kw_only=True)
class HSamConfig(SamConfig):
    """Everything that fixes the shape of an H-SAM, and the noise of its training.

    ``num_multimask`` is the number k of foreground classes.  The frame may be any multiple of 16
    pixels along each side, but the parameters of CMAttn belong to one frame.

    ``cmattn`` says how the map that CMAttn makes of the class maps emphasises the image embedding
    x.  "released": the code takes a softmax over the map's channels, of which there is one, so the
    map is 1 everywhere, x becomes 2 x, and no gradient reaches CMAttn.  "intended": x becomes
    x (1 + sigmoid(map)).  The paper wants an enhancement that is learned; of its text only the
    abstract was at hand, so the form is our choice.  A sigmoid is what the softmax over channels
    becomes when "not emphasised" is the missing second channel with logit 0.  The factor stays
    below the released 2 and does not depend on the size of the grid, which it would with a softmax
    over positions: 1 + 1/196 on average, as good as nothing.  Both have the same parameters.

    ``class_noise`` and ``map_dropout`` act before CMAttn, hence not in "released".  Upstream has
    both at 224², and neither at 512²: there, ``class_noise=(), map_dropout=0.0``.

    Raises ``ValueError`` for sizes that do not fit each other and for values out of their range.
    """

    family: ClassVar[str] = "hsam"

    cmattn: Literal["intended", "released"] = "intended"
    map_heads: int | None = None  # attention heads over class maps; None: upstream's, or a divisor
    embedding_noise: float = 0.2  # std of decoder 2's input noise, of the embedding's range
    cross_dropout: float = 0.2  # of what decoder 2's tokens take from the image
    map_dropout: float = 0.1  # of the class maps, before the noise
    # Std of the noise on class maps, from the rarest class to the most frequent; (): no such noise.
    class_noise: tuple[float, ...] = (0.35, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1, 0.0, 0.0)

    def __post_init__(self):
        vit = self.image_encoder
        if vit.patch_size != 16:
            raise ValueError(f"H-SAM's decoder 2 refines 16 times: patch_size {vit.patch_size}")
        if vit.out_channels % 16:
            raise ValueError(f"out_channels {vit.out_channels} is not a multiple of 16")
        if self.cmattn not in ("intended", "released"):
            raise ValueError(f"cmattn must be intended or released, got {self.cmattn!r}")
        if self.cells % self.cmattn_heads:
            raise ValueError(
                f"map_heads {self.map_heads} does not divide the {self.cells} cells of the grid"
            )
        for name in ("cross_dropout", "map_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        if self.embedding_noise < 0 or any(sigma < 0 for sigma in self.class_noise):
            raise ValueError("embedding_noise and class_noise must not be negative")

    @property
    def cells(self) -> int:
        """Tokens of the image embedding: the width of a class map."""
        gh, gw = self.image_encoder.grid
        return gh * gw

    @property
    def cmattn_heads(self) -> int:
        """``map_heads``, or 7 for 14² cells as upstream, or the largest of 8, 7, 4, 2, 1."""
        if self.map_heads is not None:
            return self.map_heads
        if self.cells == 196:
            return 7
        return next(heads for heads in (8, 7, 4, 2, 1) if self.cells % heads == 0)

    def build(self, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs) -> HSam:
        """The module; called abstractly by ``samjax.models.functional``."""
        return HSam(self, dtype=dtype, remat=remat, rngs=rngs)


class HSam(Sam):
    """Image encoder and prompt encoder of SAM, and two mask decoders.

    SAM's weights load by path, those of parts that depend on the number of masks excepted: see
    ``PriorDecoder``.  ``mask_decoder2`` has no counterpart in SAM.
    """

    def __init__(self, config: HSamConfig, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, remat=remat, rngs=rngs)
        width, tokens = config.image_encoder.out_channels, config.mask_tokens
        self.mask_decoder = PriorDecoder(
            width,
            tokens,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            mlp_width=config.decoder_mlp_width,
            iou_head_width=config.iou_head_width,
            iou_head_depth=config.iou_head_depth,
            dtype=dtype,
            rngs=rngs,
        )
        self.mask_decoder2 = GuidedDecoder(
            width,
            tokens,
            config.cells,
            gated=config.cmattn == "intended",
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            map_heads=config.cmattn_heads,
            mlp_width=config.decoder_mlp_width,
            dtype=dtype,
            rngs=rngs,
        )
        self.config = config

    def __call__(
        self,
        images: Num[Array, "b h w 3"],
        sizes: Int[Array, "b 2"],
        coords: Float[Array, "b p 2"],
        labels: Int[Array, "b p"],
        key: Array | None = None,
        mask: Integer[Array, "b h w"] | None = None,
    ) -> HSamPrediction:
        """The whole model on a batch: image i with prompt i; see ``answer``."""
        return self.answer(self.encode_image(images, sizes), coords, labels, key, mask)

    def answer(
        self,
        features: Float[Array, "b gh gw c"],
        coords: Float[Array, "b p 2"],
        labels: Int[Array, "b p"],
        key: Array | None = None,
        mask: Integer[Array, "b h w"] | None = None,
    ) -> HSamPrediction:
        """What ``__call__`` makes of ``encode_image``'s output; H-SAM itself has no prompts, p = 0.

        A ``key`` switches the training noise and dropout of decoder 2 on; without one the answer is
        deterministic.  ``mask`` are the labels in the frame, 0 for the background and 1 to k, uint8
        as data sets have them; only the class-balanced noise looks at it, and leaves cells of other
        labels alone.  Raises ``ValueError`` if that noise is on and there is no mask.
        """
        return self.decode(features, self.encode_prompt(coords, labels), key, mask)

    def decode(
        self,
        image_embedding: Float[Array, "b gh gw c"],
        prompt: EncodedPrompt,
        key: Array | None = None,
        mask: Integer[Array, "b h w"] | None = None,
    ) -> HSamPrediction:
        """Both decoders; ``key`` and ``mask`` as in ``answer``."""
        positions = self.prompt_encoder.image_positions()
        prior = self.mask_decoder(image_embedding, positions, prompt)
        config, guide, for_dropout = self.config, prior, None
        if key is not None:
            for_embedding, for_maps, for_dropout = jax.random.split(key, 3)
            image_embedding = disturb_embedding(
                image_embedding, config.embedding_noise, for_embedding
            )
            if config.cmattn == "intended":
                maps = _disturb_maps(config, prior.token_maps, mask, for_maps)
                guide = prior._replace(token_maps=maps)
        logits = self.mask_decoder2(
            image_embedding, positions, prompt, guide, config.cross_dropout, for_dropout
        )
        return HSamPrediction(prior.low_res_logits, prior.iou, logits)


def disturb_embedding(
    x: Float[Array, "b gh gw c"], strength: float, key: Array
) -> Float[Array, "b gh gw c"]:
    """Adds normal noise of ``strength`` times the batch's range, its largest less its smallest."""
    return x + strength * (x.max() - x.min()) * jax.random.normal(key, x.shape, x.dtype)


def label_grid(mask: Integer[Array, "b h w"], grid: tuple[int, int]) -> Integer[Array, "b gh gw"]:
    """The label at the centre of each cell of ``grid``."""
    (h, w), (gh, gw) = mask.shape[1:], grid
    rows = (2 * jnp.arange(gh) + 1) * h // (2 * gh)
    columns = (2 * jnp.arange(gw) + 1) * w // (2 * gw)
    return mask[:, rows][:, :, columns]


def class_deviations(
    labels: Integer[Array, "b t"], classes: int, sigmas: tuple[float, ...]
) -> Float[Array, " k"]:
    """The noise's standard deviation for each of ``classes``: the rarer, the more.

    The classes present in the batch are ordered by their number of cells; the rarest gets the first
    of ``sigmas``, the most frequent the last, those between them what lies between, linearly.  With
    as many classes as sigmas each gets its own, as upstream.  Upstream breaks off at a tenth class,
    and with few classes gives even the most frequent one of the large values.
    """
    counts = (labels.reshape(-1, 1) == jnp.arange(classes)[None]).sum(axis=0)
    later = jnp.arange(classes)[:, None] > jnp.arange(classes)[None]
    larger = (counts[:, None] > counts[None]) | ((counts[:, None] == counts[None]) & later)
    present = counts > 0
    rank = (larger & present[None]).sum(axis=1)
    last = present.sum() - 1
    place = 1 - (last - rank) / jnp.maximum(last, 1)
    known = jnp.asarray(sigmas, jnp.float32)
    return jnp.interp(place * (len(sigmas) - 1), jnp.arange(len(sigmas), dtype=jnp.float32), known)


def add_class_noise(
    maps: Float[Array, "b m t"],
    labels: Integer[Array, "b t"],
    sigmas: tuple[float, ...],
    key: Array,
) -> Float[Array, "b m t"]:
    """Adds the class-balanced noise: the maps' mean, and normal noise of the class's deviation.

    Cells whose label is none of the ``m`` classes stay as they are.
    """
    classes = maps.shape[1]
    known = (labels >= 0) & (labels < classes)
    deviation = class_deviations(labels, classes, sigmas)[jnp.where(known, labels, 0)]
    noise = maps.mean() + deviation[:, None] * jax.random.normal(key, maps.shape)
    return jnp.where(known[:, None], maps + noise, maps)


def _disturb_maps(
    config: HSamConfig, maps: Float[Array, "b m t"], mask: Array | None, key: Array
) -> Float[Array, "b m t"]:
    """Dropout and class-balanced noise on the class maps, as ``config`` has them."""
    for_dropout, for_classes = jax.random.split(key)
    maps = drop(maps, config.map_dropout, for_dropout)
    if not config.class_noise:
        return maps
    if mask is None:
        raise ValueError(
            f"class_noise {config.class_noise} needs the label map: pass mask (b, h, w) with the "
            "key, or set class_noise=()"
        )
    labels = label_grid(mask, config.image_encoder.grid).reshape(len(maps), -1)
    return add_class_noise(maps, labels, config.class_noise, for_classes)


def averaged_logits(
    prediction: HSamPrediction, frame_size: tuple[int, int]
) -> Float[Array, "b h w m"]:
    """The mean of both decoders' logits at ``frame_size``, (height, width) in pixels.

    Upstream's ``--stage 3``: decoder 1's are resized bilinearly (``align_corners=False``), decoder
    2's too where they do not have that size.  The class of a pixel is the argmax over channels.
    """
    coarse = resize_bilinear(prediction.low_res_logits, frame_size)
    fine = resize_bilinear(prediction.logits, frame_size)
    return jnp.moveaxis((coarse + fine) / 2, 1, -1)


def two_level_weight(epoch: ArrayLike) -> jax.Array:
    """Weight w of decoder 2's loss in ``(1 - w) L1 + w L2``: 0.6 at epoch 0, then towards 1.

    Upstream's ``0.6 ** (0.990 ** epoch)``; ``epoch`` counts from 0 and may be traced.
    """
    return jnp.power(0.6, jnp.power(0.990, jnp.asarray(epoch, jnp.float32)))
