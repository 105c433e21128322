"""Adapters on disk: our own small file, SAMed's and Sam_LoRA's, and PEFT's; read and written.

All three are safetensors, which load without torch and never execute anything.

* Ours holds everything an ``Adapter`` is, in our paths and our orientation.
* SAMed (hitachinsk/SAMed ``sam_lora_image_encoder.py``) and Sam_LoRA (MathieuNlp/Sam_LoRA) number
  the pairs ``q, v`` of block 0, ``q, v`` of block 1, …: ``w_a_000 (r, in)``, ``w_b_000 (out, r)``.
* PEFT (huggingface/peft) is a folder: ``adapter_config.json`` holds the scales, the tensors are
  ``base_model.model.<module>.lora_A.weight (r, in)`` and ``lora_B.weight (out, r)``.

A file with anything in it that is not understood is an error that names it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from samjax.atomic import atomic_write
from samjax.peft.lora import Adapter, factor_pairs
from samjax.trees import Params, block_columns, flatten, unflatten

FORMAT = "samjax-adapter"
PEFT_CONFIG = "adapter_config.json"
PEFT_TENSORS = "adapter_model.safetensors"
TORCH_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin")

_SAMED_KEY = re.compile(r"w_([ab])_(\d{3,})")
_SAMED_LAYER = re.compile(r"image_encoder/blocks/(\d+)/attn/qkv")
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
_LISTED = 20


def write_adapter(
    path: str | Path, adapter: Adapter, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes our own file: ``factors/<path>``, ``params/<path>``, all float32. Atomic.

    ``metadata`` is free text of the caller's beside ``format`` and ``scale``, which are ours.
    Raises ``ValueError`` for an adapter that is empty, malformed or not finite, ``OSError`` if the
    file cannot be written.
    """
    factor_pairs(adapter.factors)  # refuses what read_adapter would refuse
    own = {"format": FORMAT, "scale": repr(float(adapter.scale))}
    if taken := sorted(own.keys() & (metadata or {}).keys()):
        raise ValueError(f"{path}: the metadata {taken} are the file's own")
    tree = {"factors": adapter.factors, "params": adapter.params}
    tensors = _on_host(path, flatten(tree))
    with atomic_write(path) as temporary:
        save_file(tensors, str(temporary), metadata={**(metadata or {}), **own})


def read_adapter(path: str | Path) -> Adapter:
    """Reads an adapter of any of the three kinds; the kind is recognised by the content.

    ``path`` is a safetensors file, or for PEFT also the folder.  SAMed's numbering says nothing of
    the model: it is taken to start at the first block of the encoder.  More blocks than the model
    has are an error in ``merge``; a file whose training left out some blocks (Sam_LoRA's
    ``lora_layer``) cannot be told from one of the first blocks.

    Raises ``ValueError`` naming the file and all that is wrong with it: missing, truncated, no
    adapter, unpaired or unknown tensors, unsupported settings, NaN.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / PEFT_TENSORS).is_file():
            pickled = (path / PEFT_TENSORS).with_suffix(".bin").exists()
            hint = "; save it with safe_serialization=True" if pickled else ""
            raise ValueError(f"{path}: a folder without {PEFT_TENSORS}{hint}")
        return _read_peft(path / PEFT_TENSORS)
    tensors, metadata = _load(path)
    if metadata.get("format") == FORMAT:
        return _read_own(path, tensors, metadata)
    if any(".lora_" in name for name in tensors):
        return _read_peft(path)
    if any(_SAMED_KEY.fullmatch(name) for name in tensors):
        return Adapter(factors=_from_samed(path, tensors))
    _fail(path, "not an adapter of samjax, SAMed, Sam_LoRA or PEFT; it holds", sorted(tensors))


def write_samed(path: str | Path, adapter: Adapter, blocks: int | None = None) -> None:
    """Writes the layout of SAMed and Sam_LoRA: factors on q and v of every encoder block. Atomic.

    The layout knows no scale: one other than 1 is multiplied into ``w_b``.  ``blocks`` is the
    number of encoder blocks that there must be (default: as many as the adapter has).
    Raises ``ValueError`` naming all that the layout cannot express.
    """
    problems = [f"{name}: a parameter tuned outright" for name in flatten(adapter.params)]
    tensors, seen = {}, set()
    for layer, block, a, b in factor_pairs(adapter.factors):
        found = _SAMED_LAYER.fullmatch(layer)
        if not found or block not in ("q", "v"):
            problems.append(f"{layer} [{block}]: not q or v of an encoder block")
            continue
        index = 2 * int(found.group(1)) + (block == "v")
        seen.add(index)
        tensors[f"w_a_{index:03d}"] = np.asarray(a, np.float32).T
        tensors[f"w_b_{index:03d}"] = np.asarray(b, np.float32).T * np.float32(adapter.scale)
    if blocks is None:
        blocks = max(seen, default=-1) // 2 + 1
    expected = set(range(2 * blocks))
    for index in sorted(expected ^ seen):
        what = "missing" if index in expected else f"beyond the {blocks} blocks"
        problems.append(f"factors on {'qv'[index % 2]} of block {index // 2}: {what}")
    if problems or not tensors:
        _fail(path, "SAMed's layout cannot express this adapter", problems or ["no factors"])
    tensors = _on_host(path, tensors)
    with atomic_write(path) as temporary:
        save_file(tensors, str(temporary))


def write_peft(folder: str | Path, adapter: Adapter, base_model: str | None = None) -> None:
    """Writes a folder that ``peft.PeftModel.from_pretrained`` loads onto the torch model. Atomic.

    Factors on several column blocks of one layer (q and v of a fused ``qkv``) become one pair of
    the summed rank, ``B`` zero outside each factor's own columns; the product is the same, and the
    tensors' metadata say how to part them again.  ``base_model`` is noted in the config for people.
    Raises ``ValueError`` naming parameters tuned outright, which PEFT's layout has no place for.
    """
    folder = Path(folder)
    if adapter.params or not adapter.factors:
        problems = [f"{name}: a parameter tuned outright" for name in flatten(adapter.params)]
        _fail(folder, "PEFT's layout cannot express this adapter", problems or ["no factors"])
    layers: dict[str, list] = {}
    for layer, block, a, b in factor_pairs(adapter.factors):
        pair = block, np.asarray(a, np.float32), np.asarray(b, np.float32)
        layers.setdefault(layer.replace("/", "."), []).append(pair)
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
    tensors = _on_host(folder / PEFT_TENSORS, tensors)
    metadata = {"format": "pt", _PEFT_BLOCKS: json.dumps(blocks)}
    with contextlib.ExitStack() as stack:  # neither file takes its name before both are complete
        temporary = stack.enter_context(atomic_write(folder / PEFT_TENSORS))
        temporary_config = stack.enter_context(atomic_write(folder / PEFT_CONFIG))
        save_file(tensors, str(temporary), metadata=metadata)
        temporary_config.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _fail(path: str | Path, what: str, problems: Sequence[str]) -> NoReturn:
    lines = list(problems[:_LISTED])
    if len(problems) > _LISTED:
        lines.append(f"… and {len(problems) - _LISTED} more")
    raise ValueError(f"{path}: {what}:\n  " + "\n  ".join(lines))


def _on_host(path: str | Path, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Contiguous float32 arrays, checked to be worth writing."""
    arrays = {k: np.ascontiguousarray(np.asarray(v, np.float32)) for k, v in tensors.items()}
    if not arrays:
        raise ValueError(f"{path}: the adapter is empty; nothing was written")
    if broken := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        _fail(path, "nothing was written, for there are NaN or infinite values in", broken)
    return arrays


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
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
        _fail(path, "cannot be used", problems or ["holds no tensors"])
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}, metadata


def _checked_factors(path: Path, flat: Mapping[str, np.ndarray]) -> Params:
    factors = unflatten({name: jnp.asarray(array) for name, array in flat.items()})
    try:
        factor_pairs(factors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return factors


def _read_own(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> Adapter:
    parts: dict[str, dict[str, np.ndarray]] = {"factors": {}, "params": {}}
    unknown = []
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part in parts and rest:
            parts[part][rest] = tensor
        else:
            unknown.append(name)
    try:
        scale = float(metadata.get("scale", ""))
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        unknown.append(f"scale {metadata.get('scale')!r} in the metadata; expected a number")
    if unknown:
        _fail(path, "an adapter of samjax with contents that are not understood", unknown)
    params = unflatten({name: jnp.asarray(array) for name, array in parts["params"].items()})
    return Adapter(factors=_checked_factors(path, parts["factors"]), scale=scale, params=params)


def _from_samed(path: Path, tensors: dict[str, np.ndarray]) -> Params:
    problems = []
    found: dict[int, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = _SAMED_KEY.fullmatch(name)
        if match and match.group(2) == f"{int(match.group(2)):03d}":
            found.setdefault(int(match.group(2)), {})[match.group(1)] = tensor
        else:
            problems.append(f"{name}: not understood")
    flat = {}
    for index in range(2 * (max(found, default=0) // 2 + 1)):
        for side in "ab":
            name = f"w_{side}_{index:03d}"
            tensor = found.get(index, {}).get(side)
            if tensor is None:
                problems.append(f"{name}: missing")
            elif tensor.ndim != 2:
                problems.append(f"{name}: shape {tensor.shape}, expected two axes")
            else:
                block = "qv"[index % 2]
                flat[f"image_encoder/blocks/{index // 2}/attn/qkv/{block}/{side}"] = tensor.T
    if problems:
        _fail(path, "a LoRA file of SAMed or Sam_LoRA that does not add up", problems)
    return _checked_factors(path, flat)


def _alpha(scale: float, rank: int) -> float:
    """PEFT's ``lora_alpha``, as an integer where it is one."""
    alpha = float(scale) * rank
    return int(alpha) if alpha.is_integer() else alpha


def _fuse(folder: Path, module: str, pairs: list) -> tuple[np.ndarray, np.ndarray]:
    """One pair ``(in, Σr), (Σr, out)`` from the pairs of all column blocks of a layer."""
    widths = {b.shape[1] * (1 if block == "all" else 3) for block, _, b in pairs}
    if len(widths) != 1 or len({a.shape[0] for _, a, _ in pairs}) != 1:
        shapes = [f"{block}: {a.shape[0]} x {b.shape[1]}" for block, a, b in pairs]
        _fail(folder, f"the factors on {module} are not of one layer", shapes)
    width = widths.pop()
    rows = []
    for block, _, b in pairs:
        start, stop = block_columns(block, width)
        rows.append(np.pad(b, ((0, 0), (start, width - stop))))
    return np.concatenate([a for _, a, _ in pairs], axis=1), np.concatenate(rows)


def _read_peft(path: Path) -> Adapter:
    config_path = path.parent / PEFT_CONFIG
    tensors, metadata = _load(path)
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
        _fail(path, "a PEFT adapter that does not add up", problems)
    first = next(iter(scales.values()))
    uniform = all(math.isclose(scale, first, rel_tol=1e-12) for scale in scales.values())
    flat = {}
    for module, parted in pairs.items():
        factor = np.float32(1 if uniform else scales[module])
        for block, a, b in parted:
            prefix = f"{module.replace('.', '/')}/{block}"
            flat[f"{prefix}/a"], flat[f"{prefix}/b"] = a, b * factor
    return Adapter(factors=_checked_factors(path, flat), scale=first if uniform else 1.0)


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
        _fail(path, "a PEFT config that cannot be used", problems)
    return config


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module's name or its end, as PEFT does."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
