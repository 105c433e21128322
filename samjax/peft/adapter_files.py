"""Adapters on disk: our own small file, SAMed's and Sam_LoRA's, and PEFT's.

All three are safetensors, which load without torch and never execute anything.

* Ours holds everything an ``Adapter`` is, in our paths and our orientation.
* SAMed (hitachinsk/SAMed ``sam_lora_image_encoder.py``) and Sam_LoRA (MathieuNlp/Sam_LoRA) number
  the pairs ``q, v`` of block 0, ``q, v`` of block 1, …: ``w_a_000 (r, in)``, ``w_b_000 (out, r)``.
* PEFT's folder is written by ``samjax.peft.peft_files``.

A file with anything in it that is not understood is an error that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from samjax.atomic import atomic_write
from samjax.peft.lora import Adapter, factor_pairs
from samjax.peft.peft_files import PEFT_TENSORS, read_peft
from samjax.peft.tensor_files import checked_factors, fail, load_factors, on_host
from samjax.trees import Params, flatten, unflatten

FORMAT = "samjax-adapter"

_SAMED_KEY = re.compile(r"w_([ab])_(\d{3,})")
_SAMED_LAYER = re.compile(r"image_encoder/blocks/(\d+)/attn/qkv")


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
    tensors = on_host(path, flatten(tree))
    with atomic_write(path) as temporary:
        save_file(tensors, str(temporary), metadata={**(metadata or {}), **own})


def read_adapter(path: str | Path, modules: Mapping[str, str] | None = None) -> Adapter:
    """Reads an adapter of any of the three kinds; the kind is recognised by the content.

    ``path`` is a safetensors file, or for PEFT also the folder.  ``modules`` is {our path of a
    layer: its module's name in PyTorch}, by which PEFT's names are read (``Family.modules`` of
    ``convert``); by default, as for SAM's, dots stand for slashes.

    SAMed's numbering says nothing of the model: it is taken to start at the first block of the
    encoder.  More blocks than the model has are an error in ``merge``; a file whose training left
    out some blocks (Sam_LoRA's ``lora_layer``) cannot be told from one of the first blocks.

    Raises ``ValueError`` naming the file and all that is wrong with it: missing, truncated, no
    adapter, unpaired or unknown tensors, unsupported settings, NaN.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / PEFT_TENSORS).is_file():
            pickled = (path / PEFT_TENSORS).with_suffix(".bin").exists()
            hint = "; save it with safe_serialization=True" if pickled else ""
            raise ValueError(f"{path}: a folder without {PEFT_TENSORS}{hint}")
        return read_peft(path / PEFT_TENSORS, modules)
    tensors, metadata = load_factors(path)
    if metadata.get("format") == FORMAT:
        return _read_own(path, tensors, metadata)
    if any(".lora_" in name for name in tensors):
        return read_peft(path, modules)
    if any(_SAMED_KEY.fullmatch(name) for name in tensors):
        return Adapter(factors=_from_samed(path, tensors))
    fail(path, "not an adapter of samjax, SAMed, Sam_LoRA or PEFT; it holds", sorted(tensors))


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
        fail(path, "SAMed's layout cannot express this adapter", problems or ["no factors"])
    tensors = on_host(path, tensors)
    with atomic_write(path) as temporary:
        save_file(tensors, str(temporary))


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
        fail(path, "an adapter of samjax with contents that are not understood", unknown)
    params = unflatten({name: jnp.asarray(array) for name, array in parts["params"].items()})
    return Adapter(factors=checked_factors(path, parts["factors"]), scale=scale, params=params)


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
        fail(path, "a LoRA file of SAMed or Sam_LoRA that does not add up", problems)
    return checked_factors(path, flat)
