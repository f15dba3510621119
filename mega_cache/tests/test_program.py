"""The README's program does what it says, and torch's own load reads the file."""

import re
import sys

from helpers import FOLDER, run_command

PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TRACED = """
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""
PLAIN = """
import sys, torch
import portable_cache.start.bundle

info = torch.compiler.load_cache_artifacts(open(sys.argv[1], "rb").read())
print(len(info.inductor_artifacts), len(info.aot_autograd_artifacts))
"""


def test_the_program_of_the_readme_generates_without_a_trace(subject, presets_folder, tmp_path):
    (program,) = PROGRAM.findall((FOLDER / "README.md").read_text())
    (checkpoint,) = presets_folder.glob("random-tiny-*")
    for shown, real in (
        ('"mega_cache"', repr(str(FOLDER))),
        ('"meta-llama/Llama-3.2-3B-Instruct"', repr(str(checkpoint))),
        ('"mega_cache/artifacts/llama3b_torchcompile_cache.bin"', repr(str(subject.pair.path))),
    ):
        assert shown in program
        program = program.replace(shown, real)
    inside = f'cd {tmp_path} && exec "$0" -c "$1"'
    done = run_command(["bash", "-c", inside, sys.executable, program + "import torch" + TRACED])
    assert done.status == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0"
    assert len(done.stdout.splitlines()) > 1


def test_a_plain_load_reads_the_file(subject, tmp_path):
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(FOLDER)}
    done = run_command([sys.executable, "-c", PLAIN, str(subject.pair.path)], **caches)
    assert done.status == 0, done.stderr
    assert done.stdout.split() == ["1", "1"]  # one graph for all cache lengths
