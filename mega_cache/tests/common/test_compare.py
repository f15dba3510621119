"""compare and benchmark over real processes: what they print, keep and refuse."""

import json

import pytest

from common.cli import (
    BenchmarkFlags,
    CompareFlags,
    ComparisonFlags,
    FetchFlags,
    Flags,
    PromptFlags,
    SharedFlags,
)
from common.errors import ScriptError
from common.measure.compare import Subject, benchmark, compare
from common.measure.measures import MEASURES

TRIAL = """
import json, os, signal, sys
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
if flags["end"] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if flags["end"] == "fail":
    sys.exit("error: no luck today")
metrics = dict.fromkeys({keys!r}, float(flags.get("seconds", 1)))
metrics["setup_seconds"] = 0.5
tokens = json.loads(flags["tokens"])
requests = [{{"seconds": 1.0, "ttft_seconds": 0.1, "new_tokens": 10}}] * 2
result = {{
    "metrics": metrics, "compile": {{"kernels_compiled": 0}}, "environment": {{"torch": "x"}},
    "stages": {{"imports": 0.3, "weights": 0.2, "prefill": 0.1, "decode": 0.4}},
    "requests": requests, "decode": {{"seconds_per_token": 0.1, "bytes_per_second": 1e9}},
    "output": {{"token_ids": tokens, "text": "", "requests_identical": True,
                "new_tokens": len(tokens), "prompt_tokens": int(flags.get("prompt-length", 3))}},
}}
open(flags["json"], "w").write(json.dumps(result))
"""


class Settings(Flags):
    shared: SharedFlags
    prompt: PromptFlags
    store: FetchFlags


@pytest.fixture
def trial_script(tmp_path):
    script = tmp_path / "trial.py"
    script.write_text(TRIAL.format(keys=[measure.key for measure in MEASURES]))
    return script


def run_compare(script, result, load, skip, **flags):
    modes = {"load": load, "skip": skip}
    words = ["--end=well", "--tokens=[1,2,3]", "--compare-runs=1"]
    settings, comparing = Settings(SharedFlags(json=result)), CompareFlags(compare_runs=1)
    compare(Subject("any", script, modes, words, settings, comparing, ComparisonFlags(**flags)))


def test_equal_tokens_pass_and_the_table_tells_the_gain(trial_script, tmp_path, capsys):
    result = tmp_path / "result.json"
    run_compare(trial_script, result, ["--seconds=2"], ["--seconds=8"])
    document = json.loads(result.read_text())
    assert document["outputs_identical"] is True
    assert document["summary"]["setup"]["load"]["n"] == 1
    assert document["summary"]["generation"]["benefit"] == 4.0
    printed = capsys.readouterr().out
    assert "4.00x" in printed
    assert "loading saves" in printed
    assert "kernels_compiled" in printed
    assert "recompiles" not in printed  # only with --verbose


def test_different_tokens_fail_unless_they_may_differ(trial_script, tmp_path):
    result = tmp_path / "result.json"
    with pytest.raises(ScriptError, match="new token 1"):
        run_compare(trial_script, result, [], ["--tokens=[1,9,3]"])
    run_compare(trial_script, result, [], ["--tokens=[1,9,3]"], tokens_may_differ=True)
    assert json.loads(result.read_text())["outputs_identical"] is False


@pytest.mark.parametrize(
    ("end", "words"), [("kill", "killed by SIGKILL"), ("fail", "exit status 1: no luck today")]
)
def test_a_trial_that_dies_is_kept_and_fails_the_command(trial_script, tmp_path, end, words):
    result = tmp_path / "result.json"
    with pytest.raises(ScriptError, match="1 of 2 trials failed"):
        run_compare(trial_script, result, [], [f"--end={end}"])
    document = json.loads(result.read_text())
    dead = next(trial for trial in document["trials"] if trial["mode"] == "skip")
    assert not dead["ok"]
    assert words in dead["error"]
    assert document["summary"]["total"]["load"] is not None  # what is known is kept
    assert document["summary"]["total"]["skip"] is None


def run_benchmark(script, result, words_of_modes, plot=None, **flags):
    words = ["--end=well", "--tokens=[1,2,3]"]
    settings = Settings(SharedFlags(json=result, model_id="random:tiny", device="cpu"))
    measuring, results = BenchmarkFlags(repeats=1, **flags), ComparisonFlags(plot=plot)
    benchmark(Subject("any", script, words_of_modes, words, settings, measuring, results))
    return json.loads(result.read_text())


def test_a_sweep_finds_other_tokens_at_any_length(trial_script, tmp_path):
    modes = {"compile_preload": [], "eager": []}
    flags = {"modes": tuple(modes), "sweep_prompt_lengths": (8, 128)}
    document = run_benchmark(trial_script, tmp_path / "a.json", modes, **flags)
    assert [entry["prompt_length"] for entry in document["sweep"]] == [8, 8, 128, 128]
    assert document["sweep"][0]["seconds_per_token"] == 0.1
    assert document["sweep"][0]["ttft_seconds"] == 0.1
    # a mode whose tokens depend on what comes last on its command line: the sweep's own words
    script = trial_script.read_text().replace(
        "tokens = ", 'tokens = [7] if "eager" in flags and "prompt-length" in flags else '
    )
    trial_script.write_text(script)
    modes = {"compile_preload": [], "eager": ["--eager=1"]}
    with pytest.raises(ScriptError, match="at a prompt of 8 tokens"):
        run_benchmark(trial_script, tmp_path / "b.json", modes, **flags)


def test_the_floor_is_what_starts_are_put_in_relation_to(trial_script, tmp_path, capsys):
    modes = {"compile_preload": ["--seconds=9"]}
    document = run_benchmark(
        trial_script, tmp_path / "a.json", modes, modes=("compile_preload", "floor")
    )
    floor = document["summary"]["floor"]["ttft_cold_start_seconds"]["mean"]
    assert document["summary"]["compile_preload"]["ttft_cold_over_floor"] == 9 / floor
    assert document["summary"]["floor"]["ttft_cold_over_floor"] == 1
    assert "x floor" in capsys.readouterr().out


def test_a_picture_is_drawn_of_starts_and_latencies(trial_script, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.png", "a.svg"):
        result = tmp_path / "a.json"
        run_benchmark(trial_script, result, {"eager": []}, tmp_path / name, modes=("eager",))
        assert (tmp_path / name).stat().st_size > 5000
