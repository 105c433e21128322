"""LoRA as an Optax transform, for any tree of parameters and any model.

The parameters are the merged weights all the time; the factors live in the optimizer's state.  The
model needs no side path, but every step forms the full gradient of the adapted kernels (which an
adapter of ``samjax.peft.lora`` never does), and there is no dropout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from samjax.peft.lora import LoraConfig, factor_pairs, init_factors
from samjax.trees import block_columns, flatten, unflatten


class LoraState(NamedTuple):
    """factors: as an ``Adapter``'s; inner: the inner transform's state, on the factors."""

    factors: Any
    inner: optax.OptState


def lora(
    inner: optax.GradientTransformation, config: LoraConfig, key: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """Lets ``inner`` (a whole optimizer, learning rate and all) step in low-rank coordinates.

    A kernel's gradient dW becomes (scale · dW bᵀ, scale · aᵀ dW); ``inner`` answers with a step of
    the factors, and the kernel moves by scale · (a' b' - a b).  All other parameters stay.  The
    tree is a nested dict with string keys; ``config.targets`` says which kernels, unless they are
    SAM's.  Gradients of what stays are not needed: partition the tree (``optax.partition``,
    ``split_by_label``) if they cost too much.  ``config.dropout`` has to be 0.

    The factors of the end, ``state.factors``, with ``config.scale`` are an ``Adapter`` to the
    parameters of the start.  Raises what ``find_targets`` and ``init_factors`` raise, at ``init``.
    """
    if config.dropout:
        raise ValueError("LoRA as a transform has no dropout: use an adapter beside the model")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> LoraState:
        factors = init_factors(params, config, key)
        return LoraState(factors, inner.init(factors))

    def update(updates, state, params=None, **extra):
        del params
        gradients = flatten(updates)
        steps = {path: jnp.zeros_like(leaf) for path, leaf in gradients.items()}
        pairs = factor_pairs(state.factors)
        pulled = {}
        for layer, block, a, b in pairs:
            gradient = _columns(gradients[f"{layer}/kernel"], block) * config.scale
            pulled[f"{layer}/{block}/a"] = gradient @ b.T
            pulled[f"{layer}/{block}/b"] = a.T @ gradient
        # In the tree's own order, which the inner state follows.
        pulled = unflatten({path: pulled[path] for path in flatten(state.factors)})
        moves, inner_state = inner.update(pulled, state.inner, state.factors, **extra)
        factors: Any = optax.apply_updates(state.factors, moves)
        for (layer, block, a, b), (*_, new_a, new_b) in zip(
            pairs, factor_pairs(factors), strict=True
        ):
            path = f"{layer}/kernel"
            start, stop = block_columns(block, steps[path].shape[1])
            move = config.scale * (new_a @ new_b - a @ b)
            steps[path] = steps[path].at[:, start:stop].set(move.astype(steps[path].dtype))
        return unflatten(steps), LoraState(factors, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _columns(kernel: jax.Array, block: str) -> jax.Array:
    start, stop = block_columns(block, kernel.shape[1])
    return kernel[:, start:stop]
