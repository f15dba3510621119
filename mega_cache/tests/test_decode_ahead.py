"""Steps compiled ahead of time: a start traces nothing, and what `generate` offers still works."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import FOLDER, run_script, run_wrapper, succeeded

NEW_TOKENS = 24
RUN = "run_llama_with_portable_cache.py"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    flags = [f"--cache-path={tmp_path_factory.mktemp('artifact') / 'a.bin'}", "--device=cpu"]
    lengths = ["--model-id=random:tiny", "--prefill-lengths=16", "--decode-length=48"]
    built = succeeded(run_wrapper("build.sh", *flags, *lengths, "--no-verify"))
    assert "2 decode_step" in built.stdout, built.stderr
    return [*flags, f"--max-new-tokens={NEW_TOKENS}"]


def run(artifact, tmp_path, *flags, **environment):
    result = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    return run_script(RUN, *artifact, *flags, result=result, **environment)


def test_a_loaded_start_traces_nothing_and_the_first_request_is_like_the_second(artifact, tmp_path):
    flags = ["--precompile", "--require-hit", "--prompt-length=40", "--num-requests=4"]
    document = succeeded(run(artifact, tmp_path, *flags)).result
    counters = ("unique_graphs", "calls_captured", "fxgraph_cache_miss", "kernels_compiled")
    assert {name: document["compile"][name] for name in counters} == dict.fromkeys(counters, 0)
    metrics = document["metrics"]
    assert metrics["first_request_seconds"] <= 1.5 * metrics["tail_mean_seconds"] + 0.3
    assert document["output"]["requests_identical"]


@pytest.mark.parametrize(("length", "slots"), [(1, 64), (40, 64), (129, 2048), (1500, 2048)])
def test_tokens_equal_eager_with_every_cache(length, slots, artifact, eager_tokens, tmp_path):
    flags = ["--precompile", "--require-hit", f"--prompt-length={length}"]
    document = succeeded(run(artifact, tmp_path, *flags)).result
    assert document["artifact"]["slots"] == slots
    assert document["output"]["token_ids"] == eager_tokens(length, NEW_TOKENS)


def test_sampling_with_a_seed_is_that_of_the_ordinary_compiled_path(artifact, tmp_path):
    flags = ["--temperature=0.8", "--seed=3", "--prompt-length=20", "--load-artifacts"]
    ahead = succeeded(run(artifact, tmp_path, "--precompile", *flags)).result
    traced = succeeded(run(artifact, tmp_path, "--no-precompile", *flags)).result
    assert ahead["artifact"]["precompiled"] and not traced["artifact"]["precompiled"]
    assert ahead["output"]["token_ids"] == traced["output"]["token_ids"]


def test_another_thread_count_is_refused_or_traced_with_one_warning(artifact, tmp_path):
    threads = {"OMP_NUM_THREADS": "2" if torch.get_num_threads() == 1 else "1"}
    refused = run(artifact, tmp_path, "--precompile", "--prompt-length=9", **threads)
    assert refused.status == 4
    assert "built with threads" in refused.stderr
    traced = succeeded(run(artifact, tmp_path, "--prompt-length=9", **threads))
    assert "tracing instead" in traced.stderr
    assert traced.result["compile"]["unique_graphs"] == 1


def test_an_artifact_without_a_decode_step_says_how_to_get_one(tmp_path):
    flags = [f"--cache-path={tmp_path / 'a.bin'}", "--device=cpu", "--precompile"]
    refused = run_script(RUN, *flags, "--no-load-artifacts")
    assert refused.status == 2


LATER = """
import sys
import torch
from portable_cache import decode_ahead


def look():  # as torch does
    from torch._inductor.graph import GraphLowering

    assert GraphLowering.save_output_code is None


with decode_ahead._without_the_compiler():
    look()
assert "torch._inductor.lowering" not in sys.modules
found = torch.compile(lambda x: (x * 2).sin())(torch.arange(8.0))
assert torch.allclose(found, (torch.arange(8.0) * 2).sin())
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
assert torch._inductor.compile_fx.GraphLowering is torch._inductor.graph.GraphLowering
"""


def test_a_process_that_loaded_without_the_compiler_can_compile_later(tmp_path):
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(FOLDER)}
    done = subprocess.run(
        [sys.executable, "-c", LATER], env=os.environ | caches, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
