"""What every test gets: a fixed numerical setting, a random generator, the shared real files."""

import atexit
import locale
import os
import tempfile
from pathlib import Path

# Read when the libraries are loaded, so they must stand before the first of those imports.
# One OpenBLAS thread: LAPACK calls on several virtual devices are 50 times slower with more.
# Two OpenMP threads are what torch gets on the smallest machine that runs these tests.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

REPOSITORY = Path(__file__).resolve().parents[1]

jax.config.update("jax_enable_x64", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
# Many tests compile the same small programs. The cache dies with the run: one that outlived it
# would let a test pass on what another version had compiled.
_compiled = tempfile.TemporaryDirectory(prefix="samjax-tests-")
atexit.register(_compiled.cleanup)
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# Shapes and types in the models' signatures are checked at each call, here and nowhere else.
install_import_hook("samjax.models", "beartype.beartype")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: no process ends with one while the others wait for it."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real files (data sets, checkpoints), which are not part of the repository.

    It is the one that the environment variable SAMJAX_SHARED_DATA names, or else `shared/data`
    beside the checkout. A test that asks for it is skipped where there is none.
    """
    named = os.environ.get("SAMJAX_SHARED_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real files: {folder} is not a folder (set SAMJAX_SHARED_DATA)")
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with the same seed in every test, whatever ran before."""
    return np.random.default_rng(0)


@pytest.fixture
def quick_compilation():
    """For modules of small models, which take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def same_locale():
    """Whatever a library does to it (GDCM, when it writes): the next test has the one of before."""
    spoken = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, spoken)
