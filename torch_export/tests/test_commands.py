"""The commands as a user types them, from a copy of the folder that stands alone."""

import json
import shutil
import sys

import pytest
from helpers import run_command, run_script, run_wrapper, succeeded
from pairing import shared_compiler_cache

from common.cli import Console
from common.measure.measures import MEASURES
from common.model.presets import CONFIGS, materialize

RUN = "run_llama_aotinductor.py"
SMALL = [
    "--model-id=random:tiny",
    "--device=cpu",
    "--max-new-tokens=6",
    "--prompt-length=12",
    "--ignore-eos",
]


def test_load_mode_compiles_nothing_and_its_counters_say_so(copied_folder, tmp_path):
    flags = [*SMALL, "--num-requests=2"]
    done = succeeded(run_script(RUN, *flags, folder=copied_folder, result=tmp_path / "run.json"))
    evidence = done.result["compile"]
    assert not any(evidence.values())
    assert evidence["unique_graphs"] == evidence["kernels_compiled"] == 0
    assert done.result["mode"] == "load"
    output = done.result["output"]
    assert (output["prompt_tokens"], output["padded_tokens"], output["new_tokens"]) == (12, 16, 6)
    assert output["requests_identical"] is True
    assert done.result["artifact"]["bytes"] > 0
    stages = sum(done.result["stages"].values())
    assert stages == pytest.approx(done.result["metrics"]["total_script_seconds"], rel=0.05)


def test_compare_shows_that_loading_pays(kv_package, copied_folder, tmp_path):
    result = tmp_path / "compare.json"
    flags = [*SMALL, f"--package-path={kv_package}", "--compare-runs=1", f"--json={result}"]
    succeeded(run_wrapper("compare.sh", *flags, folder=copied_folder))
    document = json.loads(result.read_text())
    summary = document["summary"]
    assert document["outputs_identical"] is True
    assert summary["total"]["load"]["n"] == 1  # the user's flag, not the wrapper's 2
    assert summary["total"]["benefit"] >= 3
    assert summary["unique_graphs"]["load"]["max"] == 0
    assert summary["unique_graphs"]["skip"]["min"] >= 2
    assert summary["kernels_compiled"]["load"]["max"] == 0
    assert summary["kernels_compiled"]["skip"]["min"] >= 1


def test_benchmark_measures_all_modes_and_export_at_runtime(copied_folder, tmp_path):
    result = tmp_path / "benchmark.json"
    flags = ["--num-requests=3", "--repeats=1", "--no-preload-method=export", f"--json={result}"]
    bounds = ["--min-seq-len=1", "--max-seq-len=2048", "--dynamic-seq-multiple=8"]
    done = succeeded(run_wrapper("benchmark.sh", *SMALL, *flags, *bounds, folder=copied_folder))
    document = json.loads(result.read_text())
    assert document["outputs_identical"] is True
    assert list(document["summary"]) == ["compile_preload", "compile_no_preload", "eager"]
    assert all(len(trial["requests"]) == 3 for trial in document["trials"])
    for summary in document["summary"].values():
        values = [summary[measure.key] for measure in MEASURES]
        assert all(value["n"] == 1 and value["mean"] > 0 for value in values)
    assert "| tail_tokens/s" in done.stdout


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--prompt-length=2043"], 2, "./build.sh --max-seq-len 2056"),
        (["--max-seq-len=1024"], 4, "max_seq_len: built with 2048, found 1024"),
        (["--dynamic-seq-multiple=16"], 4, "dynamic_seq_multiple: built with 8, found 16"),
        (["--dtype=bfloat16"], 4, "dtype: built with float32, found bfloat16"),
        (["--model-id=random:huge"], 2, "no preset is called 'random:huge'"),
        (["--package-path=/nowhere/a.pt2"], 3, "./build.sh"),
        (["--expect-sha256=" + 64 * "0"], 6, "--expect-sha256"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(flags, status, words, copied_folder):
    done = run_script(RUN, *SMALL, *flags, folder=copied_folder)
    assert done.status == status, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in done.stderr


def test_compare_and_benchmark_refuse_other_bounds_before_any_trial(copied_folder):
    for wrapper in ("compare.sh", "benchmark.sh"):
        done = run_wrapper(wrapper, *SMALL, "--max-seq-len=1024", folder=copied_folder)
        assert done.status == 4
        assert "max_seq_len: built with 2048, found 1024" in done.stderr


def test_a_fine_tune_is_not_answered_with_the_packages_own_weights(copied_folder, tmp_path):
    tuned = materialize(CONFIGS["random:tiny"], tmp_path / "tuned", Console(quiet=True), seed=1)
    done = run_script(RUN, *SMALL, f"--model-id={tuned}", folder=copied_folder)
    assert done.status == 4
    assert "weights_fingerprint" in done.stderr


def test_a_damaged_package_is_refused_before_torch_sees_it(package, tmp_path):
    for name in (package.name, package.stem + "_meta.json"):
        shutil.copy(package.with_name(name), tmp_path)
    damaged = tmp_path / package.name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    done = run_script(RUN, *SMALL, f"--package-path={damaged}")
    assert done.status == 3
    assert "is not that of its metadata" in done.stderr


def test_a_build_that_fails_verification_leaves_the_old_package(package, tmp_path):
    for name in (package.name, package.stem + "_meta.json"):
        shutil.copy(package.with_name(name), tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    strict = f"""
import sys
sys.path.insert(0, {str(package.parent.parent)!r})
import build_llama_aotinductor as script
from aotinductor.build import verify
verify.TOLERANCES["float32"] = 0.0
script.run_script(script.main, sys.argv[1:])
"""
    flags = ["--model-id=random:tiny", "--device=cpu", "--no-max-autotune", "--no-embed-weights"]
    flags += ["--no-dynamic-seq-len", "--example-seq-len=8"]
    flags += [f"--package-path={tmp_path / package.name}"]
    done = run_command([sys.executable, "-c", strict, *flags], **shared_compiler_cache())
    assert done.status == 1, done.stderr
    assert "the package's logits are not the model's" in done.stderr.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in old} == old
