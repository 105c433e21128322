"""The methods' labels on real sizes of both families."""

import jax
import numpy as np
import optax
import pytest

from samjax.models.functional import abstract_params
from samjax.models.sam import vit_b
from samjax.models.sam2_config import sam2
from samjax.peft.presets import ADAMW, GALORE, RULES, STILL, by_label, label_for
from samjax.trees import flatten

MODELS = {"vit_b": vit_b(), "sam2.1_hiera_tiny": sam2("hiera_tiny")}


def millions(config, method, label):
    params = flatten(abstract_params(config))
    labels = flatten(label_for(abstract_params(config), method))
    return sum(np.prod(params[path].shape) for path in params if labels[path] == label) / 1e6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", RULES)
def test_every_rule_finds_parameters_in_both_families(name, method):
    params = abstract_params(MODELS[name])
    labels = flatten(label_for(params, method))
    assert labels["prompt_encoder/pe_gaussian"] == "freeze"
    fresh = flatten(label_for(params, method, fresh_head=True))
    assert fresh["mask_decoder/mask_tokens/embedding"] == ADAMW
    # No loss of ours reaches it; weight decay alone would shrink it.
    assert fresh["mask_decoder/iou_prediction_head/layers/2/kernel"] == STILL
    assert not any(
        path.startswith(("memory_", "pointer_"))
        for path, label in labels.items()
        if label != "freeze"
    )
    for path, label in labels.items():
        assert label != GALORE or path.endswith("/kernel")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("prompts", "moved"),
    [
        (["none"], set()),
        (["points"], {"1", "not"}),
        (["box", "none"], {"2", "3", "not"}),
        (["points", "box"], {"1", "2", "3", "not"}),
    ],
)
def test_embeddings_of_points_that_never_come_stay(name, prompts, moved):
    labels = flatten(label_for(abstract_params(MODELS[name]), "lora+decoder", prompts=prompts))
    points = {p.split("/")[2]: label for p, label in labels.items() if "point_embeddings" in p}
    points["not"] = labels["prompt_encoder/not_a_point_embed/embedding"]
    if name == "vit_b" and prompts == ["box", "none"]:
        moved = moved - {"not"}  # SAM pads points, not boxes; SAM 2's predictor pads both
    assert {point for point, label in points.items() if label == ADAMW} == moved
    assert labels["prompt_encoder/no_mask_embed/embedding"] == ADAMW


def test_sizes_of_vit_b():
    config = MODELS["vit_b"]
    # Twelve blocks of qkv, proj, lin1 and lin2: 768 * 768 * (3 + 1 + 4 + 4) each.
    assert millions(config, "galore+decoder", GALORE) == pytest.approx(84.93, abs=0.01)
    assert millions(config, "galore", GALORE) > 84.93
    assert millions(config, "lora", ADAMW) == 0
    assert millions(config, "full", ADAMW) == pytest.approx(93.0, abs=0.6)


def test_by_label_wants_a_transform_for_each():
    labels = {"a": ADAMW, "b": GALORE, "c": "freeze"}
    with pytest.raises(ValueError, match="no transform for the labels galore"):
        by_label(labels, adamw=optax.adam(1.0))
    optimizer = by_label(labels, adamw=optax.sgd(1.0), galore=optax.sgd(2.0), other=optax.sgd(3.0))
    values = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}
    updates, _ = optimizer.update(values, optimizer.init(values), values)
    assert jax.tree.map(lambda u: float(u[0]), updates) == {"a": -1.0, "b": -2.0, "c": 0.0}
