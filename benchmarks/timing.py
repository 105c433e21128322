"""What the benchmarks share: alternating rounds, the machine, and its matrix product peak."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MALLOC = {name: os.environ.get(name) for name in ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")}
PEAK_SIZE = 4096  # side of the matrices whose product is the peak


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def alternate(
    theirs: Callable[[], Any], ours: Callable[[], Any], rounds: int
) -> dict[str, list[float] | float]:
    """Seconds of both in alternating rounds after a warm-up, and the median of their ratio.

    Both suffer alike from a machine that drifts.
    """
    theirs(), ours()
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(rounds)]
    return {
        "upstream_seconds": [round(a, 4) for a, _ in pairs],
        "ours_seconds": [round(b, 4) for _, b in pairs],
        "speed_over_upstream_median": round(statistics.median(a / b for a, b in pairs), 3),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "device": str(jax.devices()[0].device_kind),
        "processor": platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "jax": jax.__version__,
        "malloc": MALLOC,
        "xla_flags": os.environ.get("XLA_FLAGS"),
    }


def matmul_peak(dtype: Any) -> float:
    """Floating-point operations per second of one large matrix product, as measured here."""
    x = jnp.ones((PEAK_SIZE, PEAK_SIZE), dtype)
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    best = min(seconds(lambda: jax.block_until_ready(product(x))) for _ in range(3))
    return 2 * PEAK_SIZE**3 / best
