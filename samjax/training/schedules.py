"""Learning rates as functions of the step count, where count 0 is the first optimizer step.

All are `optax.Schedule`s. `peak` is the largest learning rate, `steps` the number of optimizer
steps that the rule is made for. They may be called with any count, also after the last step.

Raises:
    ValueError: each of them, for a value that is negative or not finite, naming it.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

Name = Literal["cosine", "poly", "restarts", "constant"]


def warmup_cosine(peak: float, steps: int, warmup: int) -> optax.Schedule:
    """Linear from `peak / warmup` to `peak` in `warmup` steps, then half a cosine to zero.

    A run shorter than its warmup keeps one step for the peak.
    """
    _check(peak=peak, steps=steps, warmup=warmup)
    warmup = min(warmup, max(steps - 1, 0))
    return _after_warmup(peak, warmup, optax.cosine_decay_schedule(peak, max(steps - warmup, 1)))


def warmup_poly(peak: float, steps: int, warmup: int = 250, power: float = 0.9) -> optax.Schedule:
    """SAMed's rule (trainer.py, commit 74c4ad2), and with it H-SAM's and SAMora's.

    With j = max(count - 1, 0): peak · (j + 1) / warmup for j < warmup, and from there on
    peak · (1 - (j - warmup) / steps)^power. SAMed sets the rate after each step, for the next one,
    and starts at j = 0's: so the first two steps have peak / warmup, and the peak is there twice.

    `steps` is SAMed's max_epochs · batches per epoch. The warmup is not subtracted, nor does the
    rule know that the released run stops at epoch 160 of 200: neither ends at zero.
    """
    _check(peak=peak, steps=steps, warmup=warmup, power=power)
    rule = _after_warmup(peak, warmup, optax.polynomial_schedule(peak, 0.0, power, steps))
    return lambda count: rule(jnp.maximum(count - 1, 0))


def cosine_restarts(
    peak: float, period: int, floor: float = 0.0, multiplier: int = 1
) -> optax.Schedule:
    """Half a cosine from `peak` to `floor` in `period` steps, again and again; no warmup.

    Each cycle is `multiplier` times as long as the one before. arXiv 1608.03983; SAM2LoRA's
    `CosineAnnealingWarmRestarts`, stepped once per optimizer step. `optax.sgdr_schedule` wants a
    list of all cycles, here there is no last one.
    """
    _check(peak=peak, period=period, floor=floor, multiplier=multiplier)
    if period < 1 or multiplier < 1:
        raise ValueError(f"period is {period}, multiplier {multiplier}, expected 1 or more")
    lengths = [period]
    while multiplier > 1 and sum(lengths) < np.iinfo(np.int32).max:
        lengths.append(lengths[-1] * multiplier)
    starts = jnp.array(np.cumsum([0, *lengths[:-1]]), jnp.int32)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        if multiplier == 1:
            progress = jnp.mod(count, period) / period
        else:
            cycle = jnp.searchsorted(starts, count, side="right") - 1
            progress = (count - starts[cycle]) / jnp.array(lengths, jnp.float32)[cycle]
        return floor + (peak - floor) * (1 + jnp.cos(jnp.pi * progress)) / 2

    return schedule


def constant(peak: float, warmup: int = 0) -> optax.Schedule:
    """`peak`, after a linear warmup like `warmup_cosine`'s."""
    _check(peak=peak, warmup=warmup)
    return _after_warmup(peak, warmup, optax.constant_schedule(peak))


def by_name(
    name: Name, peak: float, steps: int, warmup: int, *, power: float = 0.9, period: int = 1000
) -> optax.Schedule:
    """The schedule for a command line; `power` is for "poly", `period` for "restarts".

    Raises:
        ValueError: also for another name, and for restarts with a warmup, which have none.
    """
    match name:
        case "cosine":
            return warmup_cosine(peak, steps, warmup)
        case "poly":
            return warmup_poly(peak, steps, warmup, power)
        case "constant":
            return constant(peak, warmup)
        case "restarts":
            if warmup:
                raise ValueError(f"warmup is {warmup}, expected 0: restarts have none")
            return cosine_restarts(peak, period)
    raise ValueError(f"the schedule is {name!r}, expected cosine, poly, restarts or constant")


def _after_warmup(peak: float, warmup: int, then: optax.Schedule) -> optax.Schedule:
    """Linear from `peak / warmup` at count 0 to `peak` at `warmup - 1`; `then` starts after it."""
    if not warmup:
        return then
    linear = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([linear, then], [warmup])


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}, expected 0 or more, and finite")
