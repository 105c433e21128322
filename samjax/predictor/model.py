"""What every predictor starts from: a config with its parameters, and an image that can be used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from samjax.models.weights import Config, load_weights, resize_params
from samjax.trees import Params

Family = TypeVar("Family", bound=Config)


@dataclass(frozen=True, eq=False)
class SamModel:
    """A config and its parameters, which are put on the default device once."""

    config: Config
    params: Params

    image_format: ClassVar[str] = "RGB"
    mask_threshold: ClassVar[float] = 0.0  # of the logits

    def __post_init__(self):
        object.__setattr__(self, "params", jax.tree.map(jnp.asarray, self.params))

    @classmethod
    def load(cls, path: str | Path, image_size: tuple[int, int] | None = None) -> SamModel:
        """Reads a converted checkpoint.

        Args:
            path: `.safetensors` written by `python -m convert.sam`, `convert.sam2` or by samjax.
            image_size: another size (h, w) of the frame in pixels, to which the position tables
                are interpolated; by default the checkpoint's own.

        Raises:
            WeightsError: a ValueError; the file is missing, broken or of another kind.
        """
        config, params = load_weights(path)
        if image_size is not None:
            config, params = resize_params(config, params, image_size)
        return cls(config, params)


def check_family(model: SamModel, config: type[Family], other: str) -> Family:
    """The model's config, which has to be of this class; else a ``ValueError`` that names the
    other predictor."""
    if not isinstance(model.config, config):
        raise ValueError(f"a model of family {model.config.family!r}: use {other}")
    return model.config


def check_image(image: np.ndarray) -> np.ndarray:
    """The image, which has to be uint8 (h, w, 3); anything else is a ``ValueError`` with a hint."""
    image = np.asarray(image)
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
        return image
    found = f"{image.dtype} of shape {image.shape}"
    if np.issubdtype(image.dtype, np.floating) and not np.isfinite(image).all():
        found += " with NaN or infinite values"
    hint = ""
    if image.ndim == 2:
        hint = "; repeat a greyscale image: np.stack([image] * 3, axis=-1)"
    elif image.ndim == 3 and image.shape[2] == 4:
        hint = "; drop or blend the alpha channel first"
    elif image.ndim == 3 and image.shape[0] == 3:
        hint = "; channels come last"
    raise ValueError(f"image: expected uint8 (h, w, 3) with values 0..255, got {found}{hint}")
