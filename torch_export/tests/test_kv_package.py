"""A package with a KV cache: eager's tokens, no stale slots, and any checkpoint of its shape."""

import json
import re
import shutil
import sys

import pytest
import torch
from helpers import FOLDER, run_command, run_script, succeeded
from pairing import OTHER, QUIET, Pairing, build, run_limited, timed
from safetensors.torch import load_file, save_file

from common.errors import UsageError
from common.model.presets import CONFIGS, materialize, preset_folder

BUILD, RUN = "build_llama_aotinductor.py", "run_llama_aotinductor.py"
SLOTS = 2048
NEW_TOKENS = 64
TINY = ["--model-id=random:tiny", "--device=cpu"]
SHORT = ["--device=cpu", "--prompt-length=9", "--max-new-tokens=4"]


@pytest.fixture(scope="module")
def kv_package(tmp_path_factory):
    package = tmp_path_factory.mktemp("kv") / "kv.pt2"
    build(package, "--kv-cache")
    return package


@pytest.fixture(scope="module")
def tiny(kv_package):
    return Pairing(kv_package, "random:tiny")


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    """Untied embeddings, 4 heads on 4 KV heads, plain rope."""
    return materialize(OTHER, tmp_path_factory.mktemp("other") / "checkpoint", QUIET)


@pytest.mark.parametrize("length", (1000, 1, 7, 8, 9, 129))
def test_greedy_tokens_equal_eager_also_after_a_longer_request(tiny, length):
    # one generator serves them all, the longest first: what it left in the cache must not leak
    tokens = tiny.packaged(tiny.prompt(length, NEW_TOKENS))
    assert len(tokens) == NEW_TOKENS
    assert tokens == tiny.eager(tiny.prompt(length, NEW_TOKENS))


def test_a_prompt_may_fill_the_cache_to_the_last_slot_and_not_beyond(tiny):
    last = tiny.prompt(SLOTS - 7, 8)  # the eighth new token needs no slot
    assert tiny.packaged(last) == tiny.eager(last)
    whole = tiny.prompt(SLOTS, 1)
    assert tiny.packaged(whole) == tiny.eager(whole)
    tiny.plan.check_request(SLOTS - 7, 8, bucket_pad=False)
    with pytest.raises(UsageError, match=f"which has {SLOTS}"):
        tiny.plan.check_request(SLOTS - 7, 9, bucket_pad=False)


def test_generation_stops_at_an_end_of_sequence_token(tiny):
    tokens = tiny.eager(tiny.prompt(9, NEW_TOKENS))
    stop = tokens[10]
    stopped = tiny.packaged(tiny.prompt(9, NEW_TOKENS, stop_ids=(stop,)))
    assert stopped == tokens[: tokens.index(stop) + 1]


def test_padding_to_buckets_changes_no_token(tiny):
    padded = tiny.prompt(129, 8, bucket_pad=True)
    assert tiny.plan.bounds.padded(129, bucket_pad=True) == 256
    assert tiny.packaged(padded) == tiny.packaged(tiny.prompt(129, 8))


def test_a_token_costs_what_the_length_in_use_does_and_less_than_eager(tiny):
    def seconds(generate, length):
        one = timed(generate, tiny.prompt(length, 33))
        return (one.seconds - one.ttft_seconds) / 32

    # the fastest of several, taken in turn: the machine may be busy with something else
    package, eager = {8: 1.0, 1900: 1.0}, {8: 1.0, 1900: 1.0}
    for _ in range(12):
        for length in package:
            package[length] = min(package[length], seconds(tiny.packaged, length))
            eager[length] = min(eager[length], seconds(tiny.eager, length))
    assert 1.3 * package[8] <= package[1900]
    assert 3 * package[8] <= eager[8]
    assert 2 * package[1900] <= eager[1900]


def test_the_program_of_the_readme_generates_from_a_package(kv_package, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", (FOLDER / "README.md").read_text(), re.M | re.S)
    (program,) = [block for block in blocks if "find_plan(" in block]
    program = program.replace('"torch_export"', repr(str(FOLDER)))
    flags = f'"random:tiny", "--device=cpu", "--package-path={kv_package}"'
    program = program.replace('"random:tiny"', flags)
    program += "\nimport json\nprint(json.dumps(tokens), file=sys.stderr)\n"
    inside = f'cd {tmp_path} && exec "$0" -c "$1"'
    done = succeeded(run_command(["bash", "-c", inside, sys.executable, program]))
    words = [f"--package-path={kv_package}", "--device=cpu", "--prompt=Hello"]
    result = tmp_path / "run.json"
    run = succeeded(run_script(RUN, *words, "--max-new-tokens=64", result=result)).result
    assert json.loads(done.stderr.splitlines()[-1]) == run["output"]["token_ids"]


def test_the_package_holds_code_only_and_any_fine_tune_runs_on_it(kv_package, tiny, tmp_path):
    assert kv_package.stat().st_size < 20 * 2**20
    tuned = materialize(CONFIGS["random:tiny"], tmp_path / "tuned", QUIET, seed=1)
    flags = [*SHORT, f"--model-id={tuned}", f"--package-path={kv_package}"]
    done = succeeded(run_script(RUN, *flags, result=tmp_path / "run.json"))
    assert done.result["artifact"]["weights_of"] == str(tuned)
    tokens = done.result["output"]["token_ids"]
    on_tuned = Pairing(kv_package, str(tuned))
    assert tokens == on_tuned.eager(on_tuned.prompt(9, 4))
    assert tokens != tiny.eager(tiny.prompt(9, 4))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "missing model.norm.weight"),
        (lambda weights: weights.update(extra=torch.ones(1)), "not expected: extra"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(255)}),
            "model.norm.weight has shape [255], not [256]",
        ),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(256).half()}),
            "model.norm.weight is float16, not float32",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    spoil, words, kv_package, shared_folders, tmp_path
):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(preset_folder("random:tiny"), spoilt)
    weights = load_file(spoilt / "model.safetensors")
    spoil(weights)
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    done = run_script(RUN, *SHORT, f"--model-id={spoilt}", f"--package-path={kv_package}")
    assert done.status == 4
    assert words in done.stderr.splitlines()[-1]


def test_another_architecture_is_refused_by_its_configuration(kv_package, other_checkpoint):
    flags = [*SHORT, f"--model-id={other_checkpoint}", f"--package-path={kv_package}"]
    done = run_script(RUN, *flags)
    assert done.status == 4
    assert "config_digest: built with" in done.stderr


def test_another_llama_with_its_weights_in_the_package(other_checkpoint, tmp_path):
    package = tmp_path / "other.pt2"
    small = ("--kv-cache", "--embed-weights", "--max-seq-len=256")
    build(package, f"--model-id={other_checkpoint}", *small)
    other = Pairing(package, other_checkpoint)
    # once, although two graphs read them
    assert other.weight_bytes < package.stat().st_size < 1.5 * other.weight_bytes
    command = [FOLDER / RUN, *SHORT, f"--model-id={other_checkpoint}", f"--package-path={package}"]
    done = run_limited(other.weight_bytes - 1, command)  # they are not unpacked either
    assert done.status == 0, done.stderr
    for length in (129, 1, 9):
        prompt = other.prompt(length, 16)
        assert other.packaged(prompt) == other.eager(prompt)


def test_a_base_graph_of_code_only_is_bound_too(tmp_path, shared_folders):
    package = tmp_path / "base.pt2"
    build(package, "--no-embed-weights", "--max-seq-len=64")
    assert (
        package.stat().st_size < (preset_folder("random:tiny") / "model.safetensors").stat().st_size
    )
    base = Pairing(package, "random:tiny")
    assert base.packaged(base.prompt(20, 8)) == base.eager(base.prompt(20, 8))


def test_compare_skips_by_compiling_the_same_graphs(kv_package, tmp_path):
    result = tmp_path / "compare.json"
    flags = ["--compare-load-vs-skip", "--compare-runs=1", f"--json={result}"]
    succeeded(run_script(RUN, *TINY, *SHORT, f"--package-path={kv_package}", *flags))
    document = json.loads(result.read_text())
    assert document["outputs_identical"] is True
    assert document["summary"]["unique_graphs"]["load"]["max"] == 0
    assert document["summary"]["unique_graphs"]["skip"]["min"] >= 2
    assert document["summary"]["total"]["benefit"] >= 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kv-cache", "--no-dynamic-seq-len"], "leave --no-dynamic-seq-len out"),
        (["--kv-cache", "--max-cache-len=64"], "cannot hold a prompt of --max-seq-len 2048"),
        (["--max-cache-len=4096"], "add --kv-cache"),
    ],
)
def test_flags_that_exclude_each_other_are_refused(flags, words):
    done = run_script(BUILD, *TINY, *flags)
    assert done.status == 2
    assert words in done.stderr


def test_a_cuda_graph_on_a_cpu_is_refused(kv_package):
    done = run_script(RUN, *TINY, *SHORT, f"--package-path={kv_package}", "--cuda-graph")
    assert done.status == 2
    assert "this is a CPU" in done.stderr
