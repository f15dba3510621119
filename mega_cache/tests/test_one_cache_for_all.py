"""`--max-cache-len`: one artifact, and every prompt that fits hits it in a fresh process."""

import pytest
from helpers import run_script, run_wrapper, succeeded

SLOTS = 2048
NEW_TOKENS = 16
LENGTHS = (1, 2, 63, 128, 129, 500, 1500, SLOTS - NEW_TOKENS)
RUN = "run_llama_with_portable_cache.py"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The flags of an artifact that build.sh made with a short warm-up."""
    folder = tmp_path_factory.mktemp("artifact")
    files = [f"--cache-path={folder / 'a.bin'}", f"--metadata-path={folder / 'a.json'}"]
    warm_up = ["--prefill-lengths=32,40", "--decode-length=4"]
    built = succeeded(
        run_wrapper("build.sh", "--model-id=random:tiny", "--device=cpu", *files, *warm_up)
    )
    # the second length found the first one's graph: one serves all
    assert "prompt of 40 tokens, cache of 2048 slots: 0 graph(s), 0 kernel(s)" in built.stderr
    return [*files, "--device=cpu", f"--max-cache-len={SLOTS}", f"--max-new-tokens={NEW_TOKENS}"]


@pytest.mark.parametrize("length", LENGTHS)
def test_every_prompt_length_hits_and_equals_eager(length, artifact, eager_tokens, tmp_path):
    flags = [*artifact, f"--prompt-length={length}", "--load-artifacts", "--require-hit"]
    done = succeeded(run_script(RUN, *flags, result=tmp_path / "run.json"))
    evidence = done.result["compile"]
    assert evidence["fxgraph_cache_miss"] == evidence["aot_autograd_cache_miss"] == 0
    assert evidence["kernels_compiled"] == 0
    assert evidence["fxgraph_cache_hit"] == 1
    assert done.result["output"]["token_ids"] == eager_tokens(length, NEW_TOKENS)


def test_a_skipped_load_misses_and_compiles(artifact, eager_tokens, tmp_path):
    flags = [*artifact, "--prompt-length=63", "--no-load-artifacts", "--num-requests=3"]
    done = succeeded(run_script(RUN, *flags, result=tmp_path / "run.json"))
    evidence = done.result["compile"]
    assert evidence["fxgraph_cache_miss"] >= 1
    assert evidence["kernels_compiled"] >= 1
    assert evidence["recompiles"] == 0  # after the first request nothing is compiled again
    assert done.result["output"]["token_ids"] == eager_tokens(63, NEW_TOKENS)
    assert done.result["output"]["requests_identical"]


def test_one_prompt_token_too_many_is_refused_before_anything_is_compiled(artifact):
    done = run_script(RUN, *artifact, f"--prompt-length={SLOTS - NEW_TOKENS + 1}")
    assert done.status == 2
    assert "the 2048 slots of --max-cache-len" in done.stderr


def test_require_hit_names_the_setting_that_differs(artifact):
    flags = [*artifact, "--prompt-length=63", "--require-hit", "--compile-mode=default"]
    done = run_script(RUN, *flags)
    assert done.status == 4
    assert "compile_mode: built with max-autotune, found default" in done.stderr


def test_without_a_word_about_loading_a_misfit_is_one_warning_and_a_compile(artifact, tmp_path):
    flags = [*artifact, "--prompt-length=63", "--max-cache-len=128", "--compile-mode=default"]
    done = succeeded(run_script(RUN, *flags, result=tmp_path / "run.json"))
    assert done.stderr.count("warning: ") == 1
    assert "max_cache_len: built with 2048, found 128" in done.stderr
    assert done.result["compile"]["kernels_compiled"] >= 1


def test_sampling_with_a_seed_gives_the_same_text_in_load_and_skip(artifact):
    done = succeeded(
        run_wrapper(
            "compare.sh", "--model-id=random:tiny", *artifact, "--compare-runs=1",
            "--temperature=0.9", "--seed=7", "--prompt-length=9",
        )
    )  # fmt: skip
    assert "| total (s)" in done.stdout


def test_an_artifact_hits_under_another_home_user_cache_and_folder(artifact, tmp_path):
    places = {name: str(tmp_path / name) for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    for place in places.values():
        (tmp_path / place).mkdir()
    flags = [*artifact, "--prompt-length=20", "--load-artifacts", "--require-hit"]
    done = succeeded(run_script(RUN, *flags, USER="somebody-else", **places))
    assert "fxgraph_cache_miss" in done.stdout
