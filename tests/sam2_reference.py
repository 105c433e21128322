"""Upstream's SAM 2 and ours with the same weights, for the parity tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from convert.bridge import from_torch
from convert.reference import build_reference_sam2, randomise
from convert.sam2 import LEAVES, NAMES
from convert.torch_io import import_torch
from samjax.models.functional import abstract_params
from samjax.models.sam2_config import Sam2Config

MASK_GAIN = 50.0  # logits of the size of a trained model's: thresholds and stability really switch
SCORE_GAIN = 300.0  # object scores on both sides of zero


@functools.lru_cache(maxsize=2)
def sam2_pair(config: Sam2Config, seed: int = 0):
    """Upstream's video predictor, which is every SAM 2 there is, and our parameter tree."""
    torch = import_torch()
    torch.manual_seed(seed)
    theirs = randomise(build_reference_sam2(config), seed)
    with torch.no_grad():
        for mlp in theirs.sam_mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight *= MASK_GAIN
        head = theirs.sam_mask_decoder.pred_obj_score_head.layers[-1]
        head.weight *= SCORE_GAIN
        head.bias -= _scores(theirs, config).mean()
    _attend_in_float32(theirs)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    ours = from_torch(state, abstract_params(config), NAMES, LEAVES)
    return theirs, jax.tree.map(jnp.asarray, ours)


def _scores(theirs, config: Sam2Config):
    """The object scores that upstream gives to random points on a random picture."""
    rng = np.random.default_rng(0)
    size = config.image_size
    blocks = rng.normal(size=(1, size[0] // 16, size[1] // 16, 3)).repeat(16, 1).repeat(16, 2)
    *high_res, embedding = theirs.forward_image(nchw(blocks.astype(np.float32)))["backbone_fpn"]
    embedding = embedding + theirs.no_mem_embed.reshape(1, -1, 1, 1)
    scores = []
    for _ in range(16):
        points = {
            "point_coords": as_torch(rng.uniform(0, size[0], (1, 2, 2)).astype(np.float32)),
            "point_labels": as_torch(np.array([[1, 0]], np.int32)),
        }
        scores.append(theirs._forward_sam_heads(embedding, points, None, high_res, True)[-1])
    return import_torch().cat(scores)


def _attend_in_float32(theirs) -> None:
    """Upstream keeps memories in bfloat16. Beside a pointer, which is float32, they become float32
    again; without one (all prompts lie ahead) its float32 model stops with a type error."""
    attend = theirs.memory_attention.forward

    def forward(**arguments):
        return attend(**{**arguments, "memory": arguments["memory"].float()})

    theirs.memory_attention.forward = forward


def as_torch(array):
    """A torch tensor of its own."""
    return import_torch().from_numpy(np.array(array))


def nchw(array):
    """NHWC as a torch tensor of upstream's layout."""
    return as_torch(np.moveaxis(np.asarray(array), -1, 1))


def tokens(array):
    """NHWC as upstream's video code has it: (h w, n, c)."""
    return nchw(array).flatten(2).permute(2, 0, 1)


def relative(found, expected) -> float:
    """The largest difference over the standard deviation of what is expected."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / (expected.std() or 1.0))
