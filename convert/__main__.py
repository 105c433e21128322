"""Checkpoints of any family to samjax and back: `python -m convert --ckpt FILE`.

The family is recognised from the file; the options are those of `convert.sam` and `convert.sam2`.
"""

from __future__ import annotations

import sys

from convert import command
from convert.families import FAMILIES


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 0, or 1 after an error, when nothing was written."""
    return command.main(FAMILIES, argv, "convert")


if __name__ == "__main__":
    sys.exit(main())
