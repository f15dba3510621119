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
def shared_folders(presets_folder, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("LLAMA_PRESETS", str(presets_folder))
    # Inductor keeps precompiled C++ headers there: 10 s of g++ for each folder that has none
    patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def eager_tokens(presets_folder):
    """Return a function from prompt length to the greedy tokens of uncompiled `generate`."""
    import torch

    from common.checkpoints import resolve_checkpoint
    from common.console import Console
    from common.models import load_model
    from common.prompts import load_codec
    from portable_cache import generation
    from portable_cache.flags import CompileFlags

    checkpoint = resolve_checkpoint("random:tiny", presets_folder, Console(quiet=True))
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    codec = load_codec(checkpoint.folder)

    def tokens(length, new_tokens):
        eos = checkpoint.eos_token_ids
        generation.configure_generation(model, CompileFlags(), new_tokens, eos, 0, eager=True)
        prompt = generation.Prompt(codec.synthetic_prompt(length, seed=0), 0, 0)
        return generation.serve(model, prompt, None, seed=0)[1]

    return tokens
