"""A package of the base graph gives the tokens of eager `generate`, whatever the length."""

import json
import shutil
import sys

import pytest
import torch
from helpers import FOLDER, run_command, run_script, succeeded
from pairing import NEW_TOKENS, OTHER, QUIET, Pairing, build, run_limited

from common.model.presets import materialize

LENGTHS = (1, 2, 7, 8, 9, 127, 128, 129, 1000, 2048 - NEW_TOKENS)
RUN = "run_llama_aotinductor.py"
SHORT = ["--model-id=random:tiny", "--device=cpu", "--prompt-length=9", "--max-new-tokens=4"]


@pytest.fixture(scope="module")
def tiny(package):
    return Pairing(package, "random:tiny")


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_equal_eager_at_every_length(tiny, length):
    tokens = tiny.packaged(tiny.prompt(length))
    assert len(tokens) == NEW_TOKENS
    assert tokens == tiny.eager(tiny.prompt(length))


@pytest.mark.parametrize("length", (1, 9, 129))
def test_padding_to_buckets_changes_no_token(tiny, length):
    assert tiny.packaged(tiny.prompt(length, bucket_pad=True)) == tiny.packaged(tiny.prompt(length))


def test_generation_ends_with_the_stop_token_as_eager_does(tiny):
    tokens = tiny.packaged(tiny.prompt(9))
    stop = tokens[5]
    stopped = tiny.packaged(tiny.prompt(9, stop_ids=(stop,)))
    assert stopped == tokens[: tokens.index(stop) + 1]
    assert stopped == tiny.eager(tiny.prompt(9, stop_ids=(stop,)))


def test_a_request_leaves_nothing_behind_for_the_next(tiny):
    first = tiny.packaged(tiny.prompt(9))
    tiny.packaged(tiny.prompt(300))
    assert tiny.packaged(tiny.prompt(9)) == first


def test_metadata_tells_how_far_logits_are_from_eager(tiny):
    assert tiny.manifest.details["verified"] is True
    checks = tiny.manifest.details["verification"]
    assert checks[0]["tokens"] == 2048 and checks[-1]["tokens"] == 1
    assert any(1 < check["tokens"] < 2048 for check in checks)
    assert all(0 <= check["max_relative_difference"] < 1e-4 for check in checks)


def test_a_start_unpacks_code_and_no_weights(tiny, package):
    below = tiny.weight_bytes - 1
    done = run_limited(below, [FOLDER / RUN, *SHORT, f"--package-path={package}"])
    assert done.status == 0, done.stderr
    plain = f"import torch; torch._inductor.aoti_load_package({str(package)!r})"
    assert run_limited(below, ["-c", plain]).status != 0  # which does unpack them


def test_a_package_with_its_weights_needs_no_others(package, presets_folder, tmp_path):
    (checkpoint,) = presets_folder.glob("random-tiny-*")
    for path in checkpoint.glob("*.json"):
        shutil.copy(path, tmp_path)
    flags = [*SHORT, f"--package-path={package}"]
    whole = succeeded(run_script(RUN, *flags, result=tmp_path / "whole.json"))
    alone = run_script(RUN, *flags, f"--model-id={tmp_path}", result=tmp_path / "alone.json")
    assert succeeded(alone).result["output"] == whole.result["output"]


def test_sampling_from_the_base_graph_is_refused_with_what_samples(package):
    done = run_script(RUN, *SHORT, f"--package-path={package}", "--temperature=0.5")
    assert done.status == 2
    assert "./build.sh --kv-cache" in done.stderr.splitlines()[-1]


def test_a_program_of_ones_own_gets_logits_from_the_package(tiny, package):
    ids = tiny.codec.synthetic_prompt(16, seed=1)
    program = f"""
import json, torch
run = torch._inductor.aoti_load_package({str(package)!r})
ids = torch.tensor([{ids}])
print(json.dumps(run(ids, torch.ones_like(ids))[0, -1].tolist()))
"""
    done = succeeded(run_command([sys.executable, "-c", program]))
    logits = torch.tensor(json.loads(done.stdout.splitlines()[-1]))  # (vocab,)
    expected = tiny.model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


def test_a_static_graph_of_code_only_gives_one_token_and_says_why_not_two(tmp_path, shared_folders):
    # of another Llama: untied embeddings, 4 heads on 4 KV heads, plain rope
    checkpoint = materialize(OTHER, tmp_path / "checkpoint", QUIET)
    package = tmp_path / "static.pt2"
    static = ("--no-dynamic-seq-len", "--example-seq-len=16", "--no-embed-weights")
    build(package, f"--model-id={checkpoint}", *static)
    other = Pairing(package, checkpoint)
    assert package.stat().st_size < other.weight_bytes / 2
    for length in (1, 9, 16):
        prompt = other.prompt(length, 1)
        assert other.packaged(prompt) == other.eager(prompt)
    one = [*SHORT, f"--model-id={checkpoint}", f"--package-path={package}", "--max-new-tokens=1"]
    done = succeeded(run_script(RUN, *one, result=tmp_path / "run.json"))
    assert done.result["output"]["padded_tokens"] == 16
    two = run_script(RUN, *one, "--max-new-tokens=2")
    assert two.status == 2
    assert "every new token makes the sequence longer" in two.stderr.splitlines()[-1]
    long = run_script(RUN, *one, "--prompt-length=17")
    assert long.status == 2
    assert "--example-seq-len 17" in long.stderr.splitlines()[-1]
