"""Tiny checkpoints and tiny phantom folders for the experiments' tests."""

from __future__ import annotations

import pytest

import compiling
import tiny_models
from experiments import paper
from samjax.data.phantom import write_phantom_folder
from samjax.models.functional import init_params
from samjax.models.sam import SamConfig
from samjax.models.weights import save_weights


@pytest.fixture(autouse=True)
def compiled_quickly(quick_compilation, monkeypatch):
    """Compiling is most of the time here."""
    compiling.use_old_emitters(monkeypatch)
    monkeypatch.setattr(paper, "compile_quickly", lambda: None)  # it would outlast the test


@pytest.fixture(scope="session")
def tiny_config() -> SamConfig:
    return tiny_models.SAM_EVEN


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    save_weights(path, tiny_config, init_params(tiny_config, 0))
    return path


@pytest.fixture(scope="session")
def sam2_checkpoint(tmp_path_factory):
    """SAM 2, from noisy values: its residual branches start switched off otherwise."""
    path = tmp_path_factory.mktemp("checkpoint") / "sam2.safetensors"
    save_weights(path, tiny_models.SAM2, tiny_models.noisy_params(tiny_models.SAM2))
    return path


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory):
    """Eight phantoms with binary disc masks."""
    folder = tmp_path_factory.mktemp("phantoms") / "disc"
    write_phantom_folder(folder, "colour", 8, size=(64, 72), seed=0, target="disc")
    return folder


@pytest.fixture(scope="session")
def two_class_folder(tmp_path_factory):
    """Six phantoms with masks of two classes: 1 disc rim, 2 cup."""
    folder = tmp_path_factory.mktemp("phantoms") / "both"
    write_phantom_folder(folder, "colour", 6, size=(72, 64), seed=0, target="disc+cup")
    return folder
