"""Dependencies point one way: which room may import what, read from the source by `ast`."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
HOUSES = ("samjax", "convert", "experiments", "benchmarks")

# What each room may import from this repository, besides itself. A room is a module name or a
# package with all that is in it; the longest name that fits a file is its room.
MAY_IMPORT = {
    "samjax": {"samjax"},  # samjax/__init__.py gathers the public names
    "samjax.atomic": set(),
    "samjax.prompt_labels": set(),
    "samjax.trees": set(),
    "samjax.frame": set(),
    "samjax.drawing": set(),
    "samjax.models": {"samjax.trees"},
    "samjax.peft": {"samjax.trees"},
    "samjax.data": {"samjax.drawing", "samjax.frame"},  # not the trees, which bring jax
    "samjax.metrics": set(),
    "samjax.training": {"samjax.peft", "samjax.trees"},  # its labels say where arrays lie
    "samjax.predictor": {"samjax.frame", "samjax.models", "samjax.trees"},
    "samjax.video": {
        *("samjax.data", "samjax.frame", "samjax.models", "samjax.predictor", "samjax.trees"),
    },
    "samjax.amg": {"samjax.frame", "samjax.models", "samjax.predictor", "samjax.trees"},
    # An adapter is merged on the way out; `sam_model_registry` makes what the predictor takes.
    "convert": {"samjax.models", "samjax.peft", "samjax.predictor", "samjax.trees"},
    "experiments": {"samjax", "convert"},
    # Upstream's weights reach our model by the bridge; what is timed is the experiments' own step.
    "benchmarks": {"samjax", "convert", "experiments"},
}
# One writes files, the other names four numbers; neither knows anything of models or data.
FOR_ALL = {"samjax.atomic", "samjax.prompt_labels"}

# What a room may import from elsewhere (besides the standard library), where that is narrower
# than "everything that pyproject.toml declares".
MAY_IMPORT_FROM_ELSEWHERE = {
    "samjax.atomic": set(),
    "samjax.prompt_labels": set(),
    "samjax.trees": {"flax", "jax", "numpy"},
    "samjax.frame": {"numpy", "PIL"},
    "samjax.drawing": {"numpy", "scipy"},
    "samjax.models": {"flax", "jax", "jaxtyping", "numpy", "safetensors"},
    "samjax.peft": {"jax", "jaxtyping", "numpy", "optax", "safetensors"},
    "samjax.data": {
        *("absl", "array_record", "etils", "grain", "h5py", "highdicom", "nibabel", "numpy", "PIL"),
        *("pycocotools", "pydicom", "scipy", "SimpleITK", "tensorflow_datasets", "tqdm", "tyro"),
    },
    "samjax.metrics": {"matplotlib", "numpy", "scipy"},
}
# Imported inside functions only, and never in samjax.
TORCH = {"torch", "torchvision", "segment_anything", "sam2"}


class Import(NamedTuple):
    file: Path
    line: int
    target: str  # a module, or a name in a module
    in_function: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(REPOSITORY)}:{self.line} imports {self.target}"


def module_name(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(file: Path, source: str) -> list[Import]:
    """Every import in the file, at whatever depth; `from a import b` counts as `a.b`."""
    package = module_name(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *(node.module.split(".") if node.module else [])]
            targets = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            targets = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        found.extend(Import(file, node.lineno, target, in_function) for target in targets)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source, filename=str(file)), False)
    return found


def room_of(name: str, rooms) -> str | None:
    """The longest of `rooms` that is `name` or a package around it."""
    fitting = [room for room in rooms if f"{name}.".startswith(f"{room}.")]
    return max(fitting, key=len, default=None)


@cache
def all_imports() -> list[Import]:
    files = [file for house in HOUSES for file in sorted((REPOSITORY / house).rglob("*.py"))]
    return [found for file in files for found in imports_of(file, file.read_text("utf-8"))]


def wrong_rooms(imports: list[Import]) -> list[str]:
    wrong = []
    for found in imports:
        if found.target.split(".")[0] not in HOUSES:
            continue
        room = room_of(module_name(found.file), MAY_IMPORT)
        allowed = MAY_IMPORT[room] | FOR_ALL | {room}
        # `from samjax import __version__` is no room: the package itself holds no knowledge.
        if found.target in ("samjax", "samjax.__version__"):
            continue
        if room_of(found.target, allowed) is None or (
            "samjax" not in allowed and room_of(found.target, MAY_IMPORT) not in allowed
        ):
            wrong.append(f"{found}; {room} may import only {sorted(allowed)}")
    return wrong


def wrong_strangers(imports: list[Import]) -> list[str]:
    wrong = []
    for found in imports:
        top = found.target.split(".")[0]
        if top in HOUSES or top in sys.stdlib_module_names:
            continue
        room = room_of(module_name(found.file), MAY_IMPORT)
        if top in TORCH:
            if room.split(".")[0] == "samjax":
                wrong.append(f"{found}; samjax runs without torch")
            elif not found.in_function:
                wrong.append(f"{found} outside a function; the module must load without torch")
            continue
        allowed = MAY_IMPORT_FROM_ELSEWHERE.get(room)
        if allowed is not None and top not in allowed:
            wrong.append(f"{found}; {room} may import only {sorted(allowed)}")
    return wrong


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*, extras: bool = False) -> set[str]:
    """The distributions that pyproject.toml names as core dependencies, or in its extras."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    optional = project["optional-dependencies"]
    lines = project["dependencies"]
    if extras:
        lines = [line for extra in optional.values() for line in extra]
    return {normalised(re.match(r"[\w.-]+", line).group()) for line in lines}


def test_rooms():
    assert wrong_rooms(all_imports()) == []


def test_strangers():
    assert wrong_strangers(all_imports()) == []


def test_imports_are_declared():
    """A package that is there only because another one pulls it in may be gone tomorrow."""
    core, optional = declared(), declared(extras=True)
    owners = packages_distributions()
    undeclared = []
    for found in all_imports():
        top = found.target.split(".")[0]
        if top in TORCH or top in HOUSES or top in sys.stdlib_module_names:
            continue
        # An optional one may not be installed here; its modules bear its own name.
        names = {normalised(owner) for owner in [*owners.get(top, []), top]}
        if not names & (core | optional if found.in_function else core):
            undeclared.append(f"{found}, which pyproject.toml does not declare")
    assert undeclared == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("samjax/peft/lora.py", "from samjax.models import sam", "samjax.peft may import only"),
        ("samjax/peft/lora.py", "def f():\n    from ..models.sam import SamConfig", "peft"),
        ("samjax/peft/lora.py", "import samjax.models.sam", "samjax.peft may import only"),
        ("samjax/training/loop.py", "from samjax.data import phantom", "samjax.training may"),
        ("samjax/models/sam.py", "from samjax import predictor", "samjax.models may import only"),
        ("samjax/predictor.py", "from samjax.data import folder", "samjax.predictor may"),
        ("samjax/data/folder.py", "def f():\n    import jax.numpy", "samjax.data may import only"),
        ("samjax/models/sam.py", "import optax", "samjax.models may import only"),
        ("samjax/predictor.py", "def f():\n    import torch", "samjax runs without torch"),
        ("convert/sam.py", "import torch", "outside a function"),
        ("convert/sam.py", "from segment_anything import SamPredictor", "outside a function"),
        ("samjax/data/folder.py", "from samjax.trees import flatten", "samjax.data may import"),
        ("samjax/predictor.py", "import convert.sam", "samjax.predictor may import only"),
        ("samjax/__init__.py", "from experiments import demo", "samjax may import only"),
        ("convert/sam.py", "from benchmarks import timing", "convert may import only"),
        ("convert/sam.py", "importlib.import_module('samjax.data.folder')", "convert may"),
    ],
)
def test_finds_what_is_wrong(file: str, source: str, complaint: str):
    imports = imports_of(REPOSITORY / file, source)
    wrong = wrong_rooms(imports) + wrong_strangers(imports)
    assert len(wrong) == 1
    assert complaint in wrong[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("samjax/__init__.py", "from samjax.predictor import SamPredictor"),
        ("samjax/models/weights.py", "from samjax.atomic import atomic_write"),
        ("samjax/models/sam.py", "from .layers import Dense\nfrom flax import nnx"),
        ("convert/sam.py", "from samjax.peft import lora\ndef f():\n    import torch"),
        ("experiments/demo.py", "from convert import sam\nimport samjax.training.loop"),
        ("samjax/predictor.py", "from samjax import __version__\nimport matplotlib.pyplot"),
    ],
)
def test_allows_what_is_right(file: str, source: str):
    imports = imports_of(REPOSITORY / file, source)
    assert wrong_rooms(imports) + wrong_strangers(imports) == []
