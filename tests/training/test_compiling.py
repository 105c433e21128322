"""The options with which a step is compiled; what they save: benchmarks/memory.py."""

import jax
import pytest

from samjax.training.compiling import PRODUCTS_ONLY, compiler_options


def test_this_xla_knows_them():
    assert compiler_options() == PRODUCTS_ONLY


@pytest.fixture
def forgetful():
    """Asks anew, before and after the test."""
    compiler_options.cache_clear()
    yield
    compiler_options.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_another_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options() == {}


@pytest.mark.usefixtures("forgetful")
def test_an_xla_that_does_not_know_them(monkeypatch):
    monkeypatch.setattr("samjax.training.compiling.PRODUCTS_ONLY", {"xla_cpu_unheard_of": "1"})
    assert compiler_options() == {}
