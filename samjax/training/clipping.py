"""Gradient clipping leaf by leaf.

A global norm is known only when the last gradient is: all of them are held until then. Here no leaf
waits for another, so that each gradient can be used up and freed as soon as it is there.
"""

from __future__ import annotations

from typing import Any

import jax
import optax


def clip_each(max_norm: float) -> optax.GradientTransformation:
    """Scales each leaf's gradient to an L2 norm of at most `max_norm`.

    `optax.clip_by_block_rms` bounds the root of the mean square instead, which lets a leaf have a
    longer gradient the larger it is.

    Raises:
        ValueError: a norm that is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}, expected more than 0")
    clip = optax.clip_by_global_norm(max_norm)  # of one leaf, its own norm

    def clip_leaves(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda leaf: clip.update(leaf, clip.init(leaf))[0], updates)

    return optax.stateless(clip_leaves)
