"""The mask decoder: a two-way transformer, upscaling, hypernetworks and IoU prediction.

Papers: SAM (arXiv 2304.02643), §3 "Mask decoder" and figure 14; SAM 2 (arXiv 2408.00714), §4 and
figure 9, which adds features of higher resolution, an object score and object pointers.  Upstream:
facebookresearch/segment-anything@dca509f, ``segment_anything/modeling/mask_decoder.py`` and
``transformer.py``; facebookresearch/sam2@2b90b9f, ``sam2/modeling/sam/``, the same names.

Differs from upstream: all mask tokens' masks come back (the caller picks; SAMed keeps all k + 1),
and prompt tokens marked invalid are masked out of the attention.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from samjax.models.layers import MLP, Dense, Embedding, Perceptron, conv, gelu, layer_norm
from samjax.models.prompt_encoder import EncodedPrompt


class MaskPrediction(NamedTuple):
    """low_res_logits: one map per mask token, a quarter of the frame's size; iou: predicted.

    SAM 2 only: object_score_logits, positive where the object is in the frame, and mask_tokens,
    the decoder's output of each mask token, of which one becomes the object pointer.
    """

    low_res_logits: Float[Array, "b m h4 w4"]
    iou: Float[Array, "b m"]
    object_score_logits: Float[Array, " b"] | None = None
    mask_tokens: Float[Array, "b m c"] | None = None


class Attention(nnx.Module):
    """Multi-head attention with separate projections and an optional smaller inner width."""

    def __init__(self, width: int, heads: int, inner: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.q_proj = Dense(width, inner, dtype=dtype, rngs=rngs)
        self.k_proj = Dense(width, inner, dtype=dtype, rngs=rngs)
        self.v_proj = Dense(width, inner, dtype=dtype, rngs=rngs)
        self.out_proj = Dense(inner, width, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(
        self,
        q: Float[Array, "b s c"],
        k: Float[Array, "b t c"],
        v: Float[Array, "b t c"],
        valid: Bool[Array, "b t"] | None = None,
    ) -> Float[Array, "b s c"]:
        q, k, v = (
            x.reshape(*x.shape[:2], self.heads, -1)
            for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        scores = jnp.einsum("bsnd,btnd->bnst", q, k, preferred_element_type=jnp.float32)
        scores = scores / q.shape[-1] ** 0.5
        if valid is not None:
            scores = jnp.where(valid[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        out = jnp.einsum("bnst,btnd->bsnd", weights, v)
        return self.out_proj(out.reshape(*out.shape[:2], -1))


class TwoWayLayer(nnx.Module):
    """Self-attention of the tokens, tokens to image, MLP, image to tokens; all post-norm."""

    def __init__(
        self, width: int, heads: int, hidden: int, first: bool, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        def attention(inner: int) -> Attention:
            return Attention(width, heads, inner, dtype=dtype, rngs=rngs)

        def norm() -> nnx.LayerNorm:
            return layer_norm(width, eps=1e-5, dtype=dtype, rngs=rngs)

        self.self_attn, self.norm1 = attention(width), norm()
        self.cross_attn_token_to_image, self.norm2 = attention(width // 2), norm()
        self.mlp = MLP(width, hidden, jax.nn.relu, dtype=dtype, rngs=rngs)
        self.norm3 = norm()
        self.cross_attn_image_to_token, self.norm4 = attention(width // 2), norm()
        self.first = first

    def __call__(self, tokens, image, token_pe, image_pe, valid):
        """tokens, token_pe ``(b, s, c)``; image, image_pe ``(b, t, c)``; valid ``(b, s)``."""
        if self.first:  # the tokens are their own position encoding: no residual, as upstream
            tokens = self.self_attn(tokens, tokens, tokens, valid)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens, valid)
        tokens = self.norm1(tokens)
        q, k = tokens + token_pe, image + image_pe
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(q, k, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        q = tokens + token_pe
        image = self.norm4(image + self.cross_attn_image_to_token(k, q, tokens, valid))
        return tokens, image


class TwoWayTransformer(nnx.Module):
    """Tokens and image embedding attend to each other."""

    def __init__(
        self, width: int, depth: int, heads: int, hidden: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.layers = nnx.List(
            [
                TwoWayLayer(width, heads, hidden, i == 0, dtype=dtype, rngs=rngs)
                for i in range(depth)
            ]
        )
        self.final_attn_token_to_image = Attention(width, heads, width // 2, dtype=dtype, rngs=rngs)
        self.norm_final_attn = layer_norm(width, eps=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, tokens, image, image_pe, valid):
        """tokens ``(b, s, c)``; image, image_pe ``(b, t, c)``; valid ``(b, s)``."""
        token_pe = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pe, image_pe, valid)
        attended = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + attended), image


class Upscaling(nnx.Module):
    """Two 2×2 transposed convolutions of stride 2: four times the resolution, c/8 channels."""

    def __init__(self, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def deconv(features_in: int, features_out: int) -> nnx.ConvTranspose:
            # transpose_kernel: PyTorch's kernels apply unmirrored only this way.
            return nnx.ConvTranspose(
                features_in,
                features_out,
                (2, 2),
                strides=(2, 2),
                padding="VALID",
                transpose_kernel=True,
                dtype=dtype,
                rngs=rngs,
            )

        self.deconv1 = deconv(width, width // 4)
        self.norm = layer_norm(width // 4, eps=1e-6, dtype=dtype, rngs=rngs)
        self.deconv2 = deconv(width // 4, width // 8)

    def __call__(
        self,
        x: Float[Array, "b gh gw c"],
        high_res: tuple[Float[Array, "_ h4 w4 c8"], Float[Array, "_ h8 w8 c4"]] | None = None,
    ) -> Float[Array, "b h4 w4 c8"]:
        """``high_res``: SAM 2's features of stride 4 and 8, added at their resolution."""
        x = self.deconv1(x)
        x = gelu(self.norm(x if high_res is None else x + high_res[1]))
        x = self.deconv2(x)
        return gelu(x if high_res is None else x + high_res[0])


class MaskDecoder(nnx.Module):
    """Image embedding and prompt tokens to masks and their predicted IoU."""

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
        sam2: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.transformer = TwoWayTransformer(width, depth, heads, mlp_width, dtype=dtype, rngs=rngs)
        self.iou_token = Embedding(1, width, rngs=rngs)
        self.mask_tokens = Embedding(mask_tokens, width, rngs=rngs)
        self.output_upscaling = Upscaling(width, dtype=dtype, rngs=rngs)
        self.output_hypernetworks_mlps = nnx.List(
            [
                Perceptron(width, width, width // 8, 3, dtype=dtype, rngs=rngs)
                for _ in range(mask_tokens)
            ]
        )
        self.iou_prediction_head = Perceptron(
            width, iou_head_width, mask_tokens, iou_head_depth, dtype=dtype, rngs=rngs
        )
        if sam2:
            self.obj_score_token = Embedding(1, width, rngs=rngs)
            self.pred_obj_score_head = Perceptron(width, width, 1, 3, dtype=dtype, rngs=rngs)
            self.conv_s0 = conv(width, width // 8, 1, dtype=dtype, rngs=rngs)
            self.conv_s1 = conv(width, width // 4, 1, dtype=dtype, rngs=rngs)
        self.sam2 = sam2
        self.dtype = dtype

    def __call__(
        self,
        image_embedding: Float[Array, "b gh gw c"],
        image_pe: Float[Array, "gh gw c"],
        prompt: EncodedPrompt,
        high_res: tuple[Float[Array, "_ h4 w4 c8"], Float[Array, "_ h8 w8 c4"]] | None = None,
    ) -> MaskPrediction:
        """One prompt per image of the batch; logits and IoU come back in float32.

        ``high_res``: SAM 2's projected features of stride 4 and 8; one image's serve a batch.
        """
        b, gh, gw, c = image_embedding.shape
        first = [self.obj_score_token()] if self.sam2 else []
        own = jnp.concatenate([*first, self.iou_token(), self.mask_tokens()]).astype(self.dtype)
        own = jnp.broadcast_to(own, (b, *own.shape))
        tokens = jnp.concatenate([own, prompt.sparse], axis=1)  # b 1+m+p c
        valid = jnp.concatenate([jnp.ones(own.shape[:2], bool), prompt.valid], axis=1)
        image = (image_embedding + prompt.dense).astype(self.dtype).reshape(b, gh * gw, c)
        image_pe = jnp.broadcast_to(image_pe.reshape(1, gh * gw, c), (b, gh * gw, c))
        tokens, image = self.transformer(tokens, image, image_pe, valid)
        upscaled = self.output_upscaling(image.reshape(b, gh, gw, c), high_res)
        start = len(first) + 1
        mask_tokens = tokens[:, start : own.shape[1]]
        heads = [mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        low_res_logits = jnp.einsum(
            "bmc,bhwc->bmhw", jnp.stack(heads, 1), upscaled, preferred_element_type=jnp.float32
        )
        iou = self.iou_prediction_head(tokens[:, start - 1]).astype(jnp.float32)
        if not self.sam2:
            return MaskPrediction(low_res_logits, iou)
        object_score = self.pred_obj_score_head(tokens[:, 0]).astype(jnp.float32)[:, 0]
        return MaskPrediction(low_res_logits, jax.nn.sigmoid(iou), object_score, mask_tokens)
