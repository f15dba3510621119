"""Results of the true shape from invented timings: everything but the processes is real."""

from common import comparison, sweep
from common.cli import Console
from common.measures import COUNTERS, Request, run_metrics
from common.trials import Outcome

ENVIRONMENT = {
    "gpu": None,
    "cuda": None,
    "driver": None,
    "torch": "2.9.1",
    "transformers": "4.57.5",
    "triton": "3.5.1",
    "python": "3.11.7",
    "cpu": "Some CPU x2",
    "commit": "0123456789ab",
}
GPU = {"gpu": "NVIDIA H200", "cuda": "12.8", "driver": "570.1"}
WEIGHT_BYTES, SLOT_BYTES, COPY_RATE = 6.4e9, 114688, 4.0e12
SETUP = {"interpreter and imports": 2.0, "model": 1.5}


def run(first=2.0, rest=0.5, ttft=0.1, count=3, environment=ENVIRONMENT, tokens=(1, 2, 3)) -> dict:
    """Return a run result: `count` requests of 65 tokens, the first slower than the rest."""
    requests = [Request(rest if number else first, ttft, 65) for number in range(count)]
    setup = sum(SETUP.values())
    total = setup + sum(request.seconds for request in requests)
    return {
        "metrics": run_metrics(requests, setup, total),
        "stages": SETUP | {"generation": total - setup},
        "compile": dict.fromkeys(COUNTERS, 1),
        "environment": environment,
        "requests": [request.as_json() for request in requests],
        "output": {
            "token_ids": list(tokens),
            "text": "",
            "prompt_tokens": 100,
            "new_tokens": 65,
            "requests_identical": True,
        },
    }


def floor_run(seconds=2.0, environment=ENVIRONMENT) -> dict:
    metrics = run_metrics([], seconds, seconds + 1)
    return {
        "metrics": metrics | {"ttft_cold_start_seconds": seconds},
        "stages": {"interpreter and imports": seconds},
        "compile": {},
        "environment": environment,
        "requests": [],
        "output": None,
        "bandwidth": {
            "copy_bytes_per_second": COPY_RATE,
            "weight_bytes_per_token": WEIGHT_BYTES,
            "kv_bytes_per_slot": SLOT_BYTES,
        },
    }


def outcome(document: dict) -> Outcome:
    return Outcome(document["metrics"]["total_script_seconds"] + 0.5, 10**9, document, None)


def _use(monkeypatch, runs: dict) -> None:
    def invented(command, number):
        return outcome(runs[command[0]])

    monkeypatch.setattr(comparison, "run_or_recall", invented)
    monkeypatch.setattr(sweep, "run_or_recall", invented)


def benchmark(monkeypatch, runs: dict, lengths=(), repeats=2) -> dict:
    """Return a benchmark result whose trials of a mode gave `runs[mode]`."""
    _use(monkeypatch, runs)
    commands = {(mode, length): [mode] for length in lengths for mode in runs if mode != "floor"}
    return comparison.run_benchmark(
        "mega_cache",
        {mode: [mode] for mode in runs},
        repeats,
        {"model_id": "random:3b"},
        Console(quiet=True),
        commands,
    )


def compare(monkeypatch, load: dict, skip: dict) -> dict:
    _use(monkeypatch, {"load": load, "skip": skip})
    commands = {"load": ["load"], "skip": ["skip"]}
    config = {"model_id": "random:3b"}
    return comparison.run_compare("mega_cache", commands, 2, config, Console(quiet=True))


def measurement(monkeypatch, **environment) -> dict:
    """Return a whole measurement; `environment` says where, without: on a CPU."""
    found = ENVIRONMENT | environment
    runs = {
        "compile_preload": run(environment=found),
        "compile_no_preload": run(first=40.0, environment=found),
        "eager": run(rest=3.0, first=3.5, environment=found),
        "floor": floor_run(environment=found),
    }
    measured = benchmark(monkeypatch, runs, lengths=(8, 512))
    return {
        "schema": 1,
        "kind": "measurement",
        "approach": "mega_cache",
        "model_id": "random:tiny" if found["gpu"] is None else "random:3b",
        "finished": "2026-01-02T03:04:05+00:00",
        "date": "2026-01-02",
        "environment": found,
        "page_cache": "warm",
        "missing": ["equivalence"],
        "compare": compare(monkeypatch, runs["compile_preload"], runs["compile_no_preload"]),
        "benchmark": measured,
        "sweep": measured["sweep"],
        "equivalence": None,
    }
