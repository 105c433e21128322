"""Write a file completely or not at all.

A checkpoint of gigabytes takes a while to write, and disks fill up. Everything that samjax writes
goes to a temporary file in the target's own folder first (so that the final rename stays within
one file system), is flushed to the disk, and only then takes the target's name. A reader sees the
old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SIZE_PROBLEMS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file exceeds the largest size allowed here",
}


def _errno_of(error: BaseException | None) -> int | None:
    """The errno behind `error`, also where a library wrapped it in an exception of its own.

    safetensors reports an I/O failure as `SafetensorError("… (os error 28)")`, and torch as a
    RuntimeError raised while the OSError is being handled.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            return int(match.group(1))
        error = error.__cause__ or error.__context__
    return None


def _is_about_another_file(error: BaseException, target: Path, temporary: Path | None) -> bool:
    """True for, say, a source file that the block could not read."""
    if not isinstance(error, OSError) or error.filename is None:
        return False
    ours = {str(target), str(target.parent), str(temporary)}
    return str(error.filename) not in ours and Path(error.filename) not in target.parents


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, it becomes `path`.

    The temporary file exists already (empty) and keeps the target's suffix. The block writes it,
    by any means, and closes it. Missing parent folders are created. On any exception the temporary
    file is removed, and whatever lay at `path` before stays as it was.

    Raises:
        OSError: the target cannot be written: a full disk, a quota, a missing permission, a folder
            of that name. It carries the errno and names the target; failures that a library has
            wrapped in an exception of its own are brought back to this form.
        Exception: anything else that the block raises passes through unchanged.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        if target.is_dir():
            raise OSError(errno.EISDIR, "there is a folder of that name")
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            prefix=f".{target.stem[:80]}.", suffix=f".tmp{target.suffix}", dir=target.parent
        )
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        # mkstemp makes a private file; the result gets the permissions of any other new file.
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_current_umask()
        os.chmod(temporary, mode)
        _fsync(temporary, os.O_RDWR)
        os.replace(temporary, target)
        temporary = None
    except Exception as error:
        number = _errno_of(error)
        if number is None or _is_about_another_file(error, target, temporary):
            raise
        reason = os.strerror(number)
        if number in _SIZE_PROBLEMS:
            reason = f"{_SIZE_PROBLEMS[number]} ({reason})"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        raise OSError(number, f"cannot write {target}: {reason}; nothing was written") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    if os.name == "posix":
        # The rename itself is on the disk only when the folder is. The file is complete by now,
        # and some network file systems refuse this call, so a refusal is no failure to write.
        with contextlib.suppress(OSError):
            _fsync(target.parent, os.O_RDONLY)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON with sorted layout, atomically; NaN is refused (it is not JSON)."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
