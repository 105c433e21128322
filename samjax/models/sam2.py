"""Segment Anything 2 and 2.1: assembly, and the steps of segmenting and tracking.

Paper: Ravi et al., "SAM 2: Segment Anything in Images and Videos" (arXiv 2408.00714).  Upstream:
facebookresearch/sam2@2b90b9f, ``sam2/modeling/sam2_base.py``.

An image is segmented by ``encode_image`` and ``decode``.  A clip is tracked by

* ``segment`` on a prompted frame, ``segment_mask`` where the prompt is a mask,
* ``encode_memory`` of its result, which goes into the memory bank,
* ``track`` on the next frame: ``condition`` on the bank, then segment without a prompt.

Differs from upstream: the memory bank has a fixed number of slots, so that tracking compiles once;
and of the options that no released checkpoint uses, none is here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from samjax.models.hiera import ImageEncoder
from samjax.models.layers import EMBEDDING_INIT, Dense, Perceptron, Remat, conv
from samjax.models.mask_decoder import MaskDecoder, MaskPrediction
from samjax.models.memory_attention import MemoryAttention
from samjax.models.memory_encoder import MemoryEncoder
from samjax.models.ops import (
    normalise_pixels,
    resize_antialiased,
    resize_bilinear,
    sine_positions,
)
from samjax.models.prompt_encoder import EncodedPrompt, PromptEncoder
from samjax.models.sam2_config import Sam2Config
from samjax.prompt_labels import INVALID, NOT_A_POINT

NO_OBJECT_LOGIT = -1024.0  # of every pixel of an object that is not in the frame
MASK_SCALE, MASK_BIAS = 20.0, -10.0  # probabilities and given masks in the memory encoder's scale
STABILITY_DELTA, STABILITY_THRESHOLD = 0.05, 0.98  # when a single mask is taken for stable


Levels = list[Float[Array, "b _ _ c"]]


class ImageFeatures(NamedTuple):
    """embedding: stride 16, without any memory; high_res: stride 4 and 8, as the decoder adds."""

    embedding: Float[Array, "b gh gw c"]
    high_res: tuple[Float[Array, "b h4 w4 c8"], Float[Array, "b h8 w8 c4"]]


class ObjectPrediction(NamedTuple):
    """One mask for each object of a frame.

    low_res_logits: a quarter of the frame's size, -1024 where the object is not in the frame;
    iou: predicted; object_score_logits: positive where it is; pointer: for the memory bank.
    """

    low_res_logits: Float[Array, "b h4 w4"]
    iou: Float[Array, " b"]
    object_score_logits: Float[Array, " b"]
    pointer: Float[Array, "b c"]


class MemoryBank(NamedTuple):
    """What ``b`` objects remember: ``s`` spatial memories and ``p`` pointers, some slots empty.

    ages: frames since the memory, 1 … num_memories - 1; num_memories for a conditioning frame.
    pointer_times: frames since the pointer; negative for a conditioning frame ahead.
    pointer_span: the distance that times are divided by, min(frames of the clip, 16) - 1.
    On a CPU tracking takes the longer, the later the last valid slot: put valid ones first.
    """

    features: Num[Array, "b s gh gw m"]
    ages: Int[Array, "b s"]
    valid: Bool[Array, "b s"]
    pointers: Float[Array, "b p c"]
    pointer_times: Int[Array, "b p"]
    pointer_valid: Bool[Array, "b p"]
    pointer_span: Num[Array, ""]


class Sam2(nnx.Module):
    """Image encoder, memory attention, prompt encoder, mask decoder and memory encoder."""

    def __init__(self, config: Sam2Config, *, dtype: DTypeLike, remat: Remat, rngs: nnx.Rngs):
        encoder, memory_width = config.image_encoder, config.memory_width
        width = encoder.out_channels
        self.image_encoder = ImageEncoder(encoder, dtype=dtype, remat=remat, rngs=rngs)
        self.prompt_encoder = PromptEncoder(
            width, encoder.grid, encoder.image_size, config.mask_channels, dtype=dtype, rngs=rngs
        )
        self.mask_decoder = MaskDecoder(
            width,
            config.mask_tokens,
            depth=config.decoder_depth,
            heads=config.decoder_heads,
            mlp_width=config.decoder_mlp_width,
            iou_head_width=config.iou_head_width,
            iou_head_depth=config.iou_head_depth,
            sam2=True,
            dtype=dtype,
            rngs=rngs,
        )
        self.memory_attention = MemoryAttention(
            width,
            memory_width,
            config.memory_mlp_width,
            config.memory_depth,
            encoder.grid,
            dtype=dtype,
            rngs=rngs,
        )
        self.memory_encoder = MemoryEncoder(width, memory_width, dtype=dtype, rngs=rngs)

        def embedding(*shape: int) -> nnx.Param:
            return nnx.Param(EMBEDDING_INIT(rngs.params(), shape))

        self.memory_time_embed = embedding(config.num_memories, 1, 1, memory_width)
        self.no_memory_embed = embedding(1, 1, width)
        self.no_memory_pos_embed = embedding(1, 1, width)  # in the files, and used by none
        self.no_object_embed = embedding(1, width)  # the pointer to an object that is not there
        self.mask_downsample = conv(1, 1, 4, stride=4, dtype=dtype, rngs=rngs)
        self.pointer_proj = Perceptron(width, width, width, 3, dtype=dtype, rngs=rngs)
        if config.pointer_times:
            self.pointer_time_proj = Dense(width, memory_width, dtype=dtype, rngs=rngs)
        if config.occlusion_embedding:
            self.occluded_embed = embedding(1, memory_width)
        self.config = config
        self.dtype = dtype

    def encode_image(
        self, images: Num[Array, "b h w 3"], sizes: Int[Array, "b 2"] | None = None
    ) -> ImageFeatures:
        """Images of 0..255 RGB in the model frame; ``sizes``: their unpadded (height, width)."""
        return self.project(self.encode_levels(images, sizes))

    def encode_levels(
        self, images: Num[Array, "b h w 3"], sizes: Int[Array, "b 2"] | None = None
    ) -> Levels:
        """What no layer of the mask decoder has touched: strides 4, 8 and 16."""
        return self.image_encoder(normalise_pixels(self.config, images, sizes))

    def project(self, levels: Levels) -> ImageFeatures:
        """The mask decoder's features of ``encode_levels``' output."""
        fine, middle, coarse = levels
        decoder = self.mask_decoder
        return ImageFeatures(coarse, (decoder.conv_s0(fine), decoder.conv_s1(middle)))

    def without_memory(self, embedding: Float[Array, "b gh gw c"]) -> Float[Array, "b gh gw c"]:
        """The embedding of an image, or of a clip's first frame, as the decoder expects it."""
        nothing = self.no_memory_embed[...].astype(embedding.dtype)
        return embedding + nothing.reshape(1, 1, 1, -1)

    def encode_prompt(
        self,
        coords: Float[Array, "b p 2"],
        labels: Int[Array, "b p"],
        mask_logits: Float[Array, "b h4 w4 1"] | None = None,
    ) -> EncodedPrompt:
        """See ``PromptEncoder``; upstream's padding point is always among the points."""
        return self.prompt_encoder(coords, labels, mask_logits)

    def decode(
        self,
        embedding: Float[Array, "b gh gw c"],
        prompt: EncodedPrompt,
        high_res: tuple[Float[Array, "_ h4 w4 c8"], Float[Array, "_ h8 w8 c4"]],
    ) -> MaskPrediction:
        """One prompt per embedding (``without_memory``, or conditioned); masks of all tokens."""
        positions = self.prompt_encoder.image_positions()
        return self.mask_decoder(embedding, positions, prompt, high_res)

    def __call__(
        self,
        images: Num[Array, "b h w 3"],
        sizes: Int[Array, "b 2"],
        coords: Float[Array, "b p 2"],
        labels: Int[Array, "b p"],
    ) -> MaskPrediction:
        """The model on a batch of single images: image i with prompt i.

        Prompts may be SAM's, whose boxes come without upstream's padding point: it is added.
        """
        return self.answer(self.encode_image(images, sizes), coords, labels)

    def answer(
        self,
        features: ImageFeatures,
        coords: Float[Array, "b p 2"],
        labels: Int[Array, "b p"],
    ) -> MaskPrediction:
        """What ``__call__`` makes of ``encode_image``'s output."""
        coords, labels = with_padding_point(coords, labels)
        embedding = self.without_memory(features.embedding)
        return self.decode(embedding, self.encode_prompt(coords, labels), features.high_res)

    def segment(
        self,
        embedding: Float[Array, "b gh gw c"],
        high_res: tuple[Float[Array, "_ h4 w4 c8"], Float[Array, "_ h8 w8 c4"]],
        coords: Float[Array, "b p 2"],
        labels: Int[Array, "b p"],
        mask_logits: Float[Array, "b h4 w4 1"] | None = None,
        *,
        multimask: bool | Bool[Array, " b"],
    ) -> ObjectPrediction:
        """One mask per object: with ``multimask`` the best of several, else the single one.

        Upstream: ``_forward_sam_heads``; it takes several masks for at most one point.
        """
        prompt = self.encode_prompt(coords, labels, mask_logits)
        prediction = self.decode(embedding, prompt, high_res)
        score, tokens = prediction.object_score_logits, prediction.mask_tokens
        assert score is not None
        assert tokens is not None
        best = best_multimask(prediction)
        chosen = jnp.where(multimask, best, stable_mask(prediction, best))
        logits = _pick(prediction.low_res_logits, chosen)
        logits = jnp.where((score > 0)[:, None, None], logits, NO_OBJECT_LOGIT)
        # The pointer is the single mask's token even where another mask stood in for that.
        token = _pick(tokens, jnp.where(multimask, best, 0))
        pointer = self._point_if(score > 0, self.pointer_proj(token))
        return ObjectPrediction(logits, _pick(prediction.iou, chosen), score, pointer)

    def segment_mask(
        self, features: ImageFeatures, masks: Float[Array, "b h w"]
    ) -> ObjectPrediction:
        """A given mask (0 or 1, at the frame's size) as if it had been predicted.

        Upstream: ``_use_mask_as_output``.
        """
        gh, gw = features.embedding.shape[1:3]
        b = len(masks)
        logits = resize_antialiased(masks * MASK_SCALE + MASK_BIAS, (4 * gh, 4 * gw))
        embedding = jnp.broadcast_to(features.embedding, (b, *features.embedding.shape[1:]))
        prompt = self.mask_downsample(masks[..., None])
        pointer = self.segment(
            embedding, features.high_res, *no_points(b), prompt, multimask=False
        ).pointer
        there = masks.any(axis=(1, 2))
        score = jnp.where(there, MASK_SCALE + MASK_BIAS, MASK_BIAS)
        return ObjectPrediction(logits, jnp.ones(b), score, self._point_if(there, pointer))

    def _point_if(self, there: Bool[Array, " b"], pointer: Float[Array, "b c"]):
        nothing = self.no_object_embed[...].astype(pointer.dtype)
        return jnp.where(there[:, None], pointer, nothing)

    def encode_memory(
        self,
        embedding: Float[Array, "_ gh gw c"],
        low_res_logits: Float[Array, "b h4 w4"],
        object_score_logits: Float[Array, " b"],
        prompted: Bool[Array, " b"],
    ) -> Float[Array, "b gh gw m"]:
        """The spatial memory of a frame, from its embedding (without memory) and its masks.

        Where the frame was ``prompted``, the mask counts as certain.  Upstream:
        ``_encode_new_memory``; it keeps memories in bfloat16 whatever the model computes in.
        """
        logits = resize_bilinear(low_res_logits, self.config.image_size)
        certain = (logits > 0).astype(logits.dtype)
        masks = jnp.where(prompted[:, None, None], certain, jax.nn.sigmoid(logits))
        memory = self.memory_encoder(embedding, (masks * MASK_SCALE + MASK_BIAS)[..., None])
        if self.config.occlusion_embedding:
            mark = self.occluded_embed[...].astype(memory.dtype)[:, None, None]
            there = (object_score_logits > 0)[:, None, None, None]
            memory = jnp.where(there, memory, memory + mark)
        return memory

    def condition(
        self, embedding: Float[Array, "1 gh gw c"], bank: MemoryBank
    ) -> Float[Array, "b gh gw c"]:
        """A frame's embedding as each object's memories make it look.

        Every object needs a spatial memory or a pointer.  Upstream:
        ``_prepare_memory_conditioned_features``.
        """
        _, gh, gw, c = embedding.shape
        b, _, _, _, m = bank.features.shape
        split = c // m  # a pointer makes that many memory tokens
        times = self._pointer_positions(bank)
        pointers = bank.pointers.reshape(b, -1, m)
        spatial = jnp.asarray(sine_positions((gh, gw), m)).reshape(1, 1, gh * gw, m)
        ages = self.memory_time_embed[...].reshape(-1, m)[bank.ages - 1]  # b s m
        spatial = (spatial + ages[:, :, None]).reshape(b, -1, m)
        features = bank.features.astype(jnp.float32).reshape(b, -1, m)
        valid = jnp.repeat(bank.valid, gh * gw, axis=1)
        used = jnp.where(bank.valid, jnp.arange(1, bank.valid.shape[1] + 1)[None], 0).max()
        positions = jnp.asarray(sine_positions((gh, gw), c)).reshape(1, gh * gw, c)
        tokens = self.memory_attention(
            embedding.reshape(1, gh * gw, c),
            positions,
            jnp.concatenate([pointers.astype(jnp.float32), features], axis=1),
            jnp.concatenate([jnp.repeat(times, split, axis=1), spatial], axis=1),
            unplaced=pointers.shape[1],
            valid=jnp.concatenate([jnp.repeat(bank.pointer_valid, split, axis=1), valid], axis=1),
            length=pointers.shape[1] + used * (gh * gw),
        )
        return tokens.reshape(b, gh, gw, c)

    def _pointer_positions(self, bank: MemoryBank) -> Float[Array, "b p m"]:
        """Encoded distance in time; zeros in 2.0, which knows none."""
        b, p, c = bank.pointers.shape
        if not self.config.pointer_times:
            return jnp.zeros((b, p, self.config.memory_width))
        half = c // 2
        exponent = 2 * (jnp.arange(half) // 2) / half
        frequency = (10000.0**exponent)[None, None]
        phase = (bank.pointer_times / bank.pointer_span)[..., None] / frequency
        encoded = jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
        return self.pointer_time_proj(encoded)

    def track(
        self, features: ImageFeatures, bank: MemoryBank
    ) -> tuple[ObjectPrediction, Float[Array, "b gh gw m"]]:
        """Every object's mask on a frame without prompts, and the memory of it."""
        embedding = self.condition(features.embedding, bank)
        coords, labels = no_points(len(embedding))
        prediction = self.segment(embedding, features.high_res, coords, labels, multimask=True)
        memory = self.encode_memory(
            features.embedding,
            prediction.low_res_logits,
            prediction.object_score_logits,
            jnp.zeros(len(embedding), bool),
        )
        return prediction, memory


def with_padding_point(
    coords: Float[Array, "b p 2"], labels: Int[Array, "b p"]
) -> tuple[Float[Array, "b q 2"], Int[Array, "b q"]]:
    """A slot more, with upstream's padding point for every prompt that lacks it.

    Upstream's predictors turn a box into two points, and its prompt encoder pads points.
    """
    lacking = (labels >= 0).any(axis=1) & (labels != NOT_A_POINT).all(axis=1)
    padding = jnp.where(lacking, NOT_A_POINT, INVALID)[:, None].astype(labels.dtype)
    return jnp.pad(coords, ((0, 0), (0, 1), (0, 0))), jnp.concatenate([labels, padding], axis=1)


def no_points(batch: int) -> tuple[Float[Array, "b 2 2"], Int[Array, "b 2"]]:
    """What upstream feeds where there is no prompt: two padding points."""
    return jnp.zeros((batch, 2, 2)), jnp.full((batch, 2), NOT_A_POINT)


def best_multimask(prediction: MaskPrediction) -> Int[Array, " b"]:
    """The token, not the first, with the highest predicted IoU."""
    return jnp.argmax(prediction.iou[:, 1:], axis=-1) + 1


def stable_mask(prediction: MaskPrediction, best: Int[Array, " b"]) -> Int[Array, " b"]:
    """The first token, or ``best`` where the first one's mask is not stable.

    Stability is the ratio of the areas above +0.05 and -0.05.  Upstream: the mask decoder's
    ``_dynamic_multimask_via_stability``, which the builders switch on.
    """
    logits = prediction.low_res_logits[:, 0]
    inner = (logits > STABILITY_DELTA).sum(axis=(1, 2)).astype(jnp.float32)
    outer = (logits > -STABILITY_DELTA).sum(axis=(1, 2)).astype(jnp.float32)
    stability = jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0)
    return jnp.where(stability >= STABILITY_THRESHOLD, 0, best)


def single_mask(prediction: MaskPrediction) -> tuple[Float[Array, "b h4 w4"], Float[Array, " b"]]:
    """The single mask and its IoU; the best of the others where it is not stable."""
    index = stable_mask(prediction, best_multimask(prediction))
    return _pick(prediction.low_res_logits, index), _pick(prediction.iou, index)


def _pick(x: Array, index: Int[Array, " b"]) -> Array:
    return jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]
