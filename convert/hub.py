"""Checkpoints by the names that they have on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from convert.torch_io import CheckpointError

OFFICIAL = {
    f"facebook/sam2{dot}-hiera-{size}": f"sam2{dot}_hiera_{size.replace('-', '_')}.pt"
    for dot in ("", ".1")
    for size in ("tiny", "small", "base-plus", "large")
}
"""The file of each of Meta's repositories, as upstream's `build_sam.py` has them."""

SUFFIXES = (".pt", ".pth", ".safetensors")

_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w./-]+)?")


def is_name(text: str) -> bool:
    """Whether it looks like `owner/name` or `owner/name:file`, and not like a file's path."""
    if not _NAME.fullmatch(text):
        return False
    return ":" in text or not text.endswith((*SUFFIXES, ".ckpt", ".bin"))


def download(name: str) -> Path:
    """The checkpoint in the hub's cache on this machine, fetched if it is not there.

    Args:
        name: `owner/name`, whose checkpoint is Meta's own or the only one; or `owner/name:file`.

    Raises:
        CheckpointError: no such repository or file, several to choose from, or no connection.
        ImportError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            f"{name}: huggingface_hub is needed for it: pip install 'samjax[convert]'"
        ) from error
    repository, _, file = name.partition(":")
    try:
        file = file or OFFICIAL.get(repository) or _only_checkpoint(hub, repository)
        return Path(hub.hf_hub_download(repository, file))
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{name}: no such file, and no such repository") from error
    except errors.RemoteEntryNotFoundError as error:
        raise CheckpointError(f"{name}: the repository has no file {file}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(f"{name}: cannot be fetched from the hub ({reason})") from error


def _only_checkpoint(hub, repository: str) -> str:
    files = [f for f in hub.HfApi().list_repo_files(repository) if f.endswith(SUFFIXES)]
    if len(files) != 1:
        found = ", ".join(files) or "none"
        raise CheckpointError(
            f"{repository}: expected one checkpoint, found {found}; name it: {repository}:FILE"
        )
    return files[0]
