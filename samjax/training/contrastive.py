"""SimCLR's training: two views of a picture shall be told from all other views of the batch.

Papers: Chen et al., arXiv 2002.05709 (the loss) and 2006.10029 (SimCLRv2's settings: temperature
0.1, weight decay 1e-4, ten epochs of warmup, then half a cosine); LARS, arXiv 1708.03888. Upstream:
google-research/simclr@383d414, ``objective.py``, ``lars_optimizer.py``, ``model_util.py``. SAMora
(arXiv 2511.08626) goes on with it on medical pictures before it distils the network.

Nothing here knows a model. The schedule is `schedules.warmup_cosine`, whose warmup starts at
``peak / warmup`` where upstream's starts at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from samjax.peft.paths import label_by_path
from samjax.training.averaging import update_average
from samjax.training.loop import Batch, Step, TrainState
from samjax.trees import Params, flatten, unflatten

TRUST = 0.001  # LARS: a kernel's step is this share of its norm, times the learning rate

LABELS = [
    ("(?:.*/)?kernel", "adapted"),
    ("(?:.*/)?(?:scale|bias)", "plain"),
    ("(?:.*/)?(?:mean|variance)", "statistics"),
]
"""How a parameter of a network with batch norm is trained, by its name; rules of `label_by_path`.

Upstream excludes by name too: what belongs to a norm, and biases."""

Project = Callable[[Params, jax.Array], tuple[jax.Array, Params]]
"""(parameters, images (n, h, w, 3)) -> (projections (n, c), new running statistics: a nested dict
that holds some of the parameters)."""


def nt_xent(z1: jax.Array, z2: jax.Array, temperature: float = 0.1) -> jax.Array:
    """The contrastive loss of each picture, (b,), float32, in nats.

    z1, z2: (b, c) projections of two views of the same pictures, of any length. With
    s_ik the cosine of views i and k, the loss of view i, whose other view is j, is
    -log(exp(s_ij / τ) / Σ_{k ≠ i} exp(s_ik / τ)) over all 2b views; a picture has the mean of its
    two. So the mean of the result is the mean over the 2b views, half of what upstream adds up.
    The value depends on the whole batch: micro-batches are not equal to one big batch.

    Raises ``ValueError`` for other shapes, a batch of one, or a temperature that is not positive.
    """
    if z1.ndim != 2 or z1.shape != z2.shape or len(z1) < 2:
        raise ValueError(
            f"projections of shapes {z1.shape} and {z2.shape}, "
            "expected twice the same (b, c) with b of 2 or more"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected more than 0, and finite")
    b = len(z1)
    views = jnp.concatenate([z1, z2]).astype(jnp.float32)
    squares = jnp.square(views).sum(1, keepdims=True)
    views = views * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))  # TensorFlow's l2_normalize
    logits = jnp.matmul(views, views.T, precision="highest") / temperature
    logits = jnp.where(jnp.eye(2 * b, dtype=bool), -jnp.inf, logits)
    other = jnp.roll(jnp.arange(2 * b), b)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, other)
    return losses.reshape(2, b).mean(0)


def simclr_optimizer(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float = 1e-4, momentum: float = 0.9
) -> optax.GradientTransformation:
    """LARS as upstream has it, for a tree with the names of `LABELS`.

    Kernels decay, and step by ``TRUST`` of their norm; scales and biases have plain momentum; the
    running statistics of norms get no update and no state, whatever their gradient. The momentum
    is of steps, not of gradients: a change of the learning rate acts on what comes after it.

    Raises ``ValueError`` at ``init`` for a tree with other names, or without one of these.
    """
    transforms: dict[Any, optax.GradientTransformation] = {
        "adapted": optax.lars(
            learning_rate, weight_decay, trust_coefficient=TRUST, momentum=momentum
        ),
        "plain": optax.chain(
            optax.scale_by_learning_rate(learning_rate), optax.trace(decay=momentum)
        ),
        "statistics": optax.set_to_zero(),
    }
    return optax.partition(transforms, lambda params: label_by_path(params, LABELS))


def scaled_learning_rate(batch_size: int, scaling: Literal["linear", "sqrt"] = "linear") -> float:
    """Upstream's peak for pictures per step: 0.3 · batch / 256, or 0.075 · √batch.

    The same at 4096; below it the root is larger, and upstream's README prefers it there.
    Raises ``ValueError`` for another scaling, or fewer than one picture.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
    if scaling == "linear":
        return 0.3 * batch_size / 256
    if scaling == "sqrt":
        return 0.075 * math.sqrt(batch_size)
    raise ValueError(f"scaling is {scaling!r}, expected linear or sqrt")


def with_statistics(params: Params, statistics: Params) -> Params:
    """``params`` with the leaves that ``statistics`` has, too; both are nested dicts.

    Raises ``ValueError`` naming every leaf that ``params`` lacks.
    """
    flat, new = flatten(params), flatten(statistics)
    unknown = [path for path in new if path not in flat]
    if unknown:
        raise ValueError("the parameters lack these statistics: " + ", ".join(unknown))
    return unflatten({**flat, **new})


def make_contrastive_step(
    project: Project,
    optimizer: optax.GradientTransformation,
    temperature: float = 0.1,
    average_decay: float = 0.999,
    summed: bool = False,
) -> Step:
    """A jitted ``step(state, frozen, batch, key) -> (state, {"loss", "gradient_norm"})``.

    As `loop.make_step`'s, for `loop.fit`, but the step also takes over the running statistics that
    ``project`` returns, and micro-batches do not exist. ``batch`` has the views ``view1`` and
    ``view2``, (b, h, w, 3); they go through ``project`` together, so that norms see both, as
    upstream's do. ``frozen`` and ``key`` are not used. ``state`` is donated. ``average_decay``: of
    the moving average, where the state has one; it averages the statistics too. With ``summed``,
    the loss is that of upstream's code: the sum of both directions, twice the papers' mean. LARS
    takes no notice in the kernels, but for their decay; scales and biases step twice as far.
    """

    def mean_loss(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        images = jnp.concatenate([batch["view1"], batch["view2"]])
        projections, statistics = project(params, images)
        value = nt_xent(*jnp.split(projections, 2), temperature=temperature).mean()
        return 2 * value if summed else value, statistics

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen: Any, batch: Batch, key: jax.Array):
        gradient = jax.value_and_grad(mean_loss, has_aux=True)
        (value, statistics), grads = gradient(state.trainable, batch)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.trainable)
        updated: Any = optax.apply_updates(state.trainable, updates)
        trainable = with_statistics(updated, statistics)
        average = state.average
        if average is not None:
            average = update_average(average, trainable, state.step, average_decay)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, trainable, opt_state, average), metrics

    return step
