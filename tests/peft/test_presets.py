"""The methods' labels on real sizes of both families."""

import jax
import numpy as np
import optax
import pytest

from samjax.models.functional import abstract_params
from samjax.models.sam import vit_b
from samjax.models.sam2_config import sam2
from samjax.peft.presets import ADAMW, GALORE, RULES, by_label, label_for
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
    assert fresh["mask_decoder/iou_prediction_head/layers/2/kernel"] == ADAMW
    assert not any(
        path.startswith(("memory_", "pointer_"))
        for path, label in labels.items()
        if label != "freeze"
    )
    for path, label in labels.items():
        assert label != GALORE or path.endswith("/kernel")


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
