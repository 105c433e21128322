"""Read and write PyTorch checkpoint files without ever running what is inside them.

A `.pth` file is a pickle, and a pickle is a program. `read_checkpoint` therefore reads it with
PyTorch's restricted reader (`weights_only=True`), which builds tensors and containers and refuses
everything else, and reports what a refused file wanted. Training checkpoints often hold a NumPy
scalar (the best score) or an `argparse.Namespace` beside the weights; those few names are replaced
by an empty stand-in class, so that they neither stop the reading nor run.
"""

from __future__ import annotations

import collections
import hashlib
import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from samjax.atomic import atomic_write

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every key."""

_BESIDE_WEIGHTS = (
    "argparse.Namespace",
    "datetime.datetime",
    "datetime.timedelta",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.dtypes.{kind}DType" for kind in ("Bool", "Float32", "Float64", "Int32", "Int64")),
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
)

_NOT_A_CHECKPOINT = (
    (b"version https://git-lfs", "a git-LFS pointer, not the file itself; run `git lfs pull`"),
    (b"\x89HDF", "an HDF5 file (Keras?), not a PyTorch checkpoint"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
)


class CheckpointError(ValueError):
    """A checkpoint file cannot be used. The message names the file and what is wrong with it."""


@dataclass(frozen=True)
class CheckpointInfo:
    """Where a state dict came from.

    Attributes:
        path: the file.
        sha256: hexadecimal digest of the whole file.
        container: "safetensors", "zip" or "legacy pickle".
        key: where in the file the state dict lay, such as "model"; "" for a bare state dict.
        prefix: what was taken off every key, such as "module.".
        dtypes: {dtype name: number of tensors} as stored.
        metadata: a safetensors file's own metadata.
    """

    path: Path
    sha256: str
    container: str
    key: str = ""
    prefix: str = ""
    dtypes: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_checkpoint(
    path: str | Path, key: str | None = None
) -> tuple[dict[str, np.ndarray], CheckpointInfo]:
    """Read the one state dict in a `.pth`, `.pt`, `.bin` or `.safetensors` file.

    The container is recognised by content: safetensors, PyTorch's zip format or the pickles from
    before PyTorch 1.6. The state dict may be bare or lie inside a training checkpoint
    (`{"model": …}`, `{"state_dict": …, "optimizer": …}`); prefixes in `PREFIXES` are taken off.

    Args:
        path: the file.
        key: where the state dict lies, needed only if the file holds several ("model", "ema").

    Returns:
        {key: array} and where it came from. Floating-point tensors come as float32 (lossless from
        float16 and bfloat16, rounded from float64), integer and bool tensors as they are.

    Raises:
        CheckpointError: the file is missing, truncated, no checkpoint, would run code, holds no
            state dict or several, or holds NaN or infinite values.
        ImportError: PyTorch is not installed.
    """
    path = Path(path)
    container = _recognise(path)
    metadata: dict[str, str] = {}
    if container == "safetensors":
        tensors, metadata = _load_safetensors(path)
        found = ""
    else:
        found, tensors = _find_state_dict(path, _load_pickle(path, container), key)
    dtypes = collections.Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    prefix, tensors = _strip_prefixes(tensors)
    arrays = {name: _to_numpy(path, name, tensor) for name, tensor in tensors.items()}
    broken = [n for n, a in arrays.items() if a.dtype.kind == "f" and not np.isfinite(a).all()]
    if broken:
        raise CheckpointError(
            f"{path}: NaN or infinite values in {len(broken)} of {len(arrays)} tensors: "
            f"{_some(broken)}"
        )
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return arrays, CheckpointInfo(path, digest, container, found, prefix, dict(dtypes), metadata)


def write_torch(path: str | Path, arrays: Mapping[str, np.ndarray], key: str | None = None) -> None:
    """Write a state dict that `torch.load(path)` and `load_state_dict` take; atomic.

    It is the whole file, or lies under `key` in it.

    Raises:
        OSError: it cannot be written (a full disk, …); an older file at `path` is left as it was.
        ImportError: PyTorch is not installed.
    """
    torch = import_torch()
    state_dict = collections.OrderedDict(
        (name, torch.from_numpy(np.array(array, order="C", copy=True)))
        for name, array in arrays.items()
    )
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        torch.save(state_dict if key is None else {key: state_dict}, stream)


def import_torch() -> Any:
    """The torch module.

    Raises:
        ImportError: it is absent; the message says which extra brings it.
    """
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            "PyTorch checkpoints need PyTorch (a CPU build is enough): "
            "pip install 'samjax[convert]'"
        ) from error
    return torch


def _recognise(path: Path) -> str:
    """The container, by the file's first bytes."""
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, not a checkpoint file")
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not head:
        raise CheckpointError(f"{path}: the file is empty")
    for magic, what in _NOT_A_CHECKPOINT:
        if head.startswith(magic):
            raise CheckpointError(f"{path}: this is {what}")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"{path}: this is an HTML or XML page, not a checkpoint; the download went wrong"
        )
    if head.startswith(b"PK\x03\x04"):
        return _recognise_zip(path)
    if head[8:9] == b"{":
        needed = 8 + int.from_bytes(head[:8], "little")
        if needed > size:
            raise CheckpointError(
                f"{path}: a truncated safetensors file: {size} bytes, its header alone has {needed}"
            )
        return "safetensors"
    if head[:1] == b"\x80":
        return "legacy pickle"
    raise CheckpointError(f"{path}: neither a PyTorch checkpoint nor a safetensors file")


def _recognise_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: a truncated or damaged PyTorch checkpoint (its zip directory is missing)"
        ) from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            f"{path}: a TorchScript program, which is code; save the model's state_dict() instead"
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"{path}: a zip archive, but not one that PyTorch wrote")
    return "zip"


def _load_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    import_torch()  # NumPy has no bfloat16, so the tensors come by way of PyTorch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in list(stream.keys())}
            return tensors, stream.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: a truncated or damaged safetensors file ({error})"
        ) from error


def _load_pickle(path: Path, container: str) -> Any:
    torch = import_torch()
    stand_ins = []
    for full_name in _BESIDE_WEIGHTS:
        module, _, name = full_name.rpartition(".")
        # PyTorch identifies an allowed class by these two attributes.
        stand_ins.append(type(name, (_StandIn,), {"__module__": module, "__qualname__": name}))
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # it fails below
            # Mapped into memory, a file of gigabytes is read once, and only where it is used.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=container == "zip")
    except MemoryError:
        raise
    except Exception as error:
        wanted = _refused_global(path, container, str(error))
        if wanted:
            raise CheckpointError(
                f"{path}: refused. Opening this file would call {wanted!r}, and a checkpoint needs "
                "nothing but tensors. Nothing was run. If you trust where it comes from, save its "
                "weights alone there: torch.save(model.state_dict(), …)"
            ) from error
        if "Unsupported operand" in str(error):
            raise CheckpointError(
                f"{path}: written with a pickle protocol that cannot be read safely, or damaged; "
                "where it comes from, save it again with torch.save and its default protocol"
            ) from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: a truncated or damaged PyTorch checkpoint ({reason})"
        ) from error


class _StandIn:
    """Takes the place of an object beside the weights; ignores all that it is built from."""

    def __new__(cls, *args: object, **kwargs: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _refused_global(path: Path, container: str, message: str) -> str | None:
    """The name that the file wanted to call; None if it is only damaged.

    PyTorch's message has it, unless the reader gave up before it came to one (pickles of a newer
    protocol); then it is the first one in the file that is not a tensor's or a container's. Only
    what stands in the file as a whole counts: a truncated one may end in the middle of a name.
    """
    names = _names_in(path, container)
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found and any(name.endswith(found.group(1)) for name in names):
        return found.group(1)
    harmless = ("torch.", "collections.", "_codecs.")
    foreign = [n for n in names if not n.startswith(harmless) and n not in _BESIDE_WEIGHTS]
    return foreign[0] if foreign else None


def _names_in(path: Path, container: str) -> list[str]:
    """The names that the file's pickles would import. Looks only; nothing is run."""
    if container != "zip":
        with path.open("rb") as stream:
            return list(_globals(stream))
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return [found for name in pickles for found in _globals(io.BytesIO(archive.read(name)))]


def _globals(stream: IO[bytes]) -> Iterator[str]:
    """The names that the pickles at the start of `stream` would import."""
    strings: list[str] = []
    try:
        while True:
            for opcode, argument, _ in pickletools.genops(stream):
                name = ""
                if opcode.name in ("GLOBAL", "INST"):
                    name = str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    name = ".".join(strings[-2:])
                elif isinstance(argument, str):
                    strings.append(argument)
                if re.fullmatch(r"[\w.]*\w", name):
                    yield name
    except Exception:
        return  # the file's end, the tensors' bytes that follow the pickles, or damage


def _find_state_dict(path: Path, content: Any, key: str | None) -> tuple[str, dict[str, Any]]:
    candidates = _candidates(content)
    if key is not None and key not in candidates:
        raise CheckpointError(
            f"{path}: no state dict under {key!r}; there is: {_some(list(candidates)) or 'none'}"
        )
    if key is None and len(candidates) > 1:
        listed = ", ".join(f"{name!r} ({len(d)} tensors)" for name, d in candidates.items())
        raise CheckpointError(f"{path}: holds several state dicts: {listed}; say which with --key")
    if not candidates:
        inside = (
            f"a dict of {_some([f'{k} ({type(v).__name__})' for k, v in content.items()])}"
            if isinstance(content, Mapping)
            else f"a {type(content).__name__}"
        )
        raise CheckpointError(f"{path}: holds no state dict (a dict of tensors), but {inside}")
    chosen = key if key is not None else next(iter(candidates))
    return chosen, dict(candidates[chosen])


def _candidates(node: Any, where: str = "", depth: int = 0) -> dict[str, Mapping[str, Any]]:
    """{dotted place: dict of tensors}, leaving out the state of optimizers."""
    if not isinstance(node, Mapping) or "param_groups" in node or depth > 4:
        return {}
    if _is_state_dict(node):
        return {where: node}
    found: dict[str, Mapping[str, Any]] = {}
    for name, child in node.items():
        if isinstance(name, str):
            found |= _candidates(child, f"{where}.{name}" if where else name, depth + 1)
    return found


def _is_state_dict(node: Mapping[Any, Any]) -> bool:
    """All values tensors, and one of them at least a floating-point array.

    The latter tells weights from a dict of losses (scalars) or of random states (bytes).
    """
    tensor = import_torch().Tensor
    return all(isinstance(k, str) and isinstance(v, tensor) for k, v in node.items()) and any(
        value.is_floating_point() and value.ndim for value in node.values()
    )


def _strip_prefixes(tensors: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    stripped = ""
    while tensors:
        common = [p for p in PREFIXES if all(name.startswith(p) for name in tensors)]
        if not common:
            break
        stripped += common[0]
        tensors = {name.removeprefix(common[0]): t for name, t in tensors.items()}
    return stripped, tensors


def _to_numpy(path: Path, name: str, tensor: Any) -> np.ndarray:
    torch = import_torch()
    tensor = tensor.detach()
    kind = (
        "sparse" if tensor.layout != torch.strided
        else "quantised" if tensor.is_quantized
        else "complex" if tensor.is_complex()
        else "without data (meta)" if tensor.is_meta
        else None
    )  # fmt: skip
    if kind:
        raise CheckpointError(f"{path}: the tensor {name!r} is {kind}; expected plain numbers")
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
    return tensor.contiguous().numpy()


def _some(names: list[str], most: int = 10) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f", … and {more} more" if more > 0 else "")
