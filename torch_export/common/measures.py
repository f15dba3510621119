"""What is measured: names in tables, names in JSON, and how each follows from the raw timings."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Measure:
    """One measure: `label` in tables, `key` in JSON, unit by the key's ending."""

    label: str
    key: str


MEASURES = (
    Measure("ttft_cold", "ttft_cold_start_seconds"),
    Measure("ttft_ready", "ttft_after_ready_seconds"),
    Measure("first_request", "first_request_seconds"),
    Measure("mean", "mean_seconds"),
    Measure("tail_mean", "tail_mean_seconds"),
    Measure("tokens/s_all", "tokens_per_second_all"),
    Measure("tail_tokens/s", "tail_tokens_per_second"),
    Measure("end_to_end_tokens/s", "end_to_end_tokens_per_second"),
    Measure("total_script", "total_script_seconds"),
    Measure("setup", "setup_seconds"),
    Measure("generation", "generation_seconds"),
    Measure("gen_tps", "generation_tokens_per_second"),
)

# compile evidence that compare and benchmark show beside the seconds
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
)


@dataclass(frozen=True)
class Request:
    """One request: seconds from its first work to its last token, and to its first."""

    seconds: float
    ttft_seconds: float | None
    new_tokens: int

    def as_json(self) -> dict:
        return asdict(self)


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
    tokens_per_second, seconds = (
        metrics["end_to_end_tokens_per_second"],
        metrics["total_script_seconds"],
    )
    rate = None if tokens_per_second is None else tokens_per_second * seconds / wall_seconds
    return metrics | {
        "total_script_seconds": wall_seconds,
        "end_to_end_tokens_per_second": rate,
    }


def summarize(values: Iterable[float | None]) -> dict | None:
    """Return mean, min, max and n of the known values, or None when there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {
        "mean": statistics.fmean(known),
        "min": min(known),
        "max": max(known),
        "n": len(known),
    }


def benefit(load: dict | None, skip: dict | None) -> float | None:
    """Return how many times less `load` takes than `skip`."""
    if load is None or skip is None or not load["mean"]:
        return None
    return skip["mean"] / load["mean"]


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds else None
