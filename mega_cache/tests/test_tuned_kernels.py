"""On CUDA: what tuning chose at a build is what runs after a load, and nothing is tuned again."""

import json
import os
import subprocess
import sys
from functools import reduce

import pytest
import torch
from helpers import FOLDER

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton kernels need a GPU")

# Timings that differ from kernel to kernel and from configuration to configuration, so that the
# configurations chosen differ too, on a machine where all are equally fast as on any other.
BUILD = """
import random
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

source = random.Random(int(sys.argv[1]))
CachingAutotuner.bench = lambda self, launcher, *a, **k: source.random()
"""
PROGRAM = """
import gc, json, sys
import torch
import torch._inductor.config
from common.compiler.counts import compiled_kernels, read_counts, watch_compilation
from portable_cache.build import saving
from portable_cache.start import bundle

if "--long-names" not in sys.argv:
    bundle.configure(torch.device("cuda"))


LONG = ("leaky_relu", "hardsigmoid", "hardswish", "softplus", "logsigmoid", "hardtanh", "elu")
LONGER = ("reciprocal", "nan_to_num", "expm1", "log1p", "sigmoid", "square", "rsqrt", "atan", "erf")


def graph(x):
    y = x.softmax(-1) - x.mean(0, keepdim=True)
    for name in (*LONG, *LONGER):
        y = getattr(torch.nn.functional, name, getattr(torch, name, None))(y)
    return y, y.sum(0), y.argmax(-1)


def run():
    x = torch.randn(64, 2048, device="cuda")
    compiled = torch.compile(graph, mode="max-autotune", dynamic=False)
    for _ in range(3):
        compiled(x)


def chosen():
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    live = [k for k in gc.get_objects() if isinstance(k, CachingAutotuner) and k.launchers]
    return {k.fn.__name__: [str(one.config) for one in k.launchers] for k in live}
"""
SAVE = f"""{PROGRAM}{BUILD}
saving.watch()
run()
blob, _ = saving.save_bundle()
open(sys.argv[2], "wb").write(blob)
print(json.dumps(chosen()))
"""
LOAD = f"""{PROGRAM}
watch = watch_compilation()
watch.restored.update(bundle.load_bundle(open(sys.argv[2], "rb").read())[1])
run()
names = [path.stem for path in compiled_kernels(watch)]
print(json.dumps({{"chosen": chosen(), "counts": read_counts(watch), "names": names}}))
"""
PLAIN_LOAD = f"""{PROGRAM}
assert "portable_cache" not in sys.modules
watch = watch_compilation()
torch.compiler.load_cache_artifacts(open(sys.argv[2], "rb").read())
run()
print(json.dumps(read_counts(watch)))
"""
SETTINGS = """
    torch._inductor.config.triton.descriptive_names = False
    torch._inductor.config.static_launch_user_defined_triton_kernels = True
"""
DROP_ONE = """
import pickle, sys
from portable_cache import torch_private
from portable_cache.start import bundle

Manager = torch_private.CacheArtifactManager
entries = Manager.deserialize(open(sys.argv[2], "rb").read())
(entry,) = entries["inductor"]
graph = pickle.loads(entry.content)
print('"' + graph._triton_bundle.static_autotuners.pop(0).kernel_name + '"')
graph._triton_bundle.kernel_artifacts.pop(0)
entries["inductor"] = [type(entry)(entry.key, pickle.dumps(graph))]
Manager._new_cache_artifacts.update(entries)
open(sys.argv[2], "wb").write(Manager.serialize()[0])
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
    assert loaded["chosen"] == built and len(built) > 1
    made = ("kernels_compiled", "kernels_tuned", "helpers_built", "compile_workers")
    assert {name: loaded["counts"][name] for name in made} == dict.fromkeys(made, 0)
    assert loaded["counts"]["cudagraph_replays"] > 0


def test_a_plain_load_needs_nothing_of_ours_but_the_settings(tmp_path):
    blob = tmp_path / "blob"
    answer(start(SAVE, tmp_path / "build", 1, blob))
    ours = {
        "from portable_cache.build import saving\n": "",
        "from portable_cache.start import bundle\n": "",
        'bundle.configure(torch.device("cuda"))': SETTINGS,
    }
    program = reduce(lambda text, item: text.replace(*item), ours.items(), PLAIN_LOAD)
    counts = answer(start(program, tmp_path / "run", 1, blob))
    assert counts["fxgraph_cache_hit"] == 1
    assert counts["kernels_compiled"] == counts["kernels_tuned"] == 0


def test_a_kernel_that_is_missing_from_the_artifact_is_compiled_and_named(tmp_path):
    blob = tmp_path / "blob"
    answer(start(SAVE, tmp_path / "build", 1, blob))
    missing = answer(start(DROP_ONE, tmp_path / "drop", 1, blob))
    loaded = answer(start(LOAD, tmp_path / "run", 1, blob))
    assert set(loaded["names"]) == {missing}


def test_a_kernel_that_a_load_would_compile_again_fails_the_build_by_name(tmp_path):
    failed = start(SAVE, tmp_path / "build", 1, tmp_path / "blob", "--long-names")
    assert failed.returncode != 0
    assert "every load would compile or tune again: triton_" in failed.stderr.splitlines()[-1]
    assert not (tmp_path / "blob").exists()
