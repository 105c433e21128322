"""`SamPredictor`: one image, any number of prompts.

Upstream: facebookresearch/segment-anything@dca509f, `segment_anything/predictor.py`,
`utils/transforms.py` and `modeling/sam.py: postprocess_masks`.

Differs from upstream: arrays in and out are NumPy's; `predict` takes a batch of prompts as well
(as SAM 2's does); the frame may be a rectangle; prompts that make no sense are errors.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from samjax.frame import pad_to_frame, resize, resized_size, scale_coords
from samjax.models.functional import bind
from samjax.models.mask_decoder import MaskPrediction
from samjax.models.ops import resize_bilinear, resize_bilinear_numpy
from samjax.models.prompt_encoder import merge_prompts
from samjax.models.sam import SamConfig
from samjax.predictor.model import SamModel, check_family, check_image
from samjax.predictor.prompts import Prompts, check_prompts, chunks, pad_slots
from samjax.trees import Params


class ResizeToFrame:
    """Upstream's `ResizeLongestSide` for the predictor's frame; NumPy arrays only."""

    def __init__(self, frame_size: tuple[int, int]):
        self.frame_size = frame_size  # (h, w) in pixels

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """uint8 (h, w, 3), resized to fit the frame, not padded."""
        return resize(image, resized_size(image.shape[:2], self.frame_size))

    def apply_coords(self, coords: ArrayLike, original_size: tuple[int, int]) -> np.ndarray:
        """(…, 2), (x, y) in pixels of the image, whose size is (h, w), to pixels of the frame."""
        return scale_coords(np.asarray(coords), original_size, self.frame_size)

    def apply_boxes(self, boxes: ArrayLike, original_size: tuple[int, int]) -> np.ndarray:
        """(b, 4) XYXY in pixels of the image, whose size is (h, w), to pixels of the frame."""
        corners = np.asarray(boxes).reshape(-1, 2, 2)
        return self.apply_coords(corners, original_size).reshape(-1, 4)


# Compiled once per config and dtype in a process, whatever the number of predictors and images.
@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _encode(
    params: Params,
    frames: Float[Array, "b h w 3"],
    sizes: Int[Array, "b 2"],
    *,
    config: SamConfig,
    dtype: DTypeLike,
) -> Float[Array, "b gh gw c"]:
    return bind(config, params, dtype=dtype).encode_image(frames, sizes)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _decode(
    params: Params,
    embedding: Float[Array, "1 gh gw c"],
    coords: Float[Array, "b n 2"],
    labels: Int[Array, "b n"],
    mask_logits: Float[Array, "b h4 w4 1"] | None,
    *,
    config: SamConfig,
    dtype: DTypeLike,
) -> MaskPrediction:
    model = bind(config, params, dtype=dtype)
    prompt = model.encode_prompt(coords, labels, mask_logits)
    return model.decode(jnp.repeat(embedding, len(coords), axis=0), prompt)


@functools.partial(jax.jit, static_argnames=("tokens", "frame_size"))
def _select(
    prediction: MaskPrediction, *, tokens: tuple[int, int], frame_size: tuple[int, int]
) -> tuple[MaskPrediction, Float[Array, "b m h w"]]:
    """The masks of some tokens, and their logits at the size of the frame.

    Apart from `_decode`, so that single and multiple masks share the expensive compilation.
    """
    low_res_logits = prediction.low_res_logits[:, slice(*tokens)]
    chosen = MaskPrediction(low_res_logits, prediction.iou[:, slice(*tokens)])
    return chosen, resize_bilinear(low_res_logits, frame_size)


class SamPredictor:
    """Encodes an image once, then predicts masks for prompts on it, as upstream's class.

    Attributes:
        model: the model.
        transform: takes coordinates to the frame, for `predict_torch`.
        is_image_set: whether there is an image.
        original_size: (h, w) of the image, in pixels.
        input_size: (h, w) that it has inside the frame, without the padding.
        features: its embedding on the device, (1, gh, gw, c) in the computation's dtype.
    """

    def __init__(self, sam_model: SamModel, dtype: DTypeLike = jnp.float32):
        """`dtype` is that of the computation, float32 or bfloat16; results are float32.

        On GPUs and TPUs float32 products are rounded (TF32, bfloat16) unless
        `jax.default_matmul_precision("highest")` is set.
        """
        self.model = sam_model
        self.config = check_family(sam_model, SamConfig, "SAM2ImagePredictor")
        self.transform = ResizeToFrame(sam_model.config.image_size)
        self._static = {"config": self.config, "dtype": jnp.dtype(dtype)}
        self.reset_image()

    def reset_image(self) -> None:
        """Forgets the image."""
        self.is_image_set = False
        self.features: jax.Array | None = None
        self.original_size: tuple[int, int] = (0, 0)
        self.input_size: tuple[int, int] = (0, 0)

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        """Computes the embedding of an image of any size; takes the place of the one before.

        Args:
            image: uint8 (h, w, 3).
            image_format: the order of its channels, "RGB" or "BGR".

        Raises:
            ValueError: an image or format of another kind. No image is set then.
        """
        self.reset_image()
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format {image_format!r}: expected 'RGB' or 'BGR'")
        image = check_image(image)
        if image_format != self.model.image_format:
            image = np.ascontiguousarray(image[..., ::-1])
        self._embed(self.transform.apply_image(image), image.shape[:2])

    def set_torch_image(
        self, transformed_image: ArrayLike, original_image_size: tuple[int, int]
    ) -> None:
        """`set_image` for an image that was resized already; upstream's name for it.

        Args:
            transformed_image: (1, 3, h, w) RGB of 0..255 in any dtype, not normalised and not
                padded, as `transform.apply_image` makes it; a PyTorch CPU tensor will do.
            original_image_size: (h, w) of the image before, in pixels.

        Raises:
            ValueError: another shape, a size that is not `original_image_size` fitted into the
                frame, values that are not finite or outside 0..255. No image is set then.
        """
        self.reset_image()
        image = np.asarray(transformed_image, np.float32)
        height, width = (int(side) for side in original_image_size)
        wanted = resized_size((height, width), self.transform.frame_size)
        if image.shape != (1, 3, *wanted):
            raise ValueError(
                f"transformed_image: expected shape {(1, 3, *wanted)} (b, c, h, w) for an original "
                f"of {(height, width)}, got {image.shape}"
            )
        if not (image.min() >= 0 and image.max() <= 255):  # false for NaN as well
            raise ValueError("transformed_image: holds NaN or values outside 0..255")
        self._embed(image[0].transpose(1, 2, 0), (height, width))

    def _embed(self, resized: np.ndarray, original_size: tuple[int, int]) -> None:
        size = resized.shape[:2]
        frame = pad_to_frame(resized.astype(np.float32), self.transform.frame_size)[None]
        features = _encode(self.model.params, frame, np.array([size], np.int32), **self._static)
        self.features = jax.block_until_ready(features)
        self.original_size, self.input_size = original_size, size
        self.is_image_set = True

    def predict(
        self,
        point_coords: ArrayLike | None = None,
        point_labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks for one prompt, or for each of `b` prompts, on the current image.

        Prompts may lie up to one pixel beyond the edge of the image.

        Args:
            point_coords: (p, 2) or (b, p, 2), (x, y) in pixels of the image.
            point_labels: (p,) or (b, p): 1 foreground, 0 background, -1 no point (a filler for
                prompts with fewer points than others; it does take part in the attention).
            box: (4,) or (b, 4), XYXY in pixels of the image.
            mask_input: (1, h4, w4) or (b, 1, h4, w4), low-res logits of an earlier prediction.
            multimask_output: several masks for one ambiguous prompt (of the tokens 1 to m - 1),
                or a single one (of token 0).
            return_logits: masks as logits, not thresholded.

        Returns:
            masks: bool (c, h, w) at the image's size; float32 logits with `return_logits`.
            iou: float32 (c,), the model's own estimate of each mask's quality.
            low_res_logits: float32 (c, h4, w4), to be used as a `mask_input`.
            All three have a leading axis `b` if there are several prompts, and, as with
            upstream's two predictors, not for a batch of one; `predict_torch` keeps it always.

        Raises:
            RuntimeError: no image is set.
            ValueError: see `samjax.predictor.prompts.check_prompts`.
        """
        self._check_image_is_set()
        prompts = self._check(point_coords, point_labels, box, mask_input, self.original_size)
        if prompts.points is not None:
            points = self.transform.apply_coords(prompts.points, self.original_size)
            prompts = prompts._replace(points=points)
        if prompts.boxes is not None:
            boxes = self.transform.apply_boxes(prompts.boxes, self.original_size)
            prompts = prompts._replace(boxes=boxes)
        masks, iou, low_res_logits = self._predict(prompts, multimask_output, return_logits)
        if prompts.count == 1:
            return masks[0], iou[0], low_res_logits[0]
        return masks, iou, low_res_logits

    def predict_torch(
        self,
        point_coords: ArrayLike | None,
        point_labels: ArrayLike | None,
        boxes: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`predict` for coordinates in pixels of the frame; upstream's name for it.

        Args are `predict`'s batched ones, made by `transform.apply_coords` and `apply_boxes`;
        PyTorch CPU tensors will do. Results are NumPy arrays and always have the axis `b`.
        """
        self._check_image_is_set()
        prompts = self._check(point_coords, point_labels, boxes, mask_input, self.input_size)
        return self._predict(prompts, multimask_output, return_logits)

    def get_image_embedding(self) -> np.ndarray:
        """The image's embedding, float32 (1, c, gh, gw): upstream's layout, not ours.

        Raises:
            RuntimeError: no image is set.
        """
        self._check_image_is_set()
        return np.asarray(self.features, np.float32).transpose(0, 3, 1, 2)

    def _check_image_is_set(self) -> None:
        if not self.is_image_set:
            raise RuntimeError("no image is set: call set_image(...) first")

    def _check(self, coords, labels, boxes, masks, image_size: tuple[int, int]) -> Prompts:
        low_res_size = self.model.config.low_res_size
        return check_prompts(
            coords, labels, boxes, masks, image_size=image_size, low_res_size=low_res_size
        )

    def _predict(
        self, prompts: Prompts, multimask_output: bool, return_logits: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Decodes prompts given in pixels of the frame, a chunk at a time."""
        config = self.config
        coords, labels = merge_prompts(prompts.points, prompts.labels, prompts.boxes, prompts.count)
        coords, labels = pad_slots(coords, labels)
        tokens = (1, config.mask_tokens) if multimask_output else (0, 1)
        shape = prompts.count, tokens[1] - tokens[0]
        masks = np.empty((*shape, *self.original_size), np.float32 if return_logits else bool)
        iou = np.empty(shape, np.float32)
        low_res_logits = np.empty((*shape, *config.low_res_size), np.float32)
        height, width = self.input_size
        for rows in chunks(prompts.count):
            mask_logits = None if prompts.mask_logits is None else prompts.mask_logits[rows]
            prediction = _decode(
                self.model.params,
                self.features,
                coords[rows],
                labels[rows],
                mask_logits,
                **self._static,
            )
            chosen, frames = _select(prediction, tokens=tokens, frame_size=config.image_size)
            iou[rows], low_res_logits[rows] = chosen.iou, chosen.low_res_logits
            for mask, frame in zip(masks[rows], np.asarray(frames), strict=True):
                logits = resize_bilinear_numpy(frame[:, :height, :width], self.original_size)
                mask[:] = logits if return_logits else logits > self.model.mask_threshold
        return masks, iou, low_res_logits
