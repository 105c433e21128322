"""One training step and one loop, for any loss over plain parameter trees.

Nothing here knows a model: the caller passes ``loss(trainable, frozen, batch, key) -> (b,)``, one
value per example, so that k accumulated micro-batches equal one big batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from samjax.training.averaging import init_average, update_average
from samjax.training.compiling import compiler_options

Batch = Mapping[str, Any]
Loss = Callable[[Any, Any, Batch, jax.Array], jax.Array]
Step = Callable[["TrainState", Any, Batch, jax.Array], tuple["TrainState", dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """What a step changes; frozen parameters are no part of it."""

    step: jax.Array  # int32, number of optimizer steps taken
    trainable: Any
    optimizer: optax.OptState
    average: Any = None  # moving average of ``trainable``, where one is kept

    @property
    def tuned(self) -> Any:
        """What to validate and to keep: the average, or else what is trained."""
        return self.trainable if self.average is None else self.average


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and on what."""


def adamw(
    schedule: optax.ScalarOrSchedule, weight_decay: float, clip: float | None = 1.0
) -> optax.GradientTransformation:
    """AdamW (β 0.9, 0.999), gradients clipped to a global norm; only matrices decay."""

    def decays(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

    inner = optax.adamw(schedule, weight_decay=weight_decay, mask=decays)
    return inner if clip is None else optax.chain(optax.clip_by_global_norm(clip), inner)


def init_state(
    trainable: Any, optimizer: optax.GradientTransformation, average: bool = False
) -> TrainState:
    """The state before the first step; ``trainable`` is copied, since steps donate their state."""
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trainable)
    kept = init_average(trainable) if average else None
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable), kept)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    refresh_gap: int | None = None,
    placement: TrainState | None = None,
    average_decay: float = 0.999,
) -> Step:
    """A jitted ``step(state, frozen, batch, key) -> (state, {"loss", "gradient_norm"})``.

    The leading axis of every array in ``batch`` is split into ``accumulate`` micro-batches, whose
    gradients are averaged before the one optimizer step; schedules advance once.  ``key`` is the
    run's key, the same at every step: the step number is folded in.  ``state`` is donated.

    With ``refresh_gap``, GaLore's, there are two programs, with and without a refresh of the bases,
    and the host takes the first every so many steps: a program that decides holds all gradients.

    ``placement`` holds the sharding of each array of the state: there it stays (left to itself, the
    compiler may choose others, and the second step compiles again).  ``average_decay``: of the
    moving average, where the state has one.
    """
    galore = refresh_gap is not None
    programs = make_programs(loss, optimizer, accumulate, galore, placement, average_decay)
    if refresh_gap is None:
        return programs["step"]

    def choose(state: TrainState, *arguments: Any):
        due = int(state.step) % refresh_gap == 0
        return programs["refresh" if due else "step"](state, *arguments)

    return choose


def make_programs(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    galore: bool = False,
    placement: TrainState | None = None,
    average_decay: float = 0.999,
) -> dict[str, Any]:
    """The jitted functions that ``make_step`` chooses from: ``step``, and GaLore's ``refresh``."""
    update = optax.with_extra_args_support(optimizer).update

    def mean_loss(trainable: Any, frozen: Any, batch: Batch, key: jax.Array) -> jax.Array:
        return loss(trainable, frozen, batch, key).mean()

    def step(state: TrainState, frozen: Any, batch: Batch, key: jax.Array, **extra: bool):
        keys = jax.random.split(jax.random.fold_in(key, state.step), accumulate)
        value_and_grad = jax.value_and_grad(mean_loss)
        if accumulate == 1:
            value, grads = value_and_grad(state.trainable, frozen, batch, keys[0])
        else:
            # Example i goes into micro-batch i mod k: a device's rows then stay where they are.
            micro = jax.tree.map(
                lambda x: x.reshape(len(x) // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1),
                batch,
            )

            def add(total: Any, part: tuple[Batch, jax.Array]):
                return jax.tree.map(
                    jnp.add, total, value_and_grad(state.trainable, frozen, *part)
                ), None

            zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
            total, _ = jax.lax.scan(add, zero, (micro, keys))
            value, grads = jax.tree.map(lambda x: x / accumulate, total)
        updates, opt_state = update(grads, state.optimizer, state.trainable, **extra)
        trainable = optax.apply_updates(state.trainable, updates)
        average = state.average
        if average is not None:
            average = update_average(average, trainable, state.step, average_decay)
        metrics = {"loss": value, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, trainable, opt_state, average), metrics

    options: dict[str, Any] = {"compiler_options": compiler_options()}
    if placement is not None:
        options["out_shardings"] = (placement, placement.step)  # metrics are whole, as step is
    jit = partial(jax.jit, donate_argnums=0, **options)
    if not galore:
        return {"step": jit(step)}
    return {"step": jit(partial(step, refresh=False)), "refresh": jit(partial(step, refresh=True))}


def fit(
    state: TrainState,
    frozen: Any,
    step: Step,
    batches: Iterable[Batch],
    *,
    steps: int,
    key: jax.Array,
    arrays: tuple[str, ...],
    place: Callable[[Batch], Batch] = lambda batch: batch,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
    validate_every: int = 0,
    validate: Callable[[int, Any], str] = lambda step, tuned: "",
    save: Callable[[TrainState], None] | None = None,
    save_due: Callable[[int], bool] = lambda step: False,
    stop: Callable[[int], bool] = lambda step: False,
    describe: Callable[[Batch], str] = lambda batch: "",
    progress: bool = True,
) -> TrainState:
    """Goes on to step ``steps`` over ``batches`` with a progress bar (loss, images/s, time left).

    Only the ``arrays`` of a batch go to the device, through ``place``.  ``validate(step, tuned)``
    runs every ``validate_every`` steps and after the last one; the text it returns stands in the
    bar.  ``save(state)`` runs where ``save_due(step)``, after the last one, and before the loop
    ends early because ``stop(step)`` says so.

    Raises ``TrainingError`` at the first loss that is not finite, naming the step and, through
    ``describe``, the examples of its batch; also if ``batches`` ends early.
    """
    iterator = iter(batches)
    first = int(state.step)
    note = ""
    with tqdm(total=steps, initial=first, unit="step", disable=not progress, smoothing=0.1) as bar:
        for index in range(first + 1, steps + 1):
            batch = next(iterator, None)
            if batch is None:
                raise TrainingError(f"the data ended after {index - 1} of {steps} steps")
            chosen = place({name: batch[name] for name in arrays})
            state, metrics = step(state, frozen, chosen, key)
            values = {name: float(value) for name, value in metrics.items()}
            if not np.isfinite(values["loss"]):
                raise TrainingError(
                    f"step {index}: the loss became {values['loss']}; the batch held "
                    f"{describe(batch) or 'unnamed examples'}"
                )
            on_step(index, values)
            if validate_every and (index % validate_every == 0 or index == steps):
                note = validate(index, state.tuned)
            stopping = stop(index)
            if save is not None and (save_due(index) or index == steps or stopping):
                save(state)
            bar.update()
            elapsed = bar.format_dict["elapsed"] or 1e-9
            rate = (index - first) * len(chosen[arrays[0]]) / elapsed
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate:.1f} images/s {note}")
            if stopping:
                break
    return state
