"""Weights on disk: safetensors keyed by parameter path, with the config beside them.

The file loads without torch and never executes anything.  ``resize_params`` moves a model to
another input size by interpolating its position tables, as SAMed's ``load_from`` does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from samjax.atomic import atomic_write
from samjax.models.functional import abstract_params
from samjax.models.ops import linear_matrix
from samjax.models.sam import SamConfig
from samjax.models.sam2_config import Sam2Config
from samjax.trees import Params, flatten, unflatten

TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")

Config = SamConfig | Sam2Config
FAMILIES: dict[str, type[SamConfig] | type[Sam2Config]] = {
    config.family: config for config in (SamConfig, Sam2Config)
}
CONVERTER = "python -m convert --ckpt {path}"


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names the file and what was expected."""


def save_tensors(path: str | Path, tree: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes a nested dict of arrays as safetensors, atomically: all of it or nothing."""
    flat = {name: np.ascontiguousarray(leaf) for name, leaf in flatten(tree).items()}
    with atomic_write(path) as temporary:
        save_file(flat, str(temporary), metadata=dict(metadata))


def load_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads ``{name: array}`` and metadata of a safetensors file; ``WeightsError`` if broken."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.suffix in TORCH_SUFFIXES:
        raise WeightsError(
            f"{path}: a PyTorch file; convert it first: {CONVERTER.format(path=path)}"
        )
    try:
        with safe_open(str(path), framework="numpy") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a complete safetensors file ({error})") from error


def save_weights(
    path: str | Path, config: Config, params: Params, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a model: tensors keyed by path, the config as JSON in the metadata. Atomic."""
    own = {"family": config.family, "config": json.dumps(config.to_dict())}
    save_tensors(path, params, {**(metadata or {}), **own})


def load_weights(path: str | Path) -> tuple[Config, Params]:
    """Reads what ``save_weights`` wrote: the config and the float32 parameter tree.

    Raises ``WeightsError`` if the file is missing, broken, of another kind, or does not hold
    exactly the parameters of its config; all mismatches are named at once.
    """
    flat, metadata = load_tensors(path)
    if "config" not in metadata:
        raise WeightsError(
            f"{path}: no samjax model config in the metadata; a checkpoint of another project is "
            f"converted by: {CONVERTER.format(path=path)}"
        )
    family = metadata.get("family", SamConfig.family)  # files of samjax 0.1 are all SAM's
    if family not in FAMILIES:
        raise WeightsError(f"{path}: a model of family {family!r}; known: {', '.join(FAMILIES)}")
    try:
        config = FAMILIES[family].from_dict(json.loads(metadata["config"]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{path}: the model config in its metadata cannot be used ({error!r})"
        ) from error
    expected = flatten(abstract_params(config))
    problems = [f"missing: {name}" for name in expected.keys() - flat.keys()]
    problems += [f"unknown: {name}" for name in flat.keys() - expected.keys()]
    for name in expected.keys() & flat.keys():
        if expected[name].shape != flat[name].shape:
            problems.append(f"{name}: expected {expected[name].shape}, found {flat[name].shape}")
        elif flat[name].dtype != np.float32:
            problems.append(f"{name}: expected float32, found {flat[name].dtype}")
        elif not np.isfinite(flat[name]).all():
            problems.append(f"{name}: holds NaN or infinite values")
    if problems:
        raise WeightsError(f"{path}: does not fit its config:\n  " + "\n  ".join(sorted(problems)))
    return config, unflatten({name: jnp.asarray(leaf) for name, leaf in flat.items()})


def resize_params(
    config: Config, params: Params, image_size: tuple[int, int]
) -> tuple[Config, Params]:
    """The same model for another frame size (height, width) in pixels.

    SAM 2's parameters know no size.  SAM's do: bilinear interpolation (half-pixel centres, no
    antialiasing) of the absolute position embedding and of the relative-position tables of the
    global blocks; windowed blocks keep theirs.  Source: hitachinsk/SAMed
    ``sam_lora_image_encoder.py: load_from``.
    """
    if tuple(image_size) == config.image_size:
        return config, params
    if isinstance(config, Sam2Config):
        hiera = dataclasses.replace(config.image_encoder, image_size=tuple(image_size))
        return dataclasses.replace(config, image_encoder=hiera), params
    vit = dataclasses.replace(config.image_encoder, image_size=tuple(image_size))
    resized = dataclasses.replace(config, image_encoder=vit)
    flat, tables = flatten(params), {}
    gh, gw = vit.grid
    pos_embed = flat["image_encoder/pos_embed"]
    rows = linear_matrix(pos_embed.shape[1], gh)
    columns = linear_matrix(pos_embed.shape[2], gw)
    tables["image_encoder/pos_embed"] = jnp.einsum(
        "Hh,Ww,bhwc->bHWc", rows, columns, pos_embed, precision="highest"
    )
    for block in vit.global_blocks:
        for name, size in (("rel_pos_h", gh), ("rel_pos_w", gw)):
            path = f"image_encoder/blocks/{block}/attn/{name}"
            matrix = linear_matrix(flat[path].shape[0], 2 * size - 1)
            tables[path] = jnp.matmul(matrix, flat[path], precision="highest")
    return resized, unflatten({**flat, **tables})
