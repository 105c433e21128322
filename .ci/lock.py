"""Writes constraints.txt: `python .ci/lock.py python3.11 python3.12` (or `make lock`).

Resolves the core and the extras that the tests need with pip under Python 3.11, and all of them
but `convert` under a newer Python. A package that both resolve to one
version gets one line, one that differs gets a line for each Python. torch and what it needs are
resolved under 3.11 only, and pinned for both: on Linux an installation of torch may bring several
GB of CUDA, which torch itself pins to the last digit.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# Chosen by hand: torchvision's release goes with torch's, and the parity tests are written
# against these releases of the packages that they compare with.
FIXED = {
    "galore-torch": "1.0",
    "loralib": "0.1.2",
    "medpy": "0.5.2",
    "monai": "1.6.1",
    "sam2": "1.1.0",
    "segment-anything": "1.0",
    "torch": "2.13.0",
    "torchvision": "0.28.0",
}
# What sam2 and medpy need beside; resolved by name because building sam2's metadata needs torch.
REFERENCE_NEEDS = ["hydra-core>=1.3.2", "iopath>=0.1.10", "simpleitk>=2.1"]
REFERENCE_NEEDS += ["scikit-image>=0.24", "scikit-learn>=1.5"]
# Needs torch itself.
REFERENCE_ON_TORCH = ["peft>=0.17"]

HEADER = """\
# One version of every package, so that the install is the same everywhere. Written by `make lock`.
# pip install -c constraints.txt ".[convert,dev]"
# Python 3.11 gets the last jax and flax that run on it, newer Pythons the newest.
# Resolved on Linux: packages that only other systems need, and those of the cuda extras, are free.
"""


def resolve(python: str, requirements: list[str]) -> dict[str, str]:
    """The version of each package, by normalised name, that pip would install."""
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--report", "-", *requirements]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    found = {}
    for entry in json.loads(report)["install"]:
        name = re.sub(r"[-_.]+", "-", entry["metadata"]["name"]).lower()
        found[name] = entry["metadata"]["version"].split("+")[0]  # 2.13.0+cpu is a local build
    return found


def merge(old: dict[str, str], new: dict[str, str]) -> list[str]:
    lines = []
    for name in sorted(old | new):
        versions = {found[name] for found in (old, new) if name in found}
        if len(versions) == 1:
            lines.append(f"{name}=={versions.pop()}")
        else:
            lines.append(f'{name}=={old[name]} ; python_version < "3.12"')
            lines.append(f'{name}=={new[name]} ; python_version >= "3.12"')
    return lines


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} PYTHON_3_11 PYTHON_3_12_OR_NEWER")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = ("coco", "dev", "dicom", "tfds", "video", "volumes")
    common = project["dependencies"] + REFERENCE_NEEDS + [r for n in names for r in extras[n]]
    common = [line for line in common if not line.startswith("samjax[")]
    torch = [*extras["convert"], *REFERENCE_ON_TORCH, f"torch=={FIXED['torch']}"]
    old = resolve(sys.argv[1], common + torch)
    new = resolve(sys.argv[2], common)
    text = HEADER + "\n".join(merge(old | FIXED, new)) + "\n"
    (REPOSITORY / "constraints.txt").write_text(text)


if __name__ == "__main__":
    main()
