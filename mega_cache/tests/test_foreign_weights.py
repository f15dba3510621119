"""No model runs on weights that are not its checkpoint's: missing and foreign tensors are named."""

import json
import shutil

import pytest
import torch
from helpers import run_script
from safetensors.torch import load_file, save_file

RUN, BUILD = "run_llama_with_portable_cache.py", "build_llama_portable_cache.py"
UP = "model.layers.1.mlp.up_proj.weight"


def lacking(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != UP}


def foreign(tensors):
    return {f"somebody.{name}": tensor for name, tensor in tensors.items()}


def more(tensors):
    return tensors | {"model.layers.9.mlp.up_proj.weight": torch.zeros(704, 256)}


def another_shape(tensors):
    return tensors | {UP: torch.zeros(8, 256)}


@pytest.mark.parametrize(
    ("change", "name"),
    [(lacking, UP), (foreign, "model."), (more, "layers.9"), (another_shape, UP)],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize(
    "command",
    [(RUN, "--eager"), (RUN, "--no-load-artifacts"), (BUILD, "--no-verify")],
    ids=["eager", "skip", "build"],
)
def test_weights_that_are_not_the_models_are_named_before_any_work(
    change, name, command, subject, presets_folder, tmp_path
):
    folder = tmp_path / "checkpoint"
    shutil.copytree(next(presets_folder.glob("random-tiny-*")), folder)
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 4
    script, *flags = command
    place = f"--cache-path={tmp_path / 'a.bin'}"
    done = run_script(script, f"--model-id={folder}", "--device=cpu", place, *flags)
    assert done.status == 2, done.stderr
    assert name in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and "compiled in" not in done.stderr
