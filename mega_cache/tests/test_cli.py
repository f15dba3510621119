"""Flags: declared once, the published names, and the same after a trip through argv."""

import dataclasses
import sys

import build_llama_portable_cache as build_script
import pytest
import run_llama_with_portable_cache as run_script_module
from helpers import FOLDER, run_command, run_script, run_wrapper
from hypothesis import given
from hypothesis import strategies as st

from common import flags
from common.cli import parse_flags, to_argv
from portable_cache.flags import BuildFlags, CompileFlags, LoadFlags

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


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@given(
    st.builds(
        flags.PromptFlags,
        prompt=texts,
        prompt_length=st.integers(0, 10**6),
        max_new_tokens=st.integers(1, 10**6),
        ignore_eos=st.booleans(),
    ),
    st.builds(
        LoadFlags,
        load_artifacts=st.sampled_from([True, False, None]),
        prefill_buckets=st.lists(st.integers(1, 4096), unique=True).map(
            lambda lengths: tuple(sorted(lengths))
        ),
    ),
    st.builds(CompileFlags, fullgraph=st.booleans(), max_cache_len=st.integers(0, 10**6)),
)
def test_flags_survive_the_trip_through_argv(prompt, loading, compilation):
    groups = (prompt, loading, compilation)
    assert parse_flags("", [type(group) for group in groups], to_argv(*groups)) == groups


def test_every_flag_has_a_help_text_and_no_flag_is_declared_twice():
    for settings in (build_script.Settings, run_script_module.RunSettings):
        groups = [field.type for field in dataclasses.fields(settings)]
        fields = [field for group in groups for field in dataclasses.fields(group)]
        assert all(field.metadata["help"] for field in fields)
        names = [field.name for field in fields]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("script", "flag", "words"),
    [
        ("run_llama_with_portable_cache.py", "--max-new-tokens=0", ">= 1"),
        ("build_llama_portable_cache.py", "--prefill-lengths=128,x", "'x' is not a whole number"),
        ("run_llama_with_portable_cache.py", "--prompt=", "--prompt is empty"),
        ("benchmark_llama_modes.py", "--modes=compile_preload,warp", "unknown name 'warp'"),
        ("run_llama_with_portable_cache.py", "--temperature=nan", "finite"),
        ("run_llama_with_portable_cache.py", "--warp", "unrecognized arguments"),
    ],
)
def test_a_bad_flag_is_one_clear_line_and_status_2(script, flag, words):
    done = run_script(script, flag)
    assert done.status == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_lengths_are_sorted_and_unique():
    (build,) = parse_flags("", (BuildFlags,), ["--prefill-lengths=256,128,256"])
    assert build.prefill_lengths == (128, 256)


@pytest.mark.parametrize("wrapper", ["build.sh", "run.sh", "compare.sh", "benchmark.sh"])
def test_a_users_flag_after_the_wrapper_wins(wrapper):
    # max-cache-len is in every wrapper's defaults; the last one given is the one that is refused
    done = run_wrapper(wrapper, "--max-cache-len", "-5")
    assert done.status == 2
    assert "got -5" in done.stderr
