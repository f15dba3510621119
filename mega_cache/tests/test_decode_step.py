"""The decode step compiled ahead: a start traces nothing, and what `generate` offers works."""

import sys

import pytest
import torch
from helpers import FOLDER, run_command, run_script, run_wrapper, succeeded

NEW_TOKENS = 24
RUN = "run_llama_with_portable_cache.py"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    flags = [f"--cache-path={tmp_path_factory.mktemp('artifact') / 'a.bin'}", "--device=cpu"]
    lengths = ["--model-id=random:tiny", "--prefill-lengths=16", "--decode-length=48"]
    built = succeeded(run_wrapper("build.sh", *flags, *lengths, "--no-verify"))
    assert "compiled ahead" in built.stdout, built.stderr
    return [*flags, f"--max-new-tokens={NEW_TOKENS}"]


def run(artifact, tmp_path, *flags, **environment):
    result = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    return run_script(RUN, *artifact, *flags, result=result, **environment)


def test_the_folders_own_check_finds_eagers_logits_and_choices(artifact, tmp_path):
    flags = [*artifact[:2], "--logit-prompt-lengths=8,30", "--logit-steps=4"]
    done = succeeded(run_script("check_equivalence.py", *flags, result=tmp_path / "logits.json"))
    assert [row["prompt_length"] for row in done.result["rows"]] == [8, 30]
    assert all(row["load"]["max_abs_error"] < 1e-3 for row in done.result["rows"])
    assert "same choice" in done.stdout


def test_a_loaded_start_traces_nothing_and_the_first_request_is_like_the_second(artifact, tmp_path):
    flags = ["--precompile", "--require-hit", "--prompt-length=40", "--num-requests=4"]
    document = succeeded(run(artifact, tmp_path, *flags)).result
    counters = ("unique_graphs", "calls_captured", "fxgraph_cache_miss", "kernels_compiled")
    assert {name: document["compile"][name] for name in counters} == dict.fromkeys(counters, 0)
    metrics = document["metrics"]
    assert metrics["first_request_seconds"] <= 1.5 * metrics["tail_mean_seconds"] + 0.3
    assert document["output"]["requests_identical"]


# the last is longer than any that was warmed up
@pytest.mark.parametrize(("length", "slots"), [(1, 64), (40, 64), (1500, 2048), (2100, 2124)])
def test_tokens_equal_eager_with_every_cache(length, slots, artifact, eager_tokens, tmp_path):
    flags = ["--precompile", "--require-hit", f"--prompt-length={length}"]
    document = succeeded(run(artifact, tmp_path, *flags)).result
    assert document["artifact"]["slots"] == slots
    assert document["output"]["token_ids"] == eager_tokens(length, NEW_TOKENS)


def test_the_graphs_of_a_build_that_compiles_ahead_hit_when_they_are_traced(artifact, tmp_path):
    flags = ["--no-precompile", "--require-hit", "--prompt-length=40"]
    assert succeeded(run(artifact, tmp_path, *flags)).result["compile"]["fxgraph_cache_hit"] == 1


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
    traced = run(artifact, tmp_path, "--prompt-length=9", **threads)
    assert "tracing instead" in succeeded(traced).stderr
    assert traced.result["compile"]["unique_graphs"] == 1
    missed = run(artifact, tmp_path, "--prompt-length=9", "--require-hit", **threads)
    assert missed.status == 4
    assert "1 graphs traced" in missed.stderr.splitlines()[-1]


def test_a_build_that_makes_no_decode_step_says_so_and_its_starts_trace(tmp_path):
    """A torch whose AOTInductor is another: the real build script, one name taken away."""
    program = (
        "import sys, torch, torch._inductor\n"
        "sys.argv[0] = 'build_llama_portable_cache.py'\n"
        "del torch._inductor.aoti_compile_and_package\n"
        "import build_llama_portable_cache as script\n"
        "script.run_script(script.main)\n"
    )
    files = ["--model-id=random:tiny", f"--cache-path={tmp_path / 'a.bin'}", "--device=cpu"]
    lengths = ["--prefill-lengths=16", "--decode-length=48", "--max-cache-len=0"]
    built = run_command(
        [sys.executable, "-c", program, *files, *lengths, "--compile-mode=default"],
        PYTHONPATH=str(FOLDER),
    )
    assert built.status == 0, built.stderr
    assert "traced at each start" in built.stdout
    last = built.stderr.splitlines()[-1]
    assert "no decode step compiled ahead, runs will trace" in last
    assert "has no torch._inductor.aoti_compile_and_package as known here" in last
    asked = ["--prompt-length=9", "--require-hit", "--max-new-tokens=4"]
    missed = run_script(RUN, *files, *asked)
    assert missed.status == 4 and "1 graphs traced" in missed.stderr.splitlines()[-1]
    succeeded(run_script(RUN, *files, *asked, "--no-precompile"))
    refused = run_script(RUN, *files, *asked, "--precompile")
    assert refused.status == 4 and "no precompiled decode step" in refused.stderr


def test_an_artifact_without_a_decode_step_says_how_to_get_one(tmp_path):
    flags = [f"--cache-path={tmp_path / 'a.bin'}", "--device=cpu", "--precompile"]
    refused = run_script(RUN, *flags, "--no-load-artifacts")
    assert refused.status == 2
