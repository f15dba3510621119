"""Tests import the folder's modules as its scripts do, and share one set of checkpoints."""

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))
sys.path.insert(0, str(FOLDER / "tests"))

# a busy machine is slow, and that is no failure
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def presets_folder(tmp_path_factory):
    """One folder for the preset checkpoints of all test processes."""
    return tmp_path_factory.mktemp("presets")


@pytest.fixture(scope="session", autouse=True)
def shared_presets(presets_folder):
    patch = pytest.MonkeyPatch()
    patch.setenv("LLAMA_PRESETS", str(presets_folder))
    yield
    patch.undo()
