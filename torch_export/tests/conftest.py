"""Tests import the folder's modules as its scripts do, and share checkpoints and packages."""

import shutil
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
def shared_folders(presets_folder, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("LLAMA_PRESETS", str(presets_folder))
    # Inductor keeps precompiled C++ headers there: 10 s of g++ for each folder that has none
    patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def copied_folder(tmp_path_factory):
    """The folder alone, elsewhere, with a package of random:tiny at its default place."""
    from helpers import run_wrapper, succeeded

    folder = tmp_path_factory.mktemp("elsewhere") / "torch_export"
    ignored = shutil.ignore_patterns("artifacts", "__pycache__", "tests", "results")
    shutil.copytree(FOLDER, folder, ignore=ignored)
    # autotuning takes a minute on two cores, and the graph is the same
    flags = ["--model-id=random:tiny", "--device=cpu", "--no-max-autotune"]
    succeeded(run_wrapper("build.sh", *flags, folder=folder))
    return folder


@pytest.fixture(scope="session")
def package(copied_folder):
    """The package of random:tiny; its metadata is beside it."""
    return copied_folder / "artifacts" / "llama3b_aotinductor.pt2"
