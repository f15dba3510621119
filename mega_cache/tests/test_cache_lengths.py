"""A KV cache per prefill length and one more: every prompt that fits hits, with eager's tokens."""

import json

import pytest
from helpers import run_script, succeeded

from portable_cache.flags import CompileFlags

BUILD = "build_llama_portable_cache.py"
RUN = "run_llama_with_portable_cache.py"
NEW_TOKENS = 16
LENGTHS = ["--prefill-lengths=16,41", f"--decode-length={NEW_TOKENS}", "--max-cache-len=200"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """The flags that find an artifact which a build has verified."""
    files = [f"--cache-path={tmp_path_factory.mktemp('artifact') / 'a.bin'}", "--device=cpu"]
    built = succeeded(run_script(BUILD, *files, *LENGTHS))
    assert "32, 57, 200 slots" in built.stdout
    assert "3 inductor" not in built.stdout  # a graph serves more than one of them
    assert "hits in fresh processes" in built.stdout
    return [*files, f"--max-new-tokens={NEW_TOKENS}", "--ignore-eos"]


def run(artifact, tmp_path, *flags, **environment):
    return run_script(RUN, *artifact, *flags, result=tmp_path / "run.json", **environment)


@pytest.mark.parametrize(
    ("length", "slots"), [(1, 32), (16, 32), (17, 57), (41, 57), (42, 200), (184, 200)]
)
@pytest.mark.parametrize("precompile", ["--precompile", "--no-precompile"])
def test_every_prompt_hits_and_equals_eager(
    length, slots, precompile, artifact, eager_tokens, tmp_path
):
    flags = [f"--prompt-length={length}", "--load-artifacts", "--require-hit", precompile]
    document = succeeded(run(artifact, tmp_path, *flags)).result
    assert document["artifact"]["slots"] == slots
    assert document["compile"]["unique_graphs"] == (precompile == "--no-precompile")
    assert document["compile"]["kernels_compiled"] == 0
    assert document["output"]["token_ids"] == eager_tokens(length, NEW_TOKENS)


def test_prompts_of_one_process_share_the_cache_of_the_longest(artifact, eager_tokens, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\na prompt of some more words than the first\n")
    flags = [f"--prompts-file={prompts}", "--require-hit", "--num-requests=2"]
    document = succeeded(run(artifact, tmp_path, *flags)).result
    assert document["artifact"]["slots"] == 200
    assert len(document["requests"]) == 4
    assert document["completions"][:2] == document["completions"][2:]


def test_bucket_pad_pads_to_a_prefill_length_and_changes_no_token(artifact, eager_tokens, tmp_path):
    flags = ["--prompt-length=20", "--bucket-pad", "--require-hit"]
    output = succeeded(run(artifact, tmp_path, *flags)).result["output"]
    assert output["padded_tokens"] == 41
    assert output["token_ids"] == eager_tokens(20, NEW_TOKENS)


def test_a_skipped_load_compiles_the_artifacts_recipe_once(artifact, eager_tokens, tmp_path):
    flags = ["--prompt-length=20", "--no-load-artifacts", "--num-requests=3"]
    document = succeeded(run(artifact, tmp_path, *flags)).result
    counts = document["compile"]
    assert counts["fxgraph_cache_miss"] == 1 and counts["kernels_compiled"] >= 1
    assert counts["recompiles"] == 0
    assert document["output"]["token_ids"] == eager_tokens(20, NEW_TOKENS)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (["--compile-mode=default"], "compile_mode: built with max-autotune, found default"),
        (["--decode-length=64"], f"decode_length: built with {NEW_TOKENS}, found 64"),
        (["--fullgraph"], "fullgraph: built with false, found true"),
        (["--prompt-length=185", "--no-precompile"], "need 201 slots, the longest KV cache"),
    ],
)
def test_what_is_told_and_differs_is_a_mismatch_by_name(told, words, artifact, tmp_path):
    done = run(artifact, tmp_path, "--load-artifacts", *told)
    assert done.status == 4
    assert words in done.stderr


def test_a_mismatch_is_one_warning_and_a_compile_where_nobody_insists(artifact, tmp_path):
    flags = ["--prompt-length=9", "--max-cache-len=25", "--compile-mode=default"]
    done = succeeded(run(artifact, tmp_path, *flags))
    assert done.stderr.count("warning: ") == 1
    assert "max_cache_len: built with 200, found 25" in done.stderr
    assert done.result["compile"]["kernels_compiled"] >= 1


def test_sampling_is_reproducible_and_the_same_traced_or_precompiled(artifact, tmp_path):
    sampled = ["--temperature=0.9", "--top-k=50", "--top-p=0.95", "--prompt-length=20"]
    texts = [
        succeeded(run(artifact, tmp_path, *sampled, *more)).result["output"]["token_ids"]
        for more in (["--seed=7"], ["--seed=7", "--no-precompile"], ["--seed=8"])
    ]
    assert texts[0] == texts[1] != texts[2]


def test_an_artifact_hits_under_another_home_user_cache_and_folder(artifact, tmp_path):
    places = {name: str(tmp_path / name) for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    for place in places.values():
        (tmp_path / place).mkdir()
    flags = ["--prompt-length=20", "--load-artifacts", "--require-hit", "--no-precompile"]
    succeeded(run(artifact, tmp_path, *flags, USER="somebody-else", **places))


def test_a_prefill_length_beyond_the_long_cache_is_one_more_cache(eager_tokens, tmp_path):
    files = [f"--cache-path={tmp_path / 'a.bin'}", "--device=cpu"]
    lengths = ["--prefill-lengths=8,2048", "--decode-length=128", "--compile-dynamic=false"]
    traced = ["--compile-mode=default", "--no-precompile", "--no-verify"]
    built = succeeded(run_script(BUILD, *files, *lengths, *traced))
    assert "3 inductor, 3 aot_autograd" in built.stdout  # a graph for 136, 2048 and 2176 slots
    for length, slots in ((8, 136), (2048, 2176)):
        flags = [f"--prompt-length={length}", "--max-new-tokens=128", "--require-hit"]
        document = succeeded(run(files, tmp_path, *flags, "--no-precompile")).result
        assert document["artifact"]["slots"] == slots
        assert document["output"]["token_ids"] == eager_tokens(length, 128)


def test_lengths_by_flags():
    flags = CompileFlags(prefill_lengths=(128, 2048), decode_length=128, max_cache_len=2048)
    assert flags.cache_lengths() == {256: 128, 2048: 128, 2176: 2048}
    slots = [flags.slots_for(tokens) for tokens in (1, 256, 257, 2049, 2177)]
    assert slots == [256, 256, 2048, 2176, 2177]  # the last is longer than any
    assert json.dumps(CompileFlags(max_cache_len=0).cache_lengths()) == json.dumps(
        {256: 128, 384: 256, 640: 512, 1152: 1024}
    )
