"""The prompt encoder of SAM: points, boxes and masks to embeddings.

Paper: arXiv 2304.02643, §3 "Prompt encoder" and appendix A.  Upstream:
facebookresearch/segment-anything@dca509f, ``segment_anything/modeling/prompt_encoder.py``.

Differs from upstream: points and box corners come as one list of labelled points of fixed length
(``merge_prompts`` builds it, upstream's padding rule included), and a slot labelled ``INVALID``
does not exist for the decoder, so that one batch holds prompts of different length.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from samjax.models.layers import Embedding, conv, gelu, layer_norm
from samjax.prompt_labels import BOTTOM_RIGHT, INVALID, NOT_A_POINT, TOP_LEFT


class EncodedPrompt(NamedTuple):
    """sparse: one token per point; valid: which of them exist; dense: added to the embedding."""

    sparse: Float[Array, "b p c"]
    valid: Bool[Array, "b p"]
    dense: Float[Array, "b gh gw c"]


def merge_prompts(
    points: np.ndarray | None,
    labels: np.ndarray | None,
    boxes: np.ndarray | None,
    batch: int = 1,
    *,
    box_first: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Points ``(b, p, 2)`` with labels ``(b, p)`` and boxes ``(b, 4)``, in pixels of the frame.

    Returns coordinates float32 ``(b, n, 2)`` and labels int32 ``(b, n)``, in upstream's order.
    SAM's: the points, then the padding point if there is no box, then the corners of the box.
    SAM 2's (``box_first``): the corners, the points, and always the padding point.
    Without any prompt, ``n`` is 0 and ``b`` is ``batch``.
    """
    coords, kinds = [], []
    if box_first and boxes is not None:
        corners = np.asarray(boxes, np.float32).reshape(-1, 2, 2)
        kind = np.tile(np.array([TOP_LEFT, BOTTOM_RIGHT], np.int32), (len(corners), 1))
        points = corners if points is None else np.concatenate([corners, points], axis=1)
        labels = kind if labels is None else np.concatenate([kind, labels], axis=1)
        boxes = None
    if points is not None and labels is not None:
        coords.append(np.asarray(points, np.float32))
        kinds.append(np.asarray(labels, np.int32))
        if boxes is None:
            coords.append(np.zeros((len(points), 1, 2), np.float32))
            kinds.append(np.full((len(points), 1), NOT_A_POINT, np.int32))
    if boxes is not None:
        boxes = np.asarray(boxes, np.float32)
        coords.append(boxes.reshape(-1, 2, 2))
        kinds.append(np.tile(np.array([TOP_LEFT, BOTTOM_RIGHT], np.int32), (len(boxes), 1)))
    if not coords:
        return np.zeros((batch, 0, 2), np.float32), np.zeros((batch, 0), np.int32)
    return np.concatenate(coords, axis=1), np.concatenate(kinds, axis=1)


class MaskDownscaling(nnx.Module):
    """A low-res mask to one vector per token of the image embedding."""

    def __init__(self, channels: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv1 = conv(1, channels // 4, 2, stride=2, dtype=dtype, rngs=rngs)
        self.norm1 = layer_norm(channels // 4, eps=1e-6, dtype=dtype, rngs=rngs)
        self.conv2 = conv(channels // 4, channels, 2, stride=2, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(channels, eps=1e-6, dtype=dtype, rngs=rngs)
        self.conv3 = conv(channels, width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, masks: Float[Array, "b h4 w4 1"]) -> Float[Array, "b gh gw c"]:
        x = gelu(self.norm1(self.conv1(masks)))
        x = gelu(self.norm2(self.conv2(x)))
        return self.conv3(x)


class PromptEncoder(nnx.Module):
    """Labelled points in pixels and low-res mask logits to prompt tokens.

    ``width`` is the number of channels of a token, ``grid`` the size of the image embedding and
    ``image_size`` that of the model frame, all as (height, width).
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        image_size: tuple[int, int],
        mask_channels: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.pe_gaussian = nnx.Param(rngs.params.normal((2, width // 2)))
        self.point_embeddings = nnx.List([Embedding(1, width, rngs=rngs) for _ in range(4)])
        self.not_a_point_embed = Embedding(1, width, rngs=rngs)
        self.no_mask_embed = Embedding(1, width, rngs=rngs)
        self.mask_downscaling = MaskDownscaling(mask_channels, width, dtype=dtype, rngs=rngs)
        self.grid = grid
        self.image_size = image_size
        self.dtype = dtype

    def __call__(
        self,
        coords: Float[Array, "b p 2"],
        labels: Int[Array, "b p"],
        mask_logits: Float[Array, "b h4 w4 1"] | None = None,
    ) -> EncodedPrompt:
        """Coordinates are (x, y) in pixels of the model frame, labels as listed in this module."""
        height, width = self.image_size
        size = jnp.array([[[width, height]]], jnp.float32)
        positions = self._encode_positions((coords + 0.5) / size)
        learned = jnp.concatenate([embed() for embed in self.point_embeddings])  # 4 c
        known = labels >= 0
        sparse = jnp.where(
            known[..., None],
            positions + learned[jnp.maximum(labels, 0)],
            self.not_a_point_embed(),
        )
        if mask_logits is None:
            dense = jnp.broadcast_to(
                self.no_mask_embed(), (len(coords), *self.grid, sparse.shape[-1])
            )
        else:
            dense = self.mask_downscaling(mask_logits)
        valid = labels > INVALID
        return EncodedPrompt(sparse.astype(self.dtype), valid, dense.astype(self.dtype))

    def image_positions(self) -> Float[Array, "gh gw c"]:
        """The positional encoding of every token of the image embedding."""
        gh, gw = self.grid
        y = (jnp.arange(gh, dtype=jnp.float32) + 0.5) / gh
        x = (jnp.arange(gw, dtype=jnp.float32) + 0.5) / gw
        return self._encode_positions(jnp.stack(jnp.meshgrid(x, y), axis=-1)).astype(self.dtype)

    def _encode_positions(self, coords: Float[Array, "*b 2"]) -> Float[Array, "*b c"]:
        """Random Fourier features of coordinates in [0, 1]."""
        gaussian = self.pe_gaussian[...]
        # An error in these products is an error in the phase: never let an accelerator round them.
        phase = (
            2 * math.pi * jnp.matmul(2 * coords - 1, gaussian, precision=jax.lax.Precision.HIGHEST)
        )
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)
