"""On CUDA: what tuning chose at a build is what runs after a load, and nothing is tuned again."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import FOLDER

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels need a GPU")

# Timings that differ from kernel to kernel and from configuration to configuration, so that the
# configurations chosen differ too, on a machine where all are equally fast as on any other.
BUILD = """
import json, random, sys
import torch
from portable_cache import bundle, tuned_kernels
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

source = random.Random(int(sys.argv[1]))
CachingAutotuner.bench = lambda self, launcher, *a, **k: source.random()
"""
PROGRAM = """
import gc, json, sys
import torch
from common.compile_counts import compiled_kernels, read_counts, watch_compilation
from portable_cache import bundle

if "--long-names" not in sys.argv:
    bundle.configure()


def graph(x, w):
    y = torch.nn.functional.gelu(x.cos() * w + x.sin(), approximate="tanh").softmax(-1)
    return (y.float() - y.mean(0, keepdim=True)).sigmoid().log1p().cumsum(0) @ w.t() + y.sum()


def run():
    x, w = (torch.randn(64, 2048, device="cuda") for _ in range(2))
    compiled = torch.compile(graph, mode="max-autotune", dynamic=False)
    for _ in range(3):
        compiled(x, w)


def chosen():
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    live = [k for k in gc.get_objects() if isinstance(k, CachingAutotuner) and k.launchers]
    return {k.fn.__name__: [str(one.config) for one in k.launchers] for k in live}
"""
SAVE = f"""{PROGRAM}{BUILD}
bundle.watch()
run()
open(sys.argv[2], "wb").write(bundle.save_bundle().blob)
print(json.dumps(chosen()))
"""
LOAD = f"""{PROGRAM}
watch = watch_compilation()
watch.restored.update(bundle.load_bundle(open(sys.argv[2], "rb").read()).restored)
run()
names = [path.stem for path in compiled_kernels(watch)]
print(json.dumps({{"chosen": chosen(), "counts": read_counts(watch), "names": names}}))
"""
DROP_ONE = """
import pickle, sys
from portable_cache import bundle

entries = bundle._read(open(sys.argv[2], "rb").read())
(entry,) = entries["inductor"]
graph = pickle.loads(entry.content)
print('"' + graph._triton_bundle.static_autotuners.pop(0).kernel_name + '"')
graph._triton_bundle.kernel_artifacts.clear()
entries["inductor"] = [type(entry)(entry.key, pickle.dumps(graph))]
open(sys.argv[2], "wb").write(bundle._write(entries))
"""


def start(program, folder, *arguments):
    """Run a program in a process with empty caches of its own."""
    folder.mkdir()
    caches = {"TORCHINDUCTOR_CACHE_DIR": folder / "inductor", "TRITON_CACHE_DIR": folder / "triton"}
    environment = os.environ | {name: str(path) for name, path in caches.items()}
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment | {"PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def answer(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("seed", [1, 2])
def test_configurations_at_a_run_are_those_of_the_build_and_nothing_is_made_anew(seed, tmp_path):
    blob = tmp_path / "blob"
    built = answer(start(SAVE, tmp_path / "build", seed, blob))
    loaded = answer(start(LOAD, tmp_path / "run", seed, blob))
    assert loaded["chosen"] == built and len(built) > 3
    made = ("kernels_compiled", "kernels_tuned", "helpers_built", "compile_workers")
    assert {name: loaded["counts"][name] for name in made} == dict.fromkeys(made, 0)
    assert loaded["counts"]["cudagraph_replays"] > 0


def test_a_kernel_that_is_missing_from_the_artifact_is_compiled_and_named(tmp_path):
    blob = tmp_path / "blob"
    answer(start(SAVE, tmp_path / "build", 1, blob))
    missing = answer(start(DROP_ONE, tmp_path / "drop", 1, blob))
    loaded = answer(start(LOAD, tmp_path / "run", 1, blob))
    assert missing in loaded["names"]
    assert loaded["counts"]["kernels_tuned"] > 0


def test_a_kernel_that_a_load_would_compile_again_fails_the_build_by_name(tmp_path):
    failed = start(SAVE, tmp_path / "build", 1, tmp_path / "blob", "--long-names")
    assert failed.returncode != 0
    assert "every load would compile or tune again: triton_" in failed.stderr.splitlines()[-1]
    assert not (tmp_path / "blob").exists()
