"""The two mask decoders of H-SAM: a prior mask from SAM's decoder, and a finer one led by it.

Paper: Cheng et al., "Unleashing the Potential of SAM for Medical Adaptation via Hierarchical
Decoding" (arXiv 2403.18271).  Upstream: Cccccczh404/H-SAM@5bdf491,
``segment_anything/modeling/mask_decoder_224.py``, ``mask_decoder_512.py``, ``transformer.py`` and
``sam.py: forward_train``.  Of the paper only the abstract was at hand: this follows the code.

Differs from upstream: any grid (upstream: 14² or 32², written into the code); prompt tokens are
allowed, and the prior mask leaves their attention as it is.  Left out because no loss reaches them:
decoder 2's IoU head, and three norms in each modulated attention that are never called.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from samjax.models.layers import MLP, Dense, Embedding, Perceptron, gelu, layer_norm
from samjax.models.mask_decoder import (
    Attention,
    MaskDecoder,
    TwoWayLayer,
    TwoWayTransformer,
    Upscaling,
)
from samjax.models.ops import resize_bilinear
from samjax.models.prompt_encoder import EncodedPrompt


class Prior(NamedTuple):
    """What decoder 1 hands on: logits and IoU, float32, as ``MaskPrediction`` has them.

    token_maps: products of each mask token with each image token, float32; upscaled: the image
    embedding at four times its resolution.
    """

    low_res_logits: Float[Array, "b m h4 w4"]
    iou: Float[Array, "b m"]
    token_maps: Float[Array, "b m t"]
    upscaled: Float[Array, "b h4 w4 c8"]


def drop(x: Array, probability: float, key: Array | None) -> Array:
    """Dropout as PyTorch's: what is kept grows by 1 / (1 - probability); none without a key."""
    if key is None or not probability:
        return x
    keep = jax.random.bernoulli(key, 1 - probability, x.shape)
    return jnp.where(keep, x / (1 - probability), 0)


class ModulatedAttention(Attention):
    """Attention whose weights a mask may scale after the softmax, without a new normalisation.

    The paper's learnable mask cross-attention, upstream's ``Attention2``.
    """

    def __call__(
        self,
        q: Float[Array, "b s c"],
        k: Float[Array, "b t c"],
        v: Float[Array, "b t c"],
        valid: Bool[Array, "b t"] | None = None,
        modulation: Float[Array, "b s t"] | None = None,
    ) -> Float[Array, "b s c"]:
        if modulation is None:
            return super().__call__(q, k, v, valid)
        q, k, v = (
            x.reshape(*x.shape[:2], self.heads, -1)
            for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        scores = jnp.einsum("bsnd,btnd->bnst", q, k, preferred_element_type=jnp.float32)
        scores = scores / q.shape[-1] ** 0.5
        if valid is not None:
            scores = jnp.where(valid[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = (jax.nn.softmax(scores, axis=-1) * modulation[:, None]).astype(v.dtype)
        out = jnp.einsum("bnst,btnd->bsnd", weights, v)
        return self.out_proj(out.reshape(*out.shape[:2], -1))


class CrossFirstLayer(TwoWayLayer):
    """SAM's layer in H-SAM's order: tokens to image, self-attention, MLP, image to tokens.

    ``modulated``: the cross-attentions have the full width, where SAM's have half of it.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        first: bool,
        modulated: bool,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, heads, hidden, first, dtype=dtype, rngs=rngs)

        def cross() -> ModulatedAttention:
            inner = width if modulated else width // 2
            return ModulatedAttention(width, heads, inner, dtype=dtype, rngs=rngs)

        self.cross_attn_token_to_image = cross()
        self.cross_attn_image_to_token = cross()

    def __call__(self, tokens, image, token_pe, image_pe, valid, prior=None, dropout=0.0, key=None):
        """As ``TwoWayLayer``; prior ``(b, s, t)`` in [0, 1]; dropout on what tokens take up."""
        q, k = tokens + token_pe, image + image_pe
        attended = self.cross_attn_token_to_image(q, k, image, None, prior)
        tokens = self.norm2(tokens + drop(attended, dropout, key))
        if self.first:  # no residual, as in SAM, though the tokens have seen the image by now
            tokens = self.self_attn(tokens, tokens, tokens, valid)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens, valid)
        tokens = self.norm1(tokens)
        tokens = self.norm3(tokens + self.mlp(tokens))
        across = None if prior is None else prior.swapaxes(1, 2)
        attended = self.cross_attn_image_to_token(k, tokens + token_pe, tokens, valid, across)
        return tokens, self.norm4(image + attended)


class CrossFirstTransformer(TwoWayTransformer):
    """SAM's two-way transformer with H-SAM's layers."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        modulated: bool,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, 0, heads, hidden, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [
                CrossFirstLayer(width, heads, hidden, i == 0, modulated, dtype=dtype, rngs=rngs)
                for i in range(depth)
            ]
        )

    def __call__(self, tokens, image, image_pe, valid, prior=None, dropout=0.0, key=None):
        """As ``TwoWayTransformer``; prior ``(b, s, t)`` in [0, 1]; dropout if there is a key."""
        token_pe = tokens
        for i, layer in enumerate(self.layers):
            own_key = None if key is None else jax.random.fold_in(key, i)
            tokens, image = layer(tokens, image, token_pe, image_pe, valid, prior, dropout, own_key)
        attended = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + attended), image


def _tokens(own: Float[Array, "s c"], prompt: EncodedPrompt, dtype: DTypeLike):
    """The decoder's own tokens before the prompt's, ``(b, s + p, c)``, and which of them exist."""
    own = jnp.broadcast_to(own.astype(dtype), (len(prompt.sparse), *own.shape))
    exist = jnp.ones(own.shape[:2], bool)
    tokens = jnp.concatenate([own, prompt.sparse], axis=1)
    return tokens, jnp.concatenate([exist, prompt.valid], axis=1)


def _logits(mask_tokens, mlps, upscaled) -> Float[Array, "b m h w"]:
    """Mask tokens ``(b, m, c)`` through their hypernetworks, times upscaled ``(b, h, w, d)``."""
    heads = jnp.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(mlps)], 1)
    return jnp.einsum("bmc,bhwc->bmhw", heads, upscaled, preferred_element_type=jnp.float32)


class PriorDecoder(MaskDecoder):
    """Decoder 1: SAM's mask decoder, parameter by parameter, with the layers in H-SAM's order.

    SAM's weights load into it by path.  Of those only what belongs to one mask token depends on the
    number of classes: the mask tokens, the hypernetworks, the last layer of the IoU head.  Upstream
    draws the whole of these three parts anew and loads all others.
    """

    def __init__(
        self,
        width: int,
        mask_tokens: int,
        *,
        depth: int,
        heads: int,
        mlp_width: int,
        iou_head_width: int,
        iou_head_depth: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            width,
            mask_tokens,
            depth=0,
            heads=heads,
            mlp_width=mlp_width,
            iou_head_width=iou_head_width,
            iou_head_depth=iou_head_depth,
            dtype=dtype,
            rngs=rngs,
        )
        self.transformer = CrossFirstTransformer(
            width, depth, heads, mlp_width, False, dtype=dtype, rngs=rngs
        )

    def __call__(
        self,
        image_embedding: Float[Array, "b gh gw c"],
        image_pe: Float[Array, "gh gw c"],
        prompt: EncodedPrompt,
    ) -> Prior:
        """One prompt per image of the batch."""
        b, gh, gw, c = image_embedding.shape
        own = jnp.concatenate([self.iou_token(), self.mask_tokens()])
        tokens, valid = _tokens(own, prompt, self.dtype)
        image = (image_embedding + prompt.dense).astype(self.dtype).reshape(b, gh * gw, c)
        image_pe = jnp.broadcast_to(image_pe.reshape(1, gh * gw, c), image.shape)
        tokens, image = self.transformer(tokens, image, image_pe, valid)
        mask_tokens = tokens[:, 1 : len(own)]
        upscaled = self.output_upscaling(image.reshape(b, gh, gw, c))
        maps = jnp.einsum("bmc,btc->bmt", mask_tokens, image, preferred_element_type=jnp.float32)
        logits = _logits(mask_tokens, self.output_hypernetworks_mlps, upscaled)
        iou = self.iou_prediction_head(tokens[:, 0]).astype(jnp.float32)
        return Prior(logits, iou, maps, upscaled)


class ClassMapAttention(nnx.Module):
    """CMAttn: the class maps attend to each other and make one map of what deserves emphasis.

    The paper's class-balanced, mask-guided self-attention.  A token is the map of a class, as wide
    as the grid has cells.
    """

    def __init__(
        self,
        cells: int,
        classes: int,
        heads: int,
        hidden: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.self_attn = Attention(cells, heads, cells, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(cells, eps=1e-5, dtype=dtype, rngs=rngs)
        self.self_attn2 = Attention(cells, heads, cells, dtype=dtype, rngs=rngs)
        self.mlp = MLP(cells, hidden, jax.nn.relu, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(cells, eps=1e-5, dtype=dtype, rngs=rngs)
        self.med_sel = Dense(classes, 1, dtype=dtype, rngs=rngs)

    def __call__(self, maps: Float[Array, "b m t"]) -> Float[Array, "b t 1"]:
        """Not negative, without an upper bound."""
        x = self.norm1(self.self_attn(maps, maps, maps))
        x = self.self_attn2(x, x, x)
        x = self.norm2(x + self.mlp(x))
        return jax.nn.relu(self.med_sel(x.swapaxes(1, 2)))


class SkipUpscaling(nnx.Module):
    """Decoder 2's features beside decoder 1's, c/4 channels, to four times their resolution.

    The paper's hierarchical pixel decoder, upstream's ``skip_connect``; c/16 channels come out.
    """

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def deconv(features_in: int, features_out: int) -> nnx.ConvTranspose:
            return nnx.ConvTranspose(
                features_in,
                features_out,
                (2, 2),
                strides=(2, 2),
                padding="VALID",
                transpose_kernel=True,  # PyTorch's kernels apply unmirrored only this way
                dtype=dtype,
                rngs=rngs,
            )

        self.deconv1 = deconv(width // 4, width // 8)
        self.norm1 = layer_norm(width // 8, eps=1e-6, dtype=dtype, rngs=rngs)
        self.deconv2 = deconv(width // 8, width // 16)
        self.norm2 = layer_norm(width // 16, eps=1e-6, dtype=dtype, rngs=rngs)

    def __call__(
        self, own: Float[Array, "b h4 w4 c8"], earlier: Float[Array, "b h4 w4 c8"]
    ) -> Float[Array, "b h w c16"]:
        x = jnp.concatenate([own, earlier], axis=-1)
        x = gelu(self.norm1(self.deconv1(x)))
        return gelu(self.norm2(self.deconv2(x)))


class GuidedDecoder(nnx.Module):
    """Decoder 2: emphasises, attends and upscales under the guidance of decoder 1's prior.

    ``gated``: CMAttn's map multiplies the image embedding by 1 + its sigmoid; if not, it is doubled
    everywhere and CMAttn's parameters lie idle, as in the released code (``HSamConfig.cmattn``).
    """

    def __init__(
        self,
        width: int,
        mask_tokens: int,
        cells: int,
        *,
        gated: bool,
        depth: int,
        heads: int,
        map_heads: int,
        mlp_width: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.transformer = CrossFirstTransformer(
            width, depth, heads, mlp_width, True, dtype=dtype, rngs=rngs
        )
        self.mask_tokens = Embedding(mask_tokens, width, rngs=rngs)
        self.cmattn = ClassMapAttention(
            cells, mask_tokens, map_heads, mlp_width, dtype=dtype, rngs=rngs
        )
        self.output_upscaling = Upscaling(width, dtype=dtype, rngs=rngs)
        self.skip_connect = SkipUpscaling(width, dtype=dtype, rngs=rngs)
        self.output_hypernetworks_mlps = nnx.List(
            [
                Perceptron(width, width, width // 16, 5, dtype=dtype, rngs=rngs)
                for _ in range(mask_tokens)
            ]
        )
        self.gated = gated
        self.dtype = dtype

    def __call__(
        self,
        image_embedding: Float[Array, "b gh gw c"],
        image_pe: Float[Array, "gh gw c"],
        prompt: EncodedPrompt,
        prior: Prior,
        dropout: float = 0.0,
        key: Array | None = None,
    ) -> Float[Array, "b m h w"]:
        """Logits in float32, 16 times as fine as the grid; dropout only with a key."""
        b, gh, gw, c = image_embedding.shape
        image = (image_embedding + prompt.dense).astype(self.dtype).reshape(b, gh * gw, c)
        image_pe = jnp.broadcast_to(image_pe.reshape(1, gh * gw, c), image.shape)
        if self.gated:
            emphasis = jax.nn.sigmoid(self.cmattn(prior.token_maps).astype(jnp.float32))
            image = image + image * emphasis.astype(self.dtype)
        else:
            image = 2 * image
        tokens, valid = _tokens(self.mask_tokens(), prompt, self.dtype)
        share = jax.nn.softmax(resize_bilinear(prior.low_res_logits, (gh, gw)), axis=1)
        share = share.reshape(b, -1, gh * gw)  # b m t
        of_prompts = jnp.ones((b, prompt.sparse.shape[1], gh * gw))
        share = jnp.concatenate([share, of_prompts], axis=1)
        tokens, image = self.transformer(tokens, image, image_pe, valid, share, dropout, key)
        upscaled = self.output_upscaling(image.reshape(b, gh, gw, c))
        upscaled = self.skip_connect(upscaled, prior.upscaled)
        mask_tokens = tokens[:, : len(self.output_hypernetworks_mlps)]
        return _logits(mask_tokens, self.output_hypernetworks_mlps, upscaled)
