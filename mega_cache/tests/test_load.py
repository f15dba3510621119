"""The door for programs: a model of transformers whose `generate` hits."""

import json
import sys

import pytest
from helpers import FOLDER, run_command

PROGRAM = """
import json, sys, tempfile
from portable_cache import load

path, trust = sys.argv[1], "--trust" in sys.argv
model = load(path, device="cpu", trust=trust)  # of the model that it was built from

import torch
from transformers import AutoTokenizer
from torch._dynamo.utils import counters

ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
told = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
answers = [
    model.generate(**inputs, past_key_values=model.new_cache(tokens=tokens), **told)[0].tolist()
    for tokens in (16, 20, 900)
]
eager = model.generate(**inputs, disable_compile=True, **told)[0].tolist()
print(json.dumps({
    "answers": answers, "eager": eager, "traced": counters["stats"]["unique_graphs"],
    "eos": model.generation_config.eos_token_id,
    "temporary": tempfile.gettempdir(),
    "measuring": [name for name in sys.modules if name.startswith("portable_cache.build")],
}))
"""
REFUSED = """
import sys
from common.errors import ScriptError
from portable_cache import load

try:
    load(sys.argv[1], device="cpu", dtype=sys.argv[2], expect_sha256=sys.argv[3] or None)
except ScriptError as error:
    print(type(error).__name__, error.status)
"""


def program(text, *arguments, folder):
    done = run_command(
        ["bash", "-c", 'cd "$1" && shift && exec "$@"', "-", folder, sys.executable, "-c", text,
         *map(str, arguments)], PYTHONPATH=str(FOLDER), TMPDIR=str(folder),
    )  # fmt: skip
    assert done.status == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_generate_of_a_loaded_model_traces_nothing_and_is_eagers(subject, tmp_path):
    found = json.loads(program(PROGRAM, subject.pair.path, folder=tmp_path))
    assert found["answers"] == [found["eager"]] * 3
    assert found["traced"] == 0
    assert found["eos"] == 259  # the checkpoint's own
    assert found["measuring"] == []
    assert list(tmp_path.iterdir()) == []  # the compiler's caches are gone with the process
    assert found["temporary"] == str(tmp_path)  # where the program's own files are to stay


@pytest.mark.parametrize(
    ("name", "dtype", "pin", "expected"),
    [
        (None, "bfloat16", "", "ArtifactMismatchError 4"),
        ("nothing.bin", "float32", "", "ArtifactDamagedError 3"),
        (None, "float32", "0" * 64, "ArtifactUntrustedError 6"),
    ],
)
def test_a_refusal_is_the_exception_behind_the_exit_status(
    name, dtype, pin, expected, subject, tmp_path
):
    path = tmp_path / name if name else subject.pair.path
    assert program(REFUSED, path, dtype, pin, folder=tmp_path) == expected
