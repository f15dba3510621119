"""Tests import the folder's modules as its scripts do, and share checkpoints and packages."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER))
sys.path.insert(0, str(FOLDER / "tests"))

# autotuning takes a minute on two cores, and the graph is the same
BUILD = ("--model-id=random:tiny", "--device=cpu", "--no-max-autotune")

# whoever runs this in the background of a shell leaves SIGINT ignored, for our children too
signal.signal(signal.SIGINT, signal.default_int_handler)

# a busy machine is slow, and that is no failure
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """One folder for what all test processes of this session use."""
    own = tmp_path_factory.getbasetemp()
    # a worker's folder lies in the session's
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def presets_folder(shared_folder):
    """One folder for the preset checkpoints of all test processes."""
    return shared_folder / "presets"


@pytest.fixture(scope="session", autouse=True)
def shared_folders(presets_folder):
    patch = pytest.MonkeyPatch()
    patch.setenv("LLAMA_PRESETS", str(presets_folder))
    patch.setenv("XDG_CACHE_HOME", str(presets_folder.with_name("cache")))
    yield
    patch.undo()


def once(folder, make):
    """Have `make` fill the folder, in one of all test processes."""
    from filelock import FileLock

    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            make()
            (folder / "made").touch()


@pytest.fixture(scope="session")
def copied_folder(shared_folder, shared_folders):
    """The folder alone, elsewhere, with a base package of random:tiny at its default place."""
    from helpers import run_wrapper, succeeded

    folder = shared_folder / "elsewhere" / "torch_export"

    def make():
        ignored = shutil.ignore_patterns("artifacts", "__pycache__", "tests", "results")
        shutil.copytree(FOLDER, folder, ignore=ignored, dirs_exist_ok=True)
        succeeded(run_wrapper("build.sh", *BUILD, folder=folder))

    folder.parent.mkdir(exist_ok=True)
    once(folder, make)
    return folder


@pytest.fixture(scope="session")
def package(copied_folder):
    """The base graph's package of random:tiny; its metadata is beside it."""
    return copied_folder / "artifacts" / "llama3b_aotinductor.pt2"


@pytest.fixture(scope="session")
def kv_package(shared_folder, shared_folders):
    """The package of random:tiny with a KV cache, code only; its metadata is beside it."""
    from pairing import build

    folder = shared_folder / "kv"
    folder.mkdir(exist_ok=True)
    once(folder, lambda: build(folder / "kv.pt2", "--kv-cache"))
    return folder / "kv.pt2"


def make_subject(package, build_flags, checked):
    from faults import Subject

    from common.artifact.disk import ArtifactPair

    short = ("--prompt-length=12", "--max-new-tokens=3")
    return Subject(
        build="build_llama_aotinductor.py",
        run="run_llama_aotinductor.py",
        path_flag="--package-path",
        pair=ArtifactPair(package, package.with_name(package.stem + "_meta.json")),
        flags=("--model-id=random:tiny", "--device=cpu", "--load-artifacts", *short),
        build_flags=build_flags,
        checked=("model.dtype", "recipe.device", "recipe.cpu_features", *checked),
    )


@pytest.fixture(scope="session")
def base_subject(package):
    names = ("environment.torch", "model.config_digest", "recipe.weights_fingerprint")
    return make_subject(package, BUILD, names)


@pytest.fixture(scope="session")
def kv_subject(kv_package):
    # no version of torch: it starts without
    names = ("environment.compute_capability", "recipe.layer_digest")
    return make_subject(kv_package, (*BUILD, "--kv-cache"), names)


@pytest.fixture(scope="session")
def subject(kv_subject):
    """What the tests that both folders share are about."""
    return kv_subject
