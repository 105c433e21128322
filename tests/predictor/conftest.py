"""A tiny model for the predictor, and a picture that is set in it."""

import numpy as np
import pytest

from samjax.models.functional import init_params
from samjax.models.sam import SamConfig
from samjax.models.vit import ViTConfig
from samjax.predictor import SamModel, SamPredictor

CONFIG = SamConfig(
    image_encoder=ViTConfig(
        image_size=(96, 128),
        width=24,
        depth=2,
        heads=3,
        window=4,
        global_blocks=(1,),
        out_channels=32,
    ),
    num_multimask=5,  # as after fine-tuning on five classes
    mask_channels=8,
    decoder_depth=1,
    decoder_heads=2,
    decoder_mlp_width=40,
    iou_head_width=16,
)


@pytest.fixture(scope="session")
def model() -> SamModel:
    return SamModel(CONFIG, init_params(CONFIG, seed=1))


@pytest.fixture(scope="session")
def image() -> np.ndarray:
    """60 high and 200 wide; in the frame it takes 38 x 128."""
    return np.random.default_rng(0).integers(0, 256, (60, 200, 3), np.uint8)


@pytest.fixture(scope="session")
def predictor(model: SamModel, image: np.ndarray) -> SamPredictor:
    """With the image set. Tests that set another one make their own."""
    predictor = SamPredictor(model)
    predictor.set_image(image)
    return predictor
