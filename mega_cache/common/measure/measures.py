"""What is measured: names in tables and in JSON, units, and how each follows from timings."""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class Request(NamedTuple):
    """One request: seconds from its first work to its last token, and to its first."""

    seconds: float
    ttft_seconds: float
    new_tokens: int


class Measure(NamedTuple):
    """`label` in tables, `key` in JSON; `brief`: benchmark shows it without --verbose."""

    label: str
    key: str
    brief: bool = True

    @property
    def unit(self) -> str:
        return "s" if self.key.endswith("_seconds") else "tokens/s"

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})"


MEASURES = (
    Measure("ttft_cold", "ttft_cold_start_seconds"),
    Measure("ttft_ready", "ttft_after_ready_seconds"),
    Measure("first_request", "first_request_seconds"),
    Measure("mean", "mean_seconds"),
    Measure("tail_mean", "tail_mean_seconds"),
    Measure("tokens/s_all", "tokens_per_second_all"),
    Measure("tail_tokens/s", "tail_tokens_per_second"),
    Measure("end_to_end_tokens/s", "end_to_end_tokens_per_second"),
    Measure("total_script", "total_script_seconds", brief=False),
    Measure("setup", "setup_seconds", brief=False),
    Measure("generation", "generation_seconds", brief=False),
    Measure("gen_tps", "generation_tokens_per_second", brief=False),
)

# what compare puts side by side, in its own words
COMPARED = (
    Measure("setup", "setup_seconds"),
    Measure("generation", "generation_seconds"),
    Measure("total", "total_script_seconds"),
    Measure("gen_tps", "generation_tokens_per_second"),
)

# Compile evidence: name in JSON -> (group, name) in torch._dynamo.utils.counters, the same on 2.9
# to 2.13. What torch does not count, compiler/counts.py does.
COUNTERS = {
    "unique_graphs": ("stats", "unique_graphs"),
    "calls_captured": ("stats", "calls_captured"),
    "async_compile_miss": ("inductor", "async_compile_cache_miss"),
    "async_compile_hit": ("inductor", "async_compile_cache_hit"),
    "fxgraph_cache_hit": ("inductor", "fxgraph_cache_hit"),
    "fxgraph_cache_miss": ("inductor", "fxgraph_cache_miss"),
    "fxgraph_cache_bypass": ("inductor", "fxgraph_cache_bypass"),
    "aot_autograd_cache_hit": ("aot_autograd", "autograd_cache_hit"),
    "aot_autograd_cache_miss": ("aot_autograd", "autograd_cache_miss"),
    "aot_autograd_cache_bypass": ("aot_autograd", "autograd_cache_bypass"),
    "recompiles": None,
    "cudagraph_skips": ("inductor", "cudagraph_skips"),
    "cudagraph_replays": None,
    "kernels_compiled": None,
    "kernels_tuned": None,
    "helpers_built": None,
    "compile_workers": None,
}
# the rows of compare without --verbose
_COUNTED = ("unique_graphs", "async_compile_miss", "kernels_compiled")
COMPARED_BRIEFLY = ("setup", "generation", "total", *_COUNTED)


def run_metrics(requests: Sequence[Request], setup_seconds: float, total_seconds: float) -> dict:
    """Return every measure of a run; what one request cannot tell is None.

    `setup_seconds` runs from process start to ready, `total_seconds` to the end of the process.
    """
    first, tail = (requests[0] if requests else None), requests[1:]
    generation, tail_seconds = (sum(one.seconds for one in some) for some in (requests, tail))
    tokens, tail_tokens = (sum(one.new_tokens for one in some) for some in (requests, tail))
    return {
        "ttft_cold_start_seconds": setup_seconds + first.ttft_seconds if first else None,
        "ttft_after_ready_seconds": first.ttft_seconds if first else None,
        "first_request_seconds": first.seconds if first else None,
        "mean_seconds": quotient(generation, len(requests)),
        "tail_mean_seconds": quotient(tail_seconds, len(tail)),
        "tokens_per_second_all": quotient(tokens, generation),
        "tail_tokens_per_second": quotient(tail_tokens, tail_seconds),
        "end_to_end_tokens_per_second": quotient(tokens, total_seconds),
        "total_script_seconds": total_seconds,
        "setup_seconds": setup_seconds,
        "generation_seconds": generation if requests else None,
        "generation_tokens_per_second": quotient(tokens, generation),
    }


def with_wall_time(metrics: dict, wall_seconds: float) -> dict:
    """Return a run's metrics with the process's whole wall time, which only a parent can see."""
    rate, seconds = metrics["end_to_end_tokens_per_second"], metrics["total_script_seconds"]
    return metrics | {
        "total_script_seconds": wall_seconds,
        "end_to_end_tokens_per_second": rate and rate * seconds / wall_seconds,
    }


def decode_seconds_per_token(requests: Sequence[Request]) -> float | None:
    """Return seconds per token of the decode, prefill excluded, of the steady state if there is."""
    rates = [
        (request.seconds - request.ttft_seconds) / (request.new_tokens - 1)
        for request in (requests[1:] or requests)
        if request.new_tokens > 1
    ]
    return quotient(sum(rates), len(rates))


def succeeded(trials: Iterable[dict], mode: str) -> list[dict]:
    return [trial for trial in trials if trial["mode"] == mode and trial["ok"]]


def summarize(values: Iterable[float | None]) -> dict | None:
    """Return mean, min, max and n of the known values, or None when there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known), "n": len(known)}


def ratio(above: dict | None, below: dict | None) -> float | None:
    """Return how many times larger one mean is than another; unknown is None."""
    return quotient(above["mean"], below["mean"]) if above and below else None


def quotient(above: float | None, below: float | None) -> float | None:
    """Return above / below, None where nothing was generated or clocked: not 0, not infinity."""
    return above / below if above and below else None


# --- stages ----------------------------------------------------------------------------------

# set by a measuring parent just before the spawn: seconds of the clock that all processes share
START_VARIABLE = "LLAMA_START_MONOTONIC"


def process_start() -> float:
    """Return when this process began, in seconds of `time.monotonic()`, interpreter included.

    Without a measuring parent it is the kernel's word, in ticks of 10 ms; a shell wrapper that
    `exec`s us counts too, since it is the same process.
    """
    if START_VARIABLE in os.environ:
        return float(os.environ[START_VARIABLE])
    # field 22 counts from the boot; the name in field 2 may hold spaces, so cut after its bracket
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic() - (since_boot - ticks / os.sysconf("SC_CLK_TCK"))


class Stages:
    """Seconds per named stage of a process, in order; the rest of the wall time has no name."""

    def __init__(self, start: float):
        self.start = start
        self.seconds: dict[str, float] = {}

    def close(self, name: str) -> None:
        """Book everything since the start that no stage has claimed yet under `name`."""
        rest = self.elapsed() - sum(self.seconds.values())
        self.seconds[name] = self.seconds.get(name, 0.0) + rest

    def elapsed(self) -> float:
        return time.monotonic() - self.start
