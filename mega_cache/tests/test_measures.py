"""Measures, tables and result files: what is unknown stays unknown."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.comparison import check_outcome, run_compare
from common.console import Console
from common.errors import ScriptError
from common.measures import MEASURES, Request, run_metrics, summarize, with_wall_time
from common.results import write_json
from common.stopwatch import Stages, process_start
from common.tables import markdown_table, number

seconds = st.floats(0.001, 1000.0)
requests = st.lists(st.builds(Request, seconds, seconds, st.integers(1, 1000)), min_size=1)


@given(requests, seconds, seconds)
def test_measures_follow_from_the_requests(served, setup, rest):
    total = setup + sum(request.seconds for request in served) + rest
    metrics = run_metrics(served, setup, total)
    assert set(metrics) == {measure.key for measure in MEASURES}
    assert metrics["ttft_cold_start_seconds"] == setup + served[0].ttft_seconds
    assert metrics["generation_seconds"] == pytest.approx(sum(r.seconds for r in served))
    assert (metrics["tail_mean_seconds"] is None) == (len(served) == 1)
    assert metrics["tokens_per_second_all"] >= metrics["end_to_end_tokens_per_second"]
    tokens = sum(request.new_tokens for request in served)
    wall = with_wall_time(metrics, total * 2)
    assert wall["end_to_end_tokens_per_second"] == pytest.approx(tokens / (total * 2))


def test_what_one_request_cannot_tell_is_unknown():
    metrics = run_metrics([Request(2.0, None, 4)], 1.0, 3.5)
    assert metrics["ttft_cold_start_seconds"] is None
    assert metrics["tail_tokens_per_second"] is None
    assert number(None) == "-"
    assert summarize([None, None]) is None
    assert summarize([1.0, None, 3.0]) == {"mean": 2.0, "min": 1.0, "max": 3.0, "n": 2}


def test_tables_line_up():
    lines = markdown_table(["measure", "a"], [["x", "1"], ["longer", "12.5"]]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_a_result_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_json({"value": 1.5}, path)
    assert json.loads(path.read_text()) == {"value": 1.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"value": float("inf")}, path)
    assert json.loads(path.read_text()) == {"value": 1.5}
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]


def test_stages_add_up_to_the_wall_time():
    stages = Stages(process_start())
    with stages.stage("first"):
        sum(range(10**5))
    stages.close("rest")
    assert sum(stages.seconds.values()) == pytest.approx(stages.elapsed(), abs=0.01)


TRIAL = """
import json, os, signal, sys
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
if flags["end"] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if flags["end"] == "fail":
    sys.exit("error: no luck today")
metrics = dict.fromkeys({keys!r}, 1.0)
result = {{"metrics": metrics, "compile": {{}}, "environment": {{"torch": "x"}},
          "output": {{"token_ids": json.loads(flags["tokens"]), "text": ""}}}}
open(flags["json"], "w").write(json.dumps(result))
"""


@pytest.fixture
def trial_script(tmp_path):
    script = tmp_path / "trial.py"
    script.write_text(TRIAL.format(keys=[measure.key for measure in MEASURES]))
    return str(script)


def compare(script, load, skip):
    commands = {"load": [script, *load], "skip": [script, *skip]}
    return run_compare("any", commands, 1, {}, Console(quiet=True))


def test_equal_tokens_pass_and_different_tokens_fail(trial_script):
    same = ["--end=well", "--tokens=[1,2,3]"]
    document = compare(trial_script, same, same)
    assert document["outputs_identical"] is True
    assert document["summary"]["total"]["load"]["n"] == 1
    check_outcome(document)
    document = compare(trial_script, same, ["--end=well", "--tokens=[1,9,3]"])
    assert document["outputs_identical"] is False
    with pytest.raises(ScriptError, match="new token 1"):
        check_outcome(document)
    check_outcome(document, tokens_may_differ=True)


@pytest.mark.parametrize(
    ("end", "words"), [("kill", "killed by SIGKILL"), ("fail", "exit status 1: no luck today")]
)
def test_a_trial_that_dies_is_kept_and_fails_the_command(trial_script, end, words):
    document = compare(
        trial_script, ["--end=well", "--tokens=[1]"], [f"--end={end}", "--tokens=[1]"]
    )
    dead = next(trial for trial in document["trials"] if trial["mode"] == "skip")
    assert not dead["ok"]
    assert words in dead["error"]
    assert document["summary"]["total"]["load"] is not None  # what is known is kept
    assert document["summary"]["total"]["skip"] is None
    with pytest.raises(ScriptError, match="1 of 2 trials failed"):
        check_outcome(document)
