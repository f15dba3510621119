"""What is measured: names in tables and in JSON, units, and how each follows from timings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One request: seconds from its first work to its last token, and to its first."""

    seconds: float
    ttft_seconds: float | None
    new_tokens: int


@dataclass(frozen=True)
class Measure:
    """One measure: `label` in tables, `key` in JSON, unit by the key's ending.

    `brief`: benchmark shows it without --verbose.
    """

    label: str
    key: str
    brief: bool = True

    @property
    def unit(self) -> str:
        if self.key.endswith("_seconds"):
            return "s"
        return "tokens/s" if self.key.endswith(("_second", "_all")) else ""


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

# what compare puts side by side: name in its summary -> the measure
COMPARED = {
    "setup": "setup_seconds",
    "generation": "generation_seconds",
    "total": "total_script_seconds",
    "gen_tps": "generation_tokens_per_second",
}

# compile evidence beside the seconds; the first two and the last are shown without --verbose
BRIEF_COUNTERS = ("unique_graphs", "async_compile_miss", "kernels_compiled")
COUNTERS = (
    "unique_graphs",
    "calls_captured",
    "async_compile_miss",
    "async_compile_hit",
    "fxgraph_cache_hit",
    "fxgraph_cache_miss",
    "aot_autograd_cache_hit",
    "aot_autograd_cache_miss",
    "recompiles",
    "cudagraph_skips",
    "cudagraph_replays",
    "kernels_compiled",
    "kernels_tuned",
    "helpers_built",
    "compile_workers",
)


def run_metrics(requests: Sequence[Request], setup_seconds: float, total_seconds: float) -> dict:
    """Return every measure of a run; what one request cannot tell is None.

    `setup_seconds` runs from process start to ready, `total_seconds` to the end of the process.
    """
    generation = sum(request.seconds for request in requests)
    tokens = sum(request.new_tokens for request in requests)
    first, tail = (requests[0] if requests else None), requests[1:]
    ttft = first.ttft_seconds if first else None
    return {
        "ttft_cold_start_seconds": None if ttft is None else setup_seconds + ttft,
        "ttft_after_ready_seconds": ttft,
        "first_request_seconds": first.seconds if first else None,
        "mean_seconds": _mean(request.seconds for request in requests),
        "tail_mean_seconds": _mean(request.seconds for request in tail),
        "tokens_per_second_all": _rate(tokens, generation),
        "tail_tokens_per_second": _rate(
            sum(request.new_tokens for request in tail), sum(request.seconds for request in tail)
        ),
        "end_to_end_tokens_per_second": _rate(tokens, total_seconds),
        "total_script_seconds": total_seconds,
        "setup_seconds": setup_seconds,
        "generation_seconds": generation if requests else None,
        "generation_tokens_per_second": _rate(tokens, generation),
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
        if request.ttft_seconds is not None and request.new_tokens > 1
    ]
    return _mean(rates)


def summarize(values: Iterable[float | None]) -> dict | None:
    """Return mean, min, max and n of the known values, or None when there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {
        "mean": sum(known) / len(known),
        "min": min(known),
        "max": max(known),
        "n": len(known),
    }


def ratio(above: dict | None, below: dict | None) -> float | None:
    """Return how many times larger one mean is than another; unknown is None."""
    if above is None or below is None or not below["mean"]:
        return None
    return above["mean"] / below["mean"]


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds else None
