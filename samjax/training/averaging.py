"""An exponential moving average of the parameters, to validate and export instead of the last ones.

Pure functions over plain trees, made to run inside a jitted step. (`optax.ema` averages updates.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def init_average(params: Any) -> Any:
    """The average before the first update: a float32 copy, since steps donate their parameters.

    Float32 whatever the parameters are: bfloat16 would swallow a thousandth of a difference.
    """
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)


def update_average(
    average: Any, params: Any, count: jax.typing.ArrayLike, decay: float = 0.999
) -> Any:
    """d · average + (1 - d) · params, where d = min(decay, (1 + count) / (10 + count)).

    `count` is the number of updates made before. The early, small d let the average forget the
    parameters that training started from, as in TensorFlow's ExponentialMovingAverage.

    Raises:
        ValueError: a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}, expected 0 to less than 1")
    count = jnp.asarray(count, jnp.float32)
    decay_now = jnp.minimum(decay, (1 + count) / (10 + count))
    return optax.incremental_update(params, average, 1 - decay_now)
