"""Flags of this folder's scripts: the published names, and what belongs to a run and to a trial."""

import sys

import benchmark_llama_modes
import pytest
from helpers import FOLDER, run_command, run_script, run_wrapper

from common.cli import BenchmarkFlags, parse_flags
from portable_cache.flags import MODE_WORDS, UNTOLD, BuildSettings, CompileFlags, RunSettings

PUBLISHED = {
    "build_llama_portable_cache.py": [
        "--model-id=meta-llama/Llama-3.2-3B-Instruct",
        "--cache-path=artifacts/llama3b_torchcompile_cache.bin",
        "--metadata-path=artifacts/llama3b_torchcompile_cache_meta.json",
        "--prefill-lengths=128,256,512,1024",
        "--decode-length=128",
        "--cache-implementation=static",
        "--compile-dynamic=auto",
        "--compile-mode=max-autotune",
        "--fullgraph",
        "--no-fullgraph",
    ],
    "run_llama_with_portable_cache.py": [
        "--bucket-pad",
        "--prefill-buckets=128,256",
        "--prompt=Write a short explanation of portable torch.compile caches.",
        "--max-new-tokens=128",
        "--temperature=0.0",
        "--top-k=0",
        "--top-p=1.0",
        "--load-artifacts",
        "--no-load-artifacts",
        "--compare-load-vs-skip",
        "--compare-runs=2",
        "--show-completions",
    ],
    "benchmark_llama_modes.py": [
        "--num-requests=50",
        "--repeats=2",
        "--modes=compile_preload,compile_no_preload,eager",
    ],
    "check_equivalence.py": ["--logit-prompt-lengths=16,128,512"],
}
EVERYWHERE = ["--device=cpu", "--dtype=auto", "--seed=1", "--json=out.json", "--quiet"]


@pytest.mark.parametrize("script", PUBLISHED)
def test_published_flags_parse_and_help_needs_no_torch(script):
    flags_given = [*PUBLISHED[script], *EVERYWHERE]
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, *{flags_given!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(FOLDER / script)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = run_command([sys.executable, "-c", program], PYTHONPATH=str(FOLDER))
    assert done.status == 0, done.stderr
    for flag in flags_given:
        assert flag.partition("=")[0].replace("--no-", "--") in done.stdout


@pytest.mark.parametrize(
    ("script", "flag", "words"),
    [
        ("run_llama_with_portable_cache.py", "--max-new-tokens=0", ">= 1"),
        ("build_llama_portable_cache.py", "--prefill-lengths=128,x", "'x' is not a whole number"),
        ("run_llama_with_portable_cache.py", "--eager --require-hit", "nothing to check"),
        ("run_llama_with_portable_cache.py", "--top-k=4", "give --temperature too"),
        ("benchmark_llama_modes.py", "--modes=compile_preload,warp", "unknown name 'warp'"),
    ],
)
def test_a_bad_flag_is_one_clear_line_and_status_2(script, flag, words):
    done = run_script(script, *flag.split())
    assert done.status == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("wrapper", ["build.sh", "run.sh", "compare.sh", "benchmark.sh"])
def test_wrappers_hand_a_users_flags_on(wrapper):
    done = run_wrapper(wrapper, "--max-cache-len", "-5")
    assert done.status == 2
    assert "got -5" in done.stderr


def test_a_build_has_defaults_where_a_run_asks_the_artifact():
    (built,) = parse_flags("", (BuildSettings,), [])
    (ran,) = parse_flags("", (RunSettings,), [], **UNTOLD)
    assert built.compilation == CompileFlags() and built.build.precompile
    assert set(vars(ran.compilation).values()) == {None}


@pytest.mark.parametrize("mode", MODE_WORDS)
@pytest.mark.parametrize(
    "words", [[], ["--load-artifacts", "--require-hit", "--precompile"], ["--no-load-artifacts"]]
)
def test_the_words_of_a_mode_win_over_any_of_the_users(mode, words):
    (ran,) = parse_flags("", (RunSettings,), [*words, *MODE_WORDS[mode]], **UNTOLD)
    assert ran.loading.eager == (mode == "eager")
    assert ran.loading.load_artifacts == (mode == "load")


def test_each_published_mode_has_its_words():
    assert tuple(benchmark_llama_modes.MODES) == BenchmarkFlags().modes
