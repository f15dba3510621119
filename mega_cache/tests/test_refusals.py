"""A wrong checkpoint ends a script by name, in every mode, before it has done any work."""

import shutil
import sys

import pytest
from helpers import FOLDER, run_command
from safetensors.torch import load_file, save_file

from common.cli import Console
from common.model.checkpoint import resolve_checkpoint

MISSING = "model.layers.2.mlp.up_proj.weight"
RUN, BUILD = (next(FOLDER.glob(f"{what}_llama_*.py")) for what in ("run", "build"))


@pytest.fixture(scope="module")
def spoilt(shared_folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spoilt") / "checkpoint"
    shutil.copytree(resolve_checkpoint("random:tiny", Console(quiet=True)).folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[MISSING]
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (BUILD, []),
        (RUN, []),
        (RUN, ["--no-load-artifacts"]),
        (RUN, ["--no-load-artifacts", "--eager"]),
    ],
    ids=["build", "load", "skip", "eager"],
)
def test_a_missing_tensor_is_never_random_numbers(script, words, spoilt):
    done = run_command([sys.executable, script, f"--model-id={spoilt}", "--device=cpu", *words])
    assert done.status == 2, done.stderr
    assert MISSING in done.stderr.splitlines()[-1]
    assert done.stdout == ""
