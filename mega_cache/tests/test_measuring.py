"""A measurement in steps: bounded, resumable, and one result file at the end."""

import json
import shutil
import sys
import time

import pytest
from helpers import FOLDER, run_wrapper, succeeded

from common import kept_trials, measuring
from common.steps import StateFolder, run_bounded

STEP = """
import json, sys
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
with open(flags["log"], "a") as log:
    log.write("ran ")
open(flags["json"], "w").write(json.dumps({"metrics": {}, "value": flags["value"]}))
sys.exit(int(flags.get("status", 0)))
"""


@pytest.fixture
def step(tmp_path):
    """A command that writes a result and notes that it ran, and that note."""
    script, log = tmp_path / "step.py", tmp_path / "log"
    script.write_text(STEP)
    log.touch()
    return [sys.executable, str(script), f"--log={log}"], log


def test_a_finished_step_is_kept_for_the_same_command_only(step, tmp_path):
    (command, _), state = step, StateFolder(tmp_path / "state")
    command.append("--value=1")
    assert state.run("build", command, 60) is None
    assert state.recall("build", command)["result"]["value"] == "1"
    assert state.recall("build", [*command, "--other"]) is None
    state.forget(["build"])
    assert state.recall("build", command) is None


def test_a_failed_step_is_not_kept(step, tmp_path):
    (command, _), state = step, StateFolder(tmp_path / "state")
    assert state.run("build", [*command, "--value=1", "--status=3"], 60) == "exit status 3"
    assert state.read("build") is None


def test_a_trial_is_kept_only_where_a_measurement_asks_for_it(step, tmp_path, monkeypatch):
    (command, log), value = step, "--value=1"
    trial = [*command[1:], value]
    kept_trials.run_or_recall(trial, 1)
    kept_trials.run_or_recall(trial, 1)
    assert log.read_text() == "ran ran "
    monkeypatch.setenv(kept_trials.KEPT_VARIABLE, str(tmp_path / "kept"))
    first = kept_trials.run_or_recall(trial, 1)
    assert kept_trials.run_or_recall(trial, 1) == first
    assert log.read_text() == "ran ran ran "
    kept_trials.run_or_recall(trial, 2)  # another repeat is another trial
    kept_trials.run_or_recall([*trial, "--status=1"], 1)
    kept_trials.run_or_recall([*trial, "--status=1"], 1)  # a failure is tried again
    assert log.read_text() == "ran " * 6


def test_a_step_out_of_time_ends_with_its_trial(tmp_path):
    sleeper, parent, mark = tmp_path / "sleeper.py", tmp_path / "parent.py", tmp_path / "mark"
    sleeper.write_text(f"import time\ntime.sleep(3)\nopen({str(mark)!r}, 'w')\n")
    parent.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "from common.errors import run_script\n"
        "from common.trials import run_trial\n"
        f"run_script(lambda argv: run_trial([{str(sleeper)!r}]), [])\n"
    )
    began = time.monotonic()
    ended = run_bounded([sys.executable, str(parent)], 1.5)
    assert "within 2 s" in ended.error
    assert time.monotonic() - began < 3
    time.sleep(2)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("meta-llama/Llama-3.2-3B-Instruct", "llama-3.2-3b-instruct"),
        ("random:3b", "random-3b"),
        ("some/folder/", "folder"),
    ],
)
def test_names_become_parts_of_a_file_name(name, expected):
    assert measuring.slug(name) == expected


def test_every_step_carries_the_shared_flags_the_artifact_and_what_follows_the_dashes(tmp_path):
    from measure import artifact_flags

    from common.cli import parse_flags
    from common.console import Console

    groups = (measuring.SharedFlags, measuring.MeasureFlags, measuring.StepFlags)
    given = ["--model-id=random:1b", "--run-flags=--max-new-tokens 7", "--quiet"]
    parsed = parse_flags("", groups, given)
    plan = measuring.Plan("any", artifact_flags)
    one = measuring.Measurement(plan, *parsed, ("--trust-artifact",), Console(True), 0.0)
    commands = measuring.step_commands(one, StateFolder(tmp_path))
    assert list(commands) == list(measuring.STEPS)
    for step_name, command in commands.items():
        assert "--model-id=random:1b" in command
        assert command[-1] == "--trust-artifact"
        assert set(artifact_flags(tmp_path / "artifact")) <= set(command)
        assert ("--max-new-tokens" in command) == (step_name != "build")
        assert "--quiet" not in command  # it changes nothing that is measured
    sizes = measuring.size_commands(one, StateFolder(tmp_path))
    assert list(sizes) == list(measuring.SIZE_STEPS)


def test_the_flags_of_the_steps_are_flags_of_the_scripts(tmp_path):
    import benchmark_llama_modes
    import run_llama_with_portable_cache as run
    from measure import artifact_flags

    from common import flags
    from common.cli import parse_flags
    from common.console import Console
    from common.equivalence import EquivalenceFlags

    groups = (measuring.SharedFlags, measuring.MeasureFlags, measuring.StepFlags)
    plan = measuring.Plan("any", artifact_flags)
    one = measuring.Measurement(plan, *parse_flags("", groups, []), (), Console(True), 0.0)
    commands = measuring.step_commands(one, StateFolder(tmp_path))
    settings = benchmark_llama_modes.RunSettings
    known = {
        "compare": (settings, flags.CompareFlags, flags.PlotFlags, flags.OutcomeFlags),
        "benchmark": (settings, flags.BenchmarkFlags, flags.SweepFlags, flags.OutcomeFlags),
        "sweep": (settings, flags.BenchmarkFlags, flags.SweepFlags, flags.OutcomeFlags),
        "equivalence": (run.RunSettings, EquivalenceFlags),
    }
    for step_name, script_groups in known.items():
        assert parse_flags("", script_groups, commands[step_name][1:])


def test_measure_rehearsed_with_a_cheap_step_and_gone_on_with(tmp_path):
    folder = tmp_path / "elsewhere"
    ignored = shutil.ignore_patterns("artifacts", "__pycache__", "tests", "results")
    shutil.copytree(FOLDER, folder, ignore=ignored)
    cheap = "--modes=eager,floor --num-requests=2 --repeats=1 --max-new-tokens=4 "
    flags = [
        "--model-id=random:tiny",
        "--device=cpu",
        "--steps=benchmark",
        f"--benchmark-flags={cheap}--sweep-prompt-lengths=8",
        f"--results-folder={tmp_path / 'results'}",
        "--no-plots",
    ]
    succeeded(run_wrapper("measure.sh", *flags, folder=folder))
    (written,) = (tmp_path / "results").iterdir()
    assert written.name.startswith("cpu_random-tiny_torch")
    document = json.loads(written.read_text())
    assert document["kind"] == "measurement"
    assert document["missing"] == ["build", "compare", "sweep", "equivalence"]
    summary = document["benchmark"]["summary"]
    assert summary["eager"]["ttft_cold_over_floor"]["mean"] > 1
    assert 0 < summary["eager"]["decode_bandwidth_share"]["mean"] < 1
    assert [entry["prompt_length"] for entry in document["benchmark"]["sweep"]] == [8]
    again = succeeded(run_wrapper("measure.sh", *flags, folder=folder))
    assert "finished before, kept" in again.stderr
    assert "trials:" not in again.stderr
    assert json.loads(written.read_text()) == document
