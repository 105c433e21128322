"""How XLA is to compile a training step."""

from __future__ import annotations

from functools import lru_cache

import jax

# Left to itself, XLA's CPU compiler also hands sums, with what leads to them, to its library of
# kernels (YNNPACK), and for that writes scalar factors out as arrays: at 1024² up to a third of
# what a step allocates (benchmarks/memory.py), at equal speed.
PRODUCTS_ONLY: dict[str, str | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
    )
}


@lru_cache
def compiler_options() -> dict[str, str | bool]:
    """For ``jax.jit`` on the default backend; empty where this XLA does not know the options."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0).lower().compile(PRODUCTS_ONLY)
    except jax.errors.JaxRuntimeError:
        return {}
    return PRODUCTS_ONLY
