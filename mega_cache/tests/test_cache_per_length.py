"""`--max-cache-len 0`, the published behaviour: each warmed length hits in a fresh process."""

import json

import pytest
from helpers import run_script, succeeded

BUILD = "build_llama_portable_cache.py"
RUN = "run_llama_with_portable_cache.py"
ALL_LENGTHS = (8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 1536, 2048)


def build(folder, lengths, dynamic):
    files = [f"--cache-path={folder / 'a.bin'}", f"--metadata-path={folder / 'a.json'}"]
    shape = ["--decode-length=4", f"--compile-dynamic={dynamic}", "--compile-mode=default"]
    warm_up = f"--prefill-lengths={','.join(map(str, lengths))}"
    succeeded(run_script(BUILD, *files, *shape, "--device=cpu", warm_up))
    return [*files, *shape, "--device=cpu", "--max-new-tokens=4"]


def assert_full_hit(flags, result):
    flags = [*flags, "--load-artifacts", "--require-hit"]
    evidence = succeeded(run_script(RUN, *flags, result=result)).result["compile"]
    assert evidence["fxgraph_cache_miss"] == evidence["aot_autograd_cache_miss"] == 0
    assert evidence["kernels_compiled"] == 0


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return build(tmp_path_factory.mktemp("static"), (8, 16), "auto")


@pytest.mark.parametrize("length", [8, 16])
def test_each_warmed_length_hits_in_a_fresh_process(length, artifact, tmp_path):
    assert_full_hit([*artifact, f"--prompt-length={length}"], tmp_path / "run.json")


def test_a_prompt_between_lengths_is_padded_and_equals_eager(artifact, eager_tokens, tmp_path):
    flags = [*artifact, "--prompt-length=11", "--bucket-pad"]
    assert_full_hit(flags, tmp_path / "run.json")
    output = json.loads((tmp_path / "run.json").read_text())["output"]
    assert output["padded_tokens"] == 16
    assert output["token_ids"] == eager_tokens(11, 4)


def test_a_prompt_longer_than_every_bucket_runs_unpadded_with_a_warning(artifact, tmp_path):
    flags = [*artifact, "--prompt-length=20", "--bucket-pad", "--no-load-artifacts"]
    done = succeeded(run_script(RUN, *flags, result=tmp_path / "run.json"))
    assert "more than the longest warmed length (16)" in done.stderr
    assert done.result["output"]["padded_tokens"] == 20


def test_dynamic_shapes_hit_at_all_twelve_lengths(tmp_path):
    flags = build(tmp_path, ALL_LENGTHS, "true")
    for length in (ALL_LENGTHS[0], ALL_LENGTHS[5], ALL_LENGTHS[-1]):
        assert_full_hit([*flags, f"--prompt-length={length}"], tmp_path / f"{length}.json")
