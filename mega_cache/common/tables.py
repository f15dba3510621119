"""Aligned markdown tables, made from the very dictionaries that are written to JSON."""

from collections.abc import Sequence
from typing import Any

from common.measures import COUNTERS, MEASURES

RATIOS = (
    ("ttft_cold_over_floor", "ttft_cold / floor"),
    ("decode_bandwidth_share", "decode / copy bandwidth"),
)
_COMPARED = (("setup", "s"), ("generation", "s"), ("total", "s"), ("gen_tps", "tokens/s"))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table whose columns line up in a terminal: first left, others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    return "\n".join(line(row) for row in (header, rule, *rows))


def number(value: Any, digits: int = 3) -> str:
    """Return a figure as text; unknown is a dash, never 0."""
    if value is None:
        return "-"
    if isinstance(value, dict):
        value = value["mean"]
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value.is_integer() and abs(value) < 10**6 and digits == 0:
        return str(int(value))
    return f"{value:.{digits}f}"


def run_table(document: dict) -> str:
    """Return a run's measures, stages and compile evidence as two columns."""
    metrics = document["metrics"]
    rows = [[measure.label, _measured(metrics[measure.key], measure.key)] for measure in MEASURES]
    stages = document.get("stages") or {}
    rows += [[f"stage: {name}", f"{seconds:.3f} s"] for name, seconds in stages.items()]
    rows += [
        [name, number(value)]
        for name, value in document["compile"].items()
        if not isinstance(value, (dict, list))
    ]
    return markdown_table(["measure", "value"], rows)


def compare_table(document: dict) -> str:
    """Return load, skip and benefit, a row per measure and per counter."""
    summary = document["summary"]
    rows = []
    for name, unit in _COMPARED:
        entry = summary[name]
        gain = number(entry["benefit"], 2)
        rows.append(
            [
                f"{name} ({unit})",
                number(entry["load"]),
                number(entry["skip"]),
                f"{gain}x" if gain != "-" else gain,
            ]
        )
    for name in COUNTERS:
        rows.append([name, _count(summary[name]["load"]), _count(summary[name]["skip"]), ""])
    return markdown_table(["", "load", "skip", "benefit"], rows)


def benchmark_table(document: dict) -> str:
    """Return a column per mode, a row per measure and per counter."""
    summary = document["summary"]
    rows = [
        [f"{measure.label} ({_unit(measure.key)})"]
        + [number(entry.get(measure.key)) for entry in summary.values()]
        for measure in MEASURES
    ]
    for key, label in RATIOS:
        if any(entry.get(key) for entry in summary.values()):
            rows.append([label, *(number(entry.get(key)) for entry in summary.values())])
    for name in COUNTERS:
        counts = [_count(entry.get("compile", {}).get(name)) for entry in summary.values()]
        rows.append([name, *counts])
    table = markdown_table(["measure", *summary], rows)
    sweep = document.get("sweep")
    return f"{table}\n\n{sweep_table(sweep)}" if sweep else table


def sweep_table(entries: list[dict]) -> str:
    """Return a row per length: TTFT and time per token of each mode, in milliseconds."""
    modes = list(dict.fromkeys(entry["mode"] for entry in entries))
    found = {(entry["mode"], entry["prompt_length"]): entry for entry in entries}
    rows = []
    for length in sorted({entry["prompt_length"] for entry in entries}):
        row = [str(length)]
        for key in ("ttft_seconds", "seconds_per_token"):
            values = [found.get((mode, length), {}).get(key) for mode in modes]
            row += [number(None if value is None else value * 1e3, 2) for value in values]
        rows.append(row)
    header = ["prompt tokens", *(f"{mode} TTFT (ms)" for mode in modes)]
    return markdown_table([*header, *(f"{mode} per token (ms)" for mode in modes)], rows)


def _measured(value: float | None, key: str) -> str:
    return f"{number(value)} {_unit(key)}" if value is not None else "-"


def _unit(key: str) -> str:
    return "s" if key.endswith("_seconds") else "tokens/s"


def _count(entry: dict | None) -> str:
    """Return a counter's mean over trials: whole where all trials agree."""
    if entry is None:
        return "-"
    return number(float(entry["mean"]), 0 if entry["min"] == entry["max"] else 1)
