"""Adapters in the layout of huggingface/peft, read and written.

It is a folder: ``adapter_config.json`` holds the scales, ``adapter_model.safetensors`` the tensors
``base_model.model.<module>.lora_A.weight (r, in)`` and ``lora_B.weight (out, r)``.  Modules are
PyTorch's; settings that would change the result and are not supported are an error.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from samjax.atomic import atomic_write
from samjax.peft.lora import Adapter, factor_pairs
from samjax.peft.tensor_files import checked_factors, fail, load_factors, on_host
from samjax.trees import block_columns, flatten

PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"

_PEFT_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PEFT_BLOCKS = "samjax_blocks"  # in the tensors' metadata: how a fused pair is made up

_PEFT_READ = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
# About the training, or about where the factors go, which the tensors' names say already.
_PEFT_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout"),
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "target_modules"),
    *("task_type",),
)
# The other ways to initialise move a part of the base's weights into the factors.
_PEFT_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


def write_peft(
    folder: str | Path,
    adapter: Adapter,
    base_model: str | None = None,
    modules: Mapping[str, str] | None = None,
) -> None:
    """Writes a folder that ``peft.PeftModel.from_pretrained`` loads onto the torch model. Atomic.

    Factors on several column blocks of one layer (q and v of a fused ``qkv``) become one pair of
    the summed rank, ``B`` zero outside each factor's own columns; the product is the same, and the
    tensors' metadata say how to part them again.  ``base_model`` is noted in the
    config for people, and ``modules`` are PyTorch's names as in ``read_adapter``.
    Raises ``ValueError`` naming parameters tuned outright, which PEFT's layout has no place for,
    and layers that ``modules`` does not know.
    """
    folder = Path(folder)
    if adapter.params or not adapter.factors:
        problems = [f"{name}: a parameter tuned outright" for name in flatten(adapter.params)]
        fail(folder, "PEFT's layout cannot express this adapter", problems or ["no factors"])
    layers: dict[str, list] = {}
    for layer, block, a, b in factor_pairs(adapter.factors):
        pair = block, np.asarray(a, np.float32), np.asarray(b, np.float32)
        layers.setdefault(layer if modules else layer.replace("/", "."), []).append(pair)
    if modules:
        if unknown := [layer for layer in layers if layer not in modules]:
            fail(folder, "layers that the model does not have", unknown)
        layers = {modules[layer]: pairs for layer, pairs in layers.items()}
    tensors, ranks, blocks = {}, {}, {}
    for module, pairs in layers.items():
        a, b = _fuse(folder, module, pairs)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.T
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.T
        ranks[module] = a.shape[1]
        if [block for block, _, _ in pairs] != ["all"]:
            blocks[module] = [(block, a.shape[1]) for block, a, _ in pairs]
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(module): r for module, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": rank,
        "lora_alpha": _alpha(adapter.scale, rank),
        "rank_pattern": others,
        "alpha_pattern": {module: _alpha(adapter.scale, r) for module, r in others.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    tensors = on_host(folder / PEFT_TENSORS, tensors)
    metadata = {"format": "pt", _PEFT_BLOCKS: json.dumps(blocks)}
    with contextlib.ExitStack() as stack:  # neither file takes its name before both are complete
        temporary = stack.enter_context(atomic_write(folder / PEFT_TENSORS))
        temporary_config = stack.enter_context(atomic_write(folder / PEFT_CONFIG))
        save_file(tensors, str(temporary), metadata=metadata)
        temporary_config.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def read_peft(path: Path, modules: Mapping[str, str] | None) -> Adapter:
    """Reads the tensors' file, the config beside it; see ``adapter_files.read_adapter``."""
    config_path = path.parent / PEFT_CONFIG
    tensors, metadata = load_factors(path)
    config = _read_peft_config(config_path, path)
    found: dict[str, dict[str, np.ndarray]] = {}
    problems = []
    for name, tensor in tensors.items():
        match = _PEFT_KEY.fullmatch(name)
        if not match:
            problems.append(f"{name}: not understood")
        elif tensor.ndim != 2:
            problems.append(f"{name}: shape {tensor.shape}, expected two axes (a dense layer)")
        else:
            found.setdefault(match.group(1), {})[match.group(2)] = tensor.T
    try:
        blocks = dict(json.loads(metadata.get(_PEFT_BLOCKS, "{}")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: the metadata {_PEFT_BLOCKS} are damaged ({error})") from error
    paths = {module: layer for layer, module in (modules or {}).items()}
    if modules:
        problems += [f"{m}: the model has no such layer" for m in found if m not in paths]
    scales, pairs = {}, {}
    for module, sides in found.items():
        if missing := {"A", "B"} - sides.keys():
            problems.append(f"base_model.model.{module}.lora_{missing.pop()}.weight: missing")
            continue
        a, b = sides["A"], sides["B"]
        rank = _by_pattern(config["rank_pattern"], module, config["r"])
        if (a.shape[1], b.shape[0]) != (rank, rank):
            problems.append(
                f"{module}: rank {a.shape[1]} in lora_A, {b.shape[0]} in lora_B, "
                f"{rank} in {PEFT_CONFIG}"
            )
            continue
        alpha = _by_pattern(config["alpha_pattern"], module, config["lora_alpha"])
        scales[module] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        try:
            pairs[module] = _part(a, b, blocks.get(module, [("all", rank)]))
        except ValueError as error:
            problems.append(f"{module}: {error}")
    if problems:
        fail(path, "a PEFT adapter that does not add up", problems)
    first = next(iter(scales.values()))
    uniform = all(math.isclose(scale, first, rel_tol=1e-12) for scale in scales.values())
    flat = {}
    for module, parted in pairs.items():
        factor = np.float32(1 if uniform else scales[module])
        for block, a, b in parted:
            prefix = f"{paths.get(module, module.replace('.', '/'))}/{block}"
            flat[f"{prefix}/a"], flat[f"{prefix}/b"] = a, b * factor
    return Adapter(factors=checked_factors(path, flat), scale=first if uniform else 1.0)


def _alpha(scale: float, rank: int) -> float:
    """PEFT's ``lora_alpha``, as an integer where it is one."""
    alpha = float(scale) * rank
    return int(alpha) if alpha.is_integer() else alpha


def _fuse(folder: Path, module: str, pairs: list) -> tuple[np.ndarray, np.ndarray]:
    """One pair ``(in, Σr), (Σr, out)`` from the pairs of all column blocks of a layer."""
    widths = {b.shape[1] * (1 if block == "all" else 3) for block, _, b in pairs}
    if len(widths) != 1 or len({a.shape[0] for _, a, _ in pairs}) != 1:
        shapes = [f"{block}: {a.shape[0]} x {b.shape[1]}" for block, a, b in pairs]
        fail(folder, f"the factors on {module} are not of one layer", shapes)
    width = widths.pop()
    rows = []
    for block, _, b in pairs:
        start, stop = block_columns(block, width)
        rows.append(np.pad(b, ((0, 0), (start, width - stop))))
    return np.concatenate([a for _, a, _ in pairs], axis=1), np.concatenate(rows)


def _part(a: np.ndarray, b: np.ndarray, blocks: Sequence[Sequence]) -> list[tuple]:
    """Undoes ``_fuse``; ``ValueError`` if the factors do not have this make-up."""
    parted, row = [], 0
    for block, rank in blocks:
        start, stop = block_columns(block, b.shape[1])
        own = b[row : row + rank]
        if own[:, :start].any() or own[:, stop:].any():
            raise ValueError(f"lora_B has values outside the block {block!r} of its metadata")
        parted.append((block, a[:, row : row + rank], own[:, start:stop]))
        row += rank
    if row != a.shape[1]:
        raise ValueError(f"rank {a.shape[1]}, but {row} in its metadata")
    return parted


def _read_peft_config(path: Path, tensors: Path) -> dict[str, Any]:
    """The settings that say how to scale; anything that would change the result is refused."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{tensors}: a PEFT adapter needs {PEFT_CONFIG} beside it") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{path}: expected peft_type 'LORA', found {kind!r}")
    config = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, **config}
    problems = []
    for key, value in config.items():
        if key == "init_lora_weights":
            supported = value in _PEFT_PLAIN_INITS
        else:
            neutral = value in (None, False, "none") or value in ({}, [])
            supported = key in _PEFT_READ or key in _PEFT_HARMLESS or neutral
        if not supported:
            problems.append(f"{key} = {json.dumps(value)}: not supported")
    for key, pattern_key in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        config[pattern_key] = config[pattern_key] or {}
        for name, value in ((key, config.get(key)), *config[pattern_key].items()):
            if not isinstance(value, int | float) or (key == "r" and value < 1):
                problems.append(f"{name} = {json.dumps(value)}: expected a number")
        for pattern in config[pattern_key]:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{pattern_key} {pattern!r}: not a regular expression ({error})")
    if problems:
        fail(path, "a PEFT config that cannot be used", problems)
    return config


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name or its end, as PEFT does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
