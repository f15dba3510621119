"""Tests import the folder's modules as its scripts do, and share one set of checkpoints."""

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

BUILD = (
    "--model-id=random:tiny",
    "--device=cpu",
    "--prefill-lengths=16",
    "--decode-length=8",
)

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
def shared_folders(presets_folder, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("LLAMA_PRESETS", str(presets_folder))
    patch.setenv("XDG_CACHE_HOME", str(presets_folder.with_name("cache")))
    # Inductor keeps precompiled C++ headers there: 10 s of g++ for each folder that has none
    patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def copied_folder(shared_folder, shared_folders):
    """The folder alone, elsewhere, with an artifact of random:tiny at its default place."""
    from filelock import FileLock
    from helpers import run_wrapper, succeeded

    folder = shared_folder / "elsewhere" / "mega_cache"
    with FileLock(shared_folder / "copied_folder.lock"):
        if not list(folder.glob("artifacts/*_meta.json")):
            ignored = shutil.ignore_patterns("artifacts", "__pycache__", "tests", "results")
            shutil.copytree(FOLDER, folder, ignore=ignored, dirs_exist_ok=True)
            succeeded(run_wrapper("build.sh", *BUILD, folder=folder))
    return folder


@pytest.fixture(scope="session")
def subject(copied_folder):
    from faults import Subject

    from common.artifact.disk import ArtifactPair

    artifact = copied_folder / "artifacts" / "llama3b_torchcompile_cache.bin"
    short = ("--prompt-length=12", "--max-new-tokens=3")
    return Subject(
        build="build_llama_portable_cache.py",
        run="run_llama_with_portable_cache.py",
        path_flag="--cache-path",
        pair=ArtifactPair(artifact, artifact.with_name(artifact.stem + "_meta.json")),
        flags=("--model-id=random:tiny", "--device=cpu", "--load-artifacts", *short),
        # verifying is a test of its own, and takes another process
        build_flags=(*BUILD, "--no-verify"),
        verify_flags=("--verify",),
        checked=(
            "environment.torch",
            "environment.triton",
            "environment.transformers",
            "environment.gpu",
            "environment.compute_capability",
            "model.dtype",
            "model.config_digest",
            "recipe.device",
        ),
    )


@pytest.fixture(scope="session")
def eager_tokens(presets_folder):
    """Return a function from prompt length to the greedy tokens of uncompiled `generate`."""
    from common.cli import Console
    from common.model.checkpoint import resolve_checkpoint
    from common.model.eager import load_model
    from common.model.target import Target
    from common.model.tokenizer import load_codec
    from portable_cache.start import generation

    checkpoint = resolve_checkpoint("random:tiny", Console(quiet=True))
    target = Target(checkpoint, "cpu", "float32")
    model = load_model(target)
    codec = load_codec(checkpoint)

    def tokens(length, new_tokens):
        stops = list(checkpoint.eos_token_ids)
        generation.configure_generation(model, None, new_tokens, eos_token_id=stops)
        generate = generation.make_generate(model, None, seed=0)
        return generate(codec.synthetic_prompt(length, seed=0), lambda token_id: None)

    return tokens
