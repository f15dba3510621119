"""Measures, tables and result files: what is unknown stays unknown."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.measure import report
from common.measure.measures import (
    MEASURES,
    Request,
    Stages,
    decode_seconds_per_token,
    process_start,
    run_metrics,
    summarize,
    with_wall_time,
)

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
    one = [Request(2.0, 0.5, 1)]
    metrics = run_metrics(one, 1.0, 3.5)
    assert metrics["tail_tokens_per_second"] is None
    assert decode_seconds_per_token(one) is None
    assert run_metrics([], 1.0, 3.5)["ttft_cold_start_seconds"] is None
    assert report.number(None) == "-"
    assert summarize([None, None]) is None
    assert summarize([1.0, None, 3.0]) == {"mean": 2.0, "min": 1.0, "max": 3.0, "n": 2}


def test_the_first_request_and_prefill_are_no_part_of_the_steady_decode():
    assert decode_seconds_per_token([Request(9.0, 1.0, 3), Request(1.0, 0.1, 10)]) == 0.1
    assert decode_seconds_per_token([Request(9.0, 1.0, 3)]) == 4.0


def test_every_measure_has_its_unit():
    assert {measure.unit for measure in MEASURES} == {"s", "tokens/s"}


def test_tables_line_up():
    table = report.markdown_table(["measure", "a"], [["x", "1"], ["longer", "12.5"]])
    assert len({len(line) for line in table.splitlines()}) == 1


@given(st.lists(st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))))
def test_an_array_of_numbers_stands_on_one_line(numbers):
    document = {"numbers": numbers, "names": ["a", "1, 2"], "deep": [[1, 2], {"x": [3]}]}
    text = report.as_json_text(document)
    assert json.loads(text) == document
    assert sum("[" in line and "]" in line for line in text.splitlines()) >= 3


def test_a_result_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "result.json"
    report.write_json({"value": 1.5}, path)
    assert json.loads(path.read_text()) == {"value": 1.5}
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_json({"value": float("inf")}, path)
    assert json.loads(path.read_text()) == {"value": 1.5}
    assert [entry.name for entry in path.parent.iterdir()] == ["result.json"]


def test_a_result_file_names_no_place_of_this_machine(tmp_path):
    path = tmp_path / "result.json"
    report.write_json({"command": [f"{tmp_path}/a", report.sys.executable]}, path)
    assert report.sys.executable not in path.read_text()


def test_texts_stay_as_they_are_whatever_they_hold(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = f"[1,   2] /home/me/x {report.sys.executable} /tmp/y \N{REPLACEMENT CHARACTER}"
    document = {
        "command": ["/home/me/run", "--prompt", text, f"--prompt={text}", "--json=/home/me/r"],
        "config": {"prompt": text, "json": "/home/me/r"},
        "output": {"text": text, "token_ids": [1, 2]},
        "completions": [text, text],
        "error": "cannot write /home/me/r",
    }
    written = json.loads(report.as_json_text(document))
    assert written["command"] == ["~/run", "--prompt", text, f"--prompt={text}", "--json=~/r"]
    assert written["config"] == {"prompt": text, "json": "~/r"}
    assert written["output"] == document["output"]
    assert written["completions"] == document["completions"]
    assert written["error"] == "cannot write ~/r"


def test_stages_add_up_to_the_wall_time():
    stages = Stages(process_start())
    stages.close("first")
    sum(range(10**5))
    stages.close("rest")
    assert sum(stages.seconds.values()) == pytest.approx(stages.elapsed(), abs=0.01)
