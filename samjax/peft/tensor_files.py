"""What the adapter files of every kind have in common: safetensors read, checked, and written.

Contents that are not understood are an error that names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from samjax.peft.lora import factor_pairs
from samjax.trees import Params, unflatten

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")
_LISTED = 20


def fail(path: str | Path, what: str, problems: Sequence[str]) -> NoReturn:
    """A ``ValueError`` that names the file, what is wrong with it, and each of the problems."""
    lines = list(problems[:_LISTED])
    if len(problems) > _LISTED:
        lines.append(f"… and {len(problems) - _LISTED} more")
    raise ValueError(f"{path}: {what}:\n  " + "\n  ".join(lines))


def on_host(path: str | Path, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Contiguous float32 arrays, checked to be worth writing."""
    arrays = {k: np.ascontiguousarray(np.asarray(v, np.float32)) for k, v in tensors.items()}
    if not arrays:
        raise ValueError(f"{path}: the adapter is empty; nothing was written")
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        fail(path, "nothing was written, for there are NaN or infinite values in", broken)
    return arrays


def load_factors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors as float32, and the metadata."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix in TORCH_SUFFIXES:
        raise ValueError(f"{path}: a PyTorch file; adapters are read from safetensors")
    try:
        with safe_open(str(path), framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    problems = []
    for name, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name}: {tensor.dtype} instead of floating point")
        elif not np.isfinite(tensor).all():
            problems.append(f"{name}: NaN or infinite values")
    if problems or not tensors:
        fail(path, "cannot be used", problems or ["holds no tensors"])
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}, metadata


def checked_factors(path: Path, flat: Mapping[str, np.ndarray]) -> Params:
    """The tree of an adapter's factors; ``ValueError`` naming the file if they are no pairs."""
    factors = unflatten({name: jnp.asarray(array) for name, array in flat.items()})
    try:
        factor_pairs(factors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return factors
