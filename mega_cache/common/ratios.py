"""Two ratios that make seconds comparable between machines: start over floor, decode over copy.

`ttft_cold_over_floor` is a mode's `ttft_cold` divided by the mean of the floor's, which is the
moment when the checkpoint's bytes are on the device.

`decode_bandwidth_share` is bytes per token / time per token / copy bandwidth, of the same run:
- bytes per token: what decoding one token must read, whatever the mode really reads. The weights
  once (see floor.bytes_per_token), and the K and V of the slots that are filled: prompt + half of
  the new tokens, on average. Slots that are allocated and masked do not count, nor does padding.
- time per token: (seconds - ttft) / (new tokens - 1), the tail of the decode, over requests 2..N.
- copy bandwidth: bytes read + written per second, as the floor measured it.

Both are None where they cannot be known: without the floor mode, or with one request a trial.
"""

from collections.abc import Sequence

from common.measures import summarize

FLOOR = "floor"


def seconds_per_token(requests: Sequence[dict]) -> float | None:
    """Return seconds per token of the decode, prefill excluded, in the steady state."""
    rates = [
        (request["seconds"] - request["ttft_seconds"]) / (request["new_tokens"] - 1)
        for request in requests[1:]
        if request["ttft_seconds"] is not None and request["new_tokens"] > 1
    ]
    return sum(rates) / len(rates) if rates else None


def add_ratios(trials: list[dict], summary: dict) -> None:
    """Add to each mode's summary the seconds per token and both ratios."""
    floor_seconds = (summary.get(FLOOR, {}).get("ttft_cold_start_seconds") or {}).get("mean")
    bandwidth = _bandwidth(trials)
    for mode, entry in summary.items():
        mine = [trial for trial in trials if trial["mode"] == mode and "metrics" in trial]
        mine = [trial for trial in mine if trial["ok"]]
        entry["decode_seconds_per_token"] = summarize(
            seconds_per_token(trial.get("requests", ())) for trial in mine
        )
        starts = [trial["metrics"]["ttft_cold_start_seconds"] for trial in mine]
        entry["ttft_cold_over_floor"] = summarize(
            start / floor_seconds for start in starts if floor_seconds and start is not None
        )
        entry["decode_bandwidth_share"] = summarize(_share(trial, bandwidth) for trial in mine)


def _bandwidth(trials: list[dict]) -> dict | None:
    """Return what the floor's trials say of bytes and bandwidth, the bandwidth as their mean."""
    found = [t["bandwidth"] for t in trials if t["mode"] == FLOOR and t["ok"] and "bandwidth" in t]
    if not found:
        return None
    rates = summarize(entry["copy_bytes_per_second"] for entry in found)
    return found[0] | {"copy_bytes_per_second": rates["mean"]}


def _share(trial: dict, bandwidth: dict | None) -> float | None:
    seconds = seconds_per_token(trial.get("requests", ()))
    if bandwidth is None or not seconds:
        return None
    output = trial["output"]
    filled = output["prompt_tokens"] + output["new_tokens"] / 2  # slots, mean over the decode
    needed = bandwidth["weight_bytes_per_token"] + filled * bandwidth["kv_bytes_per_slot"]
    return needed / seconds / bandwidth["copy_bytes_per_second"]
