"""A start imports neither torch nor transformers, stays small however long it serves, and ends
cleanly; in processes of their own.
"""

import json
import os
import signal
import subprocess
import sys

import pytest
from helpers import FOLDER, run_command, succeeded, user_environment

GREEDY = ("--max-new-tokens=6", "--prompt=Hello", "--num-requests=2", "--chat")
SAMPLED = (*GREEDY, "--temperature=0.8", "--top-k=40", "--top-p=0.9")
# a run as the script makes it, and what of torch and transformers is there at its end
RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import run_llama_aotinductor
run_llama_aotinductor.main(sys.argv[2:])
theirs = "torch transformers triton functorch torchgen accelerate safetensors sympy".split()
print(sorted(name for name in sys.modules if name.partition(".")[0] in theirs))
"""
PROGRAM = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from aotinductor import load

def measure():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))

told = {"loads": [], "requests": [], "texts": []}
for _ in range(8):
    engine = load(sys.argv[2], "random:tiny", device="cpu")
    engine.generate([1, 2, 3], max_new_tokens=8)
    told["loads"].append(measure())
for request in range(60):
    ids = [(7 * request + i) % 256 for i in range(1 + 97 * request % 200)]
    engine.generate(ids, max_new_tokens=16)
    engine.generate(ids, max_new_tokens=16, temperature=0.9, top_k=50, seed=request)
    told["texts"].append("".join(engine.stream("Hello", max_new_tokens=16)))
    told["requests"].append(measure())
print(json.dumps(told))
"""
MIB = 2**20


def flags_for(package):
    return ("--model-id=random:tiny", "--device=cpu", f"--package-path={package}")


@pytest.mark.parametrize("choices", (GREEDY, SAMPLED), ids=("greedy", "sampled"))
def test_a_run_of_a_kv_package_imports_neither_torch_nor_transformers(choices, kv_package):
    command = [sys.executable, "-c", RUN, FOLDER, *flags_for(kv_package), *choices]
    assert succeeded(run_command(command)).stdout.splitlines()[-1] == "[]"


def test_a_run_of_the_base_graph_imports_neither_although_it_starts_over_libtorch(package):
    command = [sys.executable, "-c", RUN, FOLDER, *flags_for(package), *GREEDY]
    assert succeeded(run_command(command)).stdout.splitlines()[-1] == "[]"


def test_memory_and_open_files_do_not_grow_with_requests_nor_with_loads(kv_package):
    done = succeeded(run_command([sys.executable, "-c", PROGRAM, FOLDER, kv_package]))
    told = json.loads(done.stdout)
    (early, files), (late, files_later) = told["loads"][3], told["loads"][-1]
    assert files_later == files == told["requests"][-1][1]
    assert late - early < 8 * MIB
    resident = [bytes for bytes, _ in told["requests"]]
    assert max(resident[30:]) - max(resident[:30]) < 4 * MIB
    assert len(set(told["texts"])) == 1


def test_packages_over_libtorch_and_over_the_runtime_library_share_a_process(package, kv_package):
    program = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
from aotinductor import load
paths = [{str(package)!r}, {str(kv_package)!r}]
engines = [load(paths[kind], "random:tiny", device="cpu") for kind in (1, 0, 1, 0)]
assert "torch" not in sys.modules
import torch
engines.append(load(paths[1], "random:tiny", device="cpu"))
for engine in engines:
    print(engine.artifact["library"], *engine.generate([1, 2, 3], max_new_tokens=8))
"""
    told = succeeded(run_command([sys.executable, "-c", program])).stdout.splitlines()
    assert [line.split()[0] for line in told] == ["runtime", "libtorch"] * 2 + ["runtime"]
    assert len({tuple(line.split()[1:]) for line in told}) == 1


def test_a_program_names_no_model_and_meets_refusals_as_exceptions(kv_package):
    program = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
from aotinductor import load
from common.errors import ScriptError
path = {str(kv_package)!r}
print(load(path, device="cpu").artifact["weights_of"])
for place, pin in (("nothing.pt2", None), (path, "0" * 64)):
    try:
        load(place, device="cpu", expect_sha256=pin)
    except ScriptError as error:
        print(type(error).__name__, error.status)
"""
    told = succeeded(run_command([sys.executable, "-c", program])).stdout.splitlines()
    assert told == ["random:tiny", "ArtifactDamagedError 3", "ArtifactUntrustedError 6"]


def test_nothing_is_written_by_a_run_that_is_interrupted(kv_package, tmp_path):
    folders = {name: tmp_path / name for name in ("HOME", "TMPDIR", "here")}
    for folder in folders.values():
        folder.mkdir()
    words = ["--prompt=Hello", "--max-new-tokens=900", "--ignore-eos", "--num-requests=500"]
    script = [sys.executable, "-B", str(FOLDER / "run_llama_aotinductor.py")]
    process = subprocess.Popen(
        [*script, *flags_for(kv_package), *words, "--show-completions"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folders.pop("here"),
        env=user_environment() | {name: str(path) for name, path in folders.items()},
    )  # fmt: skip
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert told.splitlines()[-1] == b"error: interrupted"
    assert [path for _, below, files in os.walk(tmp_path) for path in files] == []
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["HOME", "TMPDIR", "here"]


def test_a_package_starts_where_no_folder_can_be_written_to(kv_package, tmp_path):
    nowhere = dict.fromkeys(("TMPDIR", "HOME", "XDG_CACHE_HOME"), "/proc/none")
    script = [sys.executable, "-B", FOLDER / "run_llama_aotinductor.py"]
    done = run_command([*script, *flags_for(kv_package), *GREEDY], **nowhere)
    assert done.status == 0, done.stderr
