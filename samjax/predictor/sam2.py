"""`SAM2ImagePredictor`: one image or a batch of images, any number of prompts on each.

Upstream: facebookresearch/sam2@2b90b9f, `sam2/sam2_image_predictor.py` and `utils/transforms.py`.

Differs from upstream: arrays in and out are NumPy's, masks are bool; a batch of images is decoded
in one call; holes and specks are cleaned on every machine, not on CUDA only; any frame size works;
prompts that make no sense are errors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike
from PIL import Image

from samjax.frame import stretch
from samjax.models.functional import bind
from samjax.models.mask_decoder import MaskPrediction
from samjax.models.ops import resize_bilinear_numpy
from samjax.models.prompt_encoder import merge_prompts
from samjax.models.sam2 import ImageFeatures, single_mask
from samjax.models.sam2_config import Sam2Config
from samjax.predictor.components import clean
from samjax.predictor.model import SamModel, check_family, check_image
from samjax.predictor.prompts import Prompts, check_prompts, pad_slots
from samjax.prompt_labels import INVALID
from samjax.trees import Params

MOST_PROMPTS = 16  # decoded in one call
LIMIT = 32.0  # of the low-res logits that are given back, as a mask prompt takes them


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _encode(
    params: Params, frames: Float[Array, "b h w 3"], *, config: Sam2Config, dtype: DTypeLike
) -> ImageFeatures:
    model = bind(config, params, dtype=dtype)
    features = model.encode_image(frames)
    return features._replace(embedding=model.without_memory(features.embedding))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _decode(
    params: Params,
    features: ImageFeatures,
    index: Int[Array, " n"],
    coords: Float[Array, "n p 2"],
    labels: Int[Array, "n p"],
    mask_logits: Float[Array, "n h4 w4 1"] | None,
    *,
    config: Sam2Config,
    dtype: DTypeLike,
) -> MaskPrediction:
    """Prompt i on image `index[i]`; masks of all tokens."""
    model = bind(config, params, dtype=dtype)
    embedding, high_res = jax.tree.map(lambda x: x[index], features)
    prompt = model.encode_prompt(coords, labels, mask_logits)
    return model.decode(embedding, prompt, high_res)


@functools.partial(jax.jit, static_argnames="multimask")
def _select(
    prediction: MaskPrediction, *, multimask: bool
) -> tuple[Float[Array, "n m h4 w4"], Float[Array, "n m"]]:
    if multimask:
        return prediction.low_res_logits[:, 1:], prediction.iou[:, 1:]
    logits, iou = single_mask(prediction)
    return logits[:, None], iou[:, None]


class SAM2ImagePredictor:
    """Encodes an image or a batch once, then predicts masks for prompts, as upstream's class.

    Attributes:
        model: the model.
        is_image_set: whether there is an image.
        is_batch: whether it is a batch, set by `set_image_batch`.
        original_sizes: (h, w) of each image, in pixels.
        features: what the encoder made of them, on the device.
    """

    def __init__(
        self,
        sam_model: SamModel,
        mask_threshold: float = 0.0,
        max_hole_area: float = 0.0,
        max_sprinkle_area: float = 0.0,
        *,
        dtype: DTypeLike = jnp.float32,
    ):
        """Areas are in pixels of the low-res masks (1/4 of the frame); 0 cleans nothing.

        `dtype` is that of the computation, float32 or bfloat16; results are float32.  On GPUs and
        TPUs float32 products are rounded unless `jax.default_matmul_precision("highest")` is set.
        """
        self.model = sam_model
        self.config = check_family(sam_model, Sam2Config, "SamPredictor")
        self.mask_threshold = mask_threshold
        self._cleaning = {"max_hole_area": max_hole_area, "max_sprinkle_area": max_sprinkle_area}
        self._static = {"config": self.config, "dtype": jnp.dtype(dtype)}
        self.reset_predictor()

    def reset_predictor(self) -> None:
        """Forgets the image or batch."""
        self.is_image_set = False
        self.is_batch = False
        self.original_sizes: list[tuple[int, int]] = []
        self.features: ImageFeatures | None = None

    def set_image(self, image: np.ndarray | Image.Image) -> None:
        """Computes the embedding of an image; takes the place of the one before.

        Args:
            image: uint8 (h, w, 3) RGB of any size, or a Pillow image in mode RGB.

        Raises:
            ValueError: an image of another kind. No image is set then.
        """
        self.reset_predictor()
        self._embed([image])

    def set_image_batch(self, image_list: Sequence[np.ndarray]) -> None:
        """`set_image` for several images, of any sizes, in one pass; then use `predict_batch`."""
        self.reset_predictor()
        if not len(image_list):
            raise ValueError("image_list: expected at least one image, got none")
        self._embed(image_list)
        self.is_batch = True

    def _embed(self, images: Sequence[np.ndarray | Image.Image]) -> None:
        checked = [check_image(np.asarray(image)) for image in images]
        frames = np.stack([stretch(image, self.config.image_size) for image in checked])
        features = _encode(self.model.params, frames, **self._static)
        self.features = jax.block_until_ready(features)
        self.original_sizes = [image.shape[:2] for image in checked]
        self.is_image_set = True

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt, or for each of `b` prompts, on the current image.

        Prompts may lie up to one pixel beyond the edge of the image.

        Args:
            point_coords: (p, 2) or (b, p, 2), (x, y) in pixels of the image.
            point_labels: (p,) or (b, p): 1 foreground, 0 background, -1 no point (a filler).
            box: (4,) or (b, 4), XYXY in pixels of the image.
            mask_input: (1, h4, w4) or (b, 1, h4, w4), low-res logits of an earlier prediction.
            multimask_output: several masks for one ambiguous prompt; or a single one, for which
                the best of the several stands in where it is unstable.
            return_logits: masks as logits, not thresholded.
            normalize_coords: False for points and boxes in fractions of the image, [0, 1].

        Returns:
            masks: bool (c, h, w) at the image's size; float32 logits with `return_logits`.
            iou: float32 (c,) in [0, 1], the model's own estimate of each mask's quality.
            low_res_logits: float32 (c, h4, w4), clamped to ±32, to be used as a `mask_input`.
            All three have a leading axis `b` if there are several prompts.

        Raises:
            RuntimeError: no image is set, or a batch is.
            ValueError: see `samjax.predictor.prompts.check_prompts`.
        """
        self._check_state(batch=False)
        prompts = self._check(
            0, point_coords, point_labels, box, mask_input, normalize=normalize_coords
        )
        return self._predict([prompts], multimask_output, return_logits)[0]

    def predict_batch(
        self,
        point_coords_batch: Sequence[ArrayLike | None] | None = None,
        point_labels_batch: Sequence[ArrayLike | None] | None = None,
        box_batch: Sequence[ArrayLike | None] | None = None,
        mask_input_batch: Sequence[ArrayLike | None] | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        normalize_coords: bool = True,
    ) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
        """`predict` for every image of the batch: lists of its arguments, lists of its results.

        Raises:
            RuntimeError: no batch is set.
            ValueError: a list that is not as long as the batch, or a prompt that is no good; the
                message names the image.
        """
        self._check_state(batch=True)
        count = len(self.original_sizes)
        given = {
            "point_coords_batch": point_coords_batch,
            "point_labels_batch": point_labels_batch,
            "box_batch": box_batch,
            "mask_input_batch": mask_input_batch,
        }
        for name, values in given.items():
            if values is not None and len(values) != count:
                raise ValueError(f"{name}: expected {count}, one per image, got {len(values)}")
        prompts = []
        for i in range(count):
            own = [None if values is None else values[i] for values in given.values()]
            try:
                prompts.append(self._check(i, *own, normalize=normalize_coords))
            except ValueError as error:
                raise ValueError(f"image {i} of the batch: {error}") from error
        results = self._predict(prompts, multimask_output, return_logits)
        masks, iou, low_res_logits = (list(column) for column in zip(*results, strict=True))
        return masks, iou, low_res_logits

    def get_image_embedding(self) -> np.ndarray:
        """The embedding, no-memory embedding included, float32 (b, c, gh, gw): upstream's layout.

        Raises:
            RuntimeError: no image is set.
        """
        if self.features is None:
            raise RuntimeError("no image is set: call set_image(...) first")
        return np.asarray(self.features.embedding, np.float32).transpose(0, 3, 1, 2)

    def _check_state(self, *, batch: bool) -> None:
        wanted = "set_image_batch" if batch else "set_image"
        if not self.is_image_set:
            raise RuntimeError(f"no image is set: call {wanted}(...) first")
        if self.is_batch != batch:
            method = "predict_batch" if self.is_batch else "predict"
            raise RuntimeError(f"use {method}(...), or set the image by {wanted}(...)")

    def _check(self, image: int, coords, labels, box, masks, *, normalize: bool) -> Prompts:
        """The prompts on an image, points and boxes in pixels of the frame."""
        size = self.original_sizes[image]
        if not normalize:
            extent = np.array([size[1], size[0]], np.float64)
            coords = None if coords is None else np.asarray(coords, np.float64) * extent
            box = None if box is None else np.asarray(box, np.float64) * np.tile(extent, 2)
        config = self.config
        prompts = check_prompts(
            coords, labels, box, masks, image_size=size, low_res_size=config.low_res_size
        )
        scale = np.array(config.image_size[::-1], np.float64) / np.array(size[::-1])
        return prompts._replace(
            points=None if prompts.points is None else prompts.points * scale,
            boxes=None if prompts.boxes is None else prompts.boxes * np.tile(scale, 2),
        )

    def _predict(
        self, prompts: Sequence[Prompts], multimask: bool, return_logits: bool
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(masks, iou, low-res logits) of each image, its prompts given in pixels of the frame."""
        index = np.repeat(np.arange(len(prompts)), [p.count for p in prompts])
        low_res_logits, iou = self._decode_all(index.astype(np.int32), prompts, multimask)
        results = []
        for i, size in enumerate(self.original_sizes):
            own = index == i
            logits = clean(low_res_logits[own], threshold=self.mask_threshold, **self._cleaning)
            masks = resize_bilinear_numpy(logits, size)
            result = (
                masks if return_logits else masks > self.mask_threshold,
                iou[own],
                np.clip(low_res_logits[own], -LIMIT, LIMIT),
            )
            single = prompts[i].count == 1
            results.append(tuple(array[0] for array in result) if single else result)
        return results

    def _decode_all(
        self, index: np.ndarray, prompts: Sequence[Prompts], multimask: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Low-res logits (n, m, h4, w4) and IoU (n, m) of all prompts of all images."""
        merged = [
            merge_prompts(p.points, p.labels, p.boxes, p.count, box_first=True) for p in prompts
        ]
        slots = max(labels.shape[1] for _, labels in merged)
        coords = np.concatenate([_widen(c, slots, 0.0) for c, _ in merged])
        labels = np.concatenate([_widen(k, slots, INVALID) for _, k in merged])
        coords, labels = pad_slots(coords, labels)
        # A mask prompt is another program: prompts with one and without are decoded apart.
        with_mask = np.concatenate([np.full(p.count, p.mask_logits is not None) for p in prompts])
        given = [p.mask_logits for p in prompts if p.mask_logits is not None]
        mask_logits = np.concatenate(given) if given else None
        config = self.config
        tokens = config.num_multimask if multimask else 1
        low_res_logits = np.empty((len(index), tokens, *config.low_res_size), np.float32)
        iou = np.empty((len(index), tokens), np.float32)
        for masked in (False, True):
            places = np.flatnonzero(with_mask == masked)
            for start in range(0, len(places), MOST_PROMPTS):
                rows = np.arange(start, min(start + MOST_PROMPTS, len(places)))
                count = len(rows)
                # The last one again, up to a power of two, so that few sizes are compiled.
                rows = np.pad(rows, (0, 2 ** (count - 1).bit_length() - count), mode="edge")
                at = places[rows]
                prediction = _decode(
                    self.model.params,
                    self.features,
                    index[at],
                    coords[at],
                    labels[at],
                    mask_logits[rows] if masked and mask_logits is not None else None,
                    **self._static,
                )
                chosen = _select(prediction, multimask=multimask)
                low_res_logits[at[:count]], iou[at[:count]] = (x[:count] for x in chosen)
        return low_res_logits, iou


def _widen(array: np.ndarray, slots: int, value: float) -> np.ndarray:
    """Adds slots behind those of axis 1."""
    extra = [(0, 0), (0, slots - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, extra, constant_values=value)
