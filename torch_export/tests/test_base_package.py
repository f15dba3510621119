"""A package of the base graph gives the tokens of eager `generate`, whatever the length."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import FOLDER, run_script, succeeded
from pairing import NEW_TOKENS, OTHER, QUIET, Pairing, build, run_limited

from common.model.presets import materialize

LENGTHS = (1, 2, 7, 8, 9, 127, 128, 129, 1000, 2048 - NEW_TOKENS)
RUN = "run_llama_aotinductor.py"
SHORT = ["--model-id=random:tiny", "--prompt-length=9", "--max-new-tokens=4"]


@pytest.fixture(scope="module")
def tiny(package):
    return Pairing(package, "random:tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Untied embeddings, 4 heads on 4 KV heads, plain rope; with a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("other")
    checkpoint = materialize(OTHER, folder / "checkpoint", QUIET)
    package = folder / "other.pt2"
    build(package, f"--model-id={checkpoint}")
    return Pairing(package, checkpoint)


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_equal_eager_at_every_length(tiny, length):
    tokens = tiny.packaged(tiny.prompt(length))
    assert len(tokens) == NEW_TOKENS
    assert tokens == tiny.eager(tiny.prompt(length))


@pytest.mark.parametrize("length", LENGTHS)
def test_another_llama_gives_its_eager_tokens_too(other, length):
    assert other.packaged(other.prompt(length)) == other.eager(other.prompt(length))


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
    done = run_limited(below, [FOLDER / RUN, "--device=cpu", *SHORT, f"--package-path={package}"])
    assert done.status == 0, done.stderr
    plain = f"import torch; torch._inductor.aoti_load_package({str(package)!r})"
    assert run_limited(below, ["-c", plain]).status != 0  # which does unpack them


def test_a_package_with_its_weights_needs_no_others(package, presets_folder, tmp_path):
    (checkpoint,) = presets_folder.glob("random-tiny-*")
    for path in checkpoint.glob("*.json"):
        shutil.copy(path, tmp_path)
    flags = ["--device=cpu", f"--package-path={package}", *SHORT]
    whole = succeeded(run_script(RUN, *flags, result=tmp_path / "whole.json"))
    alone = run_script(RUN, *flags, f"--model-id={tmp_path}", result=tmp_path / "alone.json")
    assert succeeded(alone).result["output"] == whole.result["output"]
    assert alone.result["decode"]["bytes_per_second"] is None  # unknown, not 0


def test_a_program_of_ones_own_gets_logits_from_the_package(tiny, package, tmp_path):
    ids = tiny.codec.synthetic_prompt(16, seed=1)
    program = f"""
import json, torch
run = torch._inductor.aoti_load_package({str(package)!r})
ids = torch.tensor([{ids}])
print(json.dumps(run(ids, torch.ones_like(ids))[0, -1].tolist()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = torch.tensor(json.loads(done.stdout.splitlines()[-1]))  # (vocab,)
    expected = tiny.model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
