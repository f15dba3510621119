"""The commands as a user types them: compare, benchmark, a copied folder, and what goes wrong."""

import json

import pytest
from helpers import FOLDER, run_command, run_script, run_wrapper, succeeded

from common.measure.measures import MEASURES

RUN = "run_llama_with_portable_cache.py"
TINY = ["--model-id=random:tiny", "--device=cpu"]
SMALL = [*TINY, "--max-new-tokens=6", "--prompt-length=12"]


def test_the_folder_works_when_copied_alone(copied_folder):
    done = succeeded(run_wrapper("run.sh", *SMALL, "--load-artifacts", folder=copied_folder))
    assert "0 graphs traced, 0 kernels compiled" in done.stderr


def test_compare_shows_that_loading_pays(copied_folder, tmp_path):
    result = tmp_path / "compare.json"
    succeeded(run_wrapper("compare.sh", *SMALL, f"--json={result}", folder=copied_folder))
    document = json.loads(result.read_text())
    assert document["kind"] == "compare"
    assert document["outputs_identical"] is True
    assert document["summary"]["total"]["load"]["n"] == 2
    assert document["summary"]["total"]["benefit"] >= 2.5
    assert document["summary"]["kernels_compiled"]["load"]["max"] == 0
    assert document["summary"]["kernels_compiled"]["skip"]["min"] >= 1
    assert document["environment"]["torch"]


def test_benchmark_measures_all_three_modes(copied_folder, tmp_path):
    result = tmp_path / "benchmark.json"
    flags = ["--num-requests=4", "--repeats=1", f"--json={result}"]
    done = succeeded(run_wrapper("benchmark.sh", *SMALL, *flags, folder=copied_folder))
    document = json.loads(result.read_text())
    assert list(document["summary"]) == ["compile_preload", "compile_no_preload", "eager"]
    for trial in document["trials"]:
        assert len(trial["requests"]) == 4
        assert trial["compile"]["recompiles"] == 0
    for summary in document["summary"].values():
        values = [summary[measure.key] for measure in MEASURES]
        assert all(value["n"] == 1 and value["mean"] > 0 for value in values)
    assert "| tail_tokens/s" in done.stdout


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--model-id=random:huge"], 2, "no preset is called 'random:huge'"),
        (["--model-id=no/such/model"], 2, "neither a folder here, nor a preset, nor a Hub id"),
        (["--model-id=nobody/nothing"], 5, "--model-id random:tiny"),
        (["--load-artifacts", "--cache-path=/nowhere/a.bin"], 3, "./build.sh"),
    ],
)
def test_what_goes_wrong_is_one_clear_line(flags, status, words):
    done = run_script(RUN, "--device=cpu", *flags, HF_HUB_OFFLINE="1")
    assert done.status == status, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last
    assert "Traceback" not in done.stderr


def test_cuda_is_refused_where_there_is_none():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run_script(RUN, "--device=cuda")
    assert done.status == 5
    assert "no CUDA GPU is to be seen" in done.stderr


def test_a_reader_that_stops_early_is_no_crash():
    script = f'exec "$PYTHON" "{FOLDER / RUN}" --help | head -1'
    import sys

    done = run_command(["bash", "-o", "pipefail", "-c", script], PYTHON=sys.executable)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
