"""What keeps the house in order: one version, a light install, short files, nothing left open."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import samjax

REPOSITORY = Path(__file__).resolve().parents[1]
INSTALLED = ("samjax", "convert", "experiments")
FOLDERS = (*INSTALLED, "benchmarks", "tests", ".ci")
FILES = [file for folder in FOLDERS for file in sorted((REPOSITORY / folder).rglob("*.py"))]
HEAVY = re.compile(r"torch|tensorflow|tf-|nvidia|cuda|triton|jax-cuda")
LONGEST = {"tests": 600}  # lines
LONGEST_ELSEWHERE = 420  # what a reader can hold in the head


def relative(file: Path) -> str:
    return file.relative_to(REPOSITORY).as_posix()


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))


def test_version_is_in_one_place():
    settings = project()
    assert "version" not in settings["project"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "samjax.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", samjax.__version__)
    assignments = [
        relative(f) for f in FILES if re.search(r"^__version__ ?=", f.read_text("utf-8"), re.M)
    ]
    assert assignments == ["samjax/__init__.py"]


def test_version_is_in_the_changelog():
    text = (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    assert f"## [{samjax.__version__}]" in text or "## [Unreleased]" in text


def test_public_names():
    assert len(samjax.__all__) <= 20
    assert all(hasattr(samjax, name) for name in samjax.__all__)


@pytest.mark.slow
def test_no_module_loads_torch_or_tensorflow():
    """`import samjax`, and every other module of ours too: torch waits until it is called for."""
    modules = []
    for folder in INSTALLED:
        for file in sorted((REPOSITORY / folder).rglob("*.py")):
            name = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
            modules.append(name.removesuffix(".__init__"))
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_core_install_is_light():
    """Walks what `pip install .` pulls in, by the metadata of the installed distributions."""
    waiting = [Requirement(line) for line in project()["project"]["dependencies"]]
    seen: dict[str, str] = {}
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        # Empty for an extra: "" is the environment of a plain requirement.
        for extra in wanted.extras or {""}:
            if f"{name}[{extra}]" in seen:
                continue
            seen[f"{name}[{extra}]"] = name
            for line in importlib.metadata.requires(name) or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    assert len(seen) > len(project()["project"]["dependencies"])
    assert [name for name in seen.values() if HEAVY.match(name)] == []


def test_constraints_cover_every_dependency():
    """Every requirement of the core and of the extras but CUDA's has a version, which fits."""
    pins: dict[str, set[str]] = {}
    for line in (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert pin.url is None
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            pins.setdefault(pin.name, set()).add(specifier.version)
    settings = project()["project"]
    extras = settings["optional-dependencies"]
    wanted = settings["dependencies"] + extras["convert"] + extras["reference"] + extras["dev"]
    for line in wanted:
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name != "samjax":
            assert name in pins, f"constraints.txt lacks {name}: run `make lock`"
            assert all(requirement.specifier.contains(version) for version in pins[name]), line


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_file_is_short_and_finished(file: Path):
    text = file.read_text("utf-8")
    longest = LONGEST.get(relative(file).split("/")[0], LONGEST_ELSEWHERE)
    assert text.count("\n") <= longest, "one file holds one idea: split it"
    if file != Path(__file__):  # this file names what it looks for
        assert re.findall(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", text) == []


def public_without_docstring(source: str) -> list[str]:
    """Names of public modules, classes and functions without a docstring; methods are excused."""
    module = ast.parse(source)
    definitions = [
        node
        for node in module.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]
    missing = [node.name for node in definitions if ast.get_docstring(node) is None]
    return missing if ast.get_docstring(module) else ["the module", *missing]


PUBLIC = [file for file in FILES if relative(file).split("/")[0] in ("samjax", "convert")]


@pytest.mark.parametrize("file", PUBLIC, ids=relative)
def test_public_names_have_docstrings(file: Path):
    assert public_without_docstring(file.read_text("utf-8")) == []


def test_finds_a_missing_docstring():
    source = '"""M."""\ndef f(): ...\ndef _g(): ...\nclass C:\n    """C."""\n    def h(self): ...'
    assert public_without_docstring(source) == ["f"]
    assert public_without_docstring("") == ["the module"]


def test_no_machine_path_in_the_tree():
    """A path of one machine, or the address of a package index, works nowhere else."""
    names = ["pyproject.toml", "constraints.txt", "Makefile", ".ci/run", ".pre-commit-config.yaml"]
    files = [REPOSITORY / name for name in names] + FILES
    forbidden = re.compile(r"/(work|root|home|opt)/\w|file://|index-url")
    found = [relative(f) for f in files if forbidden.search(f.read_text("utf-8"))]
    assert [name for name in found if name != relative(Path(__file__))] == []
