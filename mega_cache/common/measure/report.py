"""Result files, and the tables and lines that are printed from the very same dictionaries."""

import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.machine import environment
from common.measure.measures import COMPARED, COMPARED_BRIEFLY, MEASURES, succeeded

SCHEMA = 1

# ---- result files ------------------------------------------------------------------------


def write_json(document: dict, path: Path | None) -> None:
    """Write a result file whole or not at all; None is no file."""
    if path is None:
        return
    text = as_json_text(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe or /dev/stdout cannot be replaced
        path.write_text(text)
        return
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(path)


def as_json_text(document: dict) -> str:
    """Return JSON to be handed on: no place of this machine, an array of numbers on one line.

    Texts of prompts and completions stay as they are, whatever they hold.
    """
    text = json.dumps(_without_places(document), indent=2, allow_nan=False)
    # no string holds a line break: what is found is an array, and of numbers
    numbers = re.compile(r"\[\n\s*([-+.,\deE\s]+?)\s*\]")
    return numbers.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


_TEXTS = ("prompt", "text", "completions")


def _without_places(value: Any, key: str = "") -> Any:
    """Return the value with the folders that its paths begin with made general."""
    if isinstance(value, dict):
        return {name: _without_places(one, name) for name, one in value.items()}
    if key in _TEXTS:
        return value
    if isinstance(value, list | tuple):
        # in a command the word after --prompt is one, and the word itself holds one after the =
        words = zip(["", *value], value, strict=False)
        return [one if _is_prompt(one, before) else _without_places(one) for before, one in words]
    if not isinstance(value, str):
        return value
    places = {
        f"{Path(__file__).resolve().parents[2]}/": "./",
        sys.executable: "python",
        tempfile.gettempdir(): "$TMPDIR",
        os.path.expanduser("~") + "/": "~/",
    }
    for place in sorted(places, key=len, reverse=True):  # a folder may lie in another one
        value = value.replace(place, places[place])
    return value


def _is_prompt(word: Any, before: Any) -> bool:
    return before == "--prompt" or (isinstance(word, str) and word.startswith("--prompt="))


# ---- tables ------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a markdown table whose columns line up in a terminal: first left, others right."""
    cells = [[number(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = []
    for first, *others in cells:
        right = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append(f"| {' | '.join([first.ljust(widths[0]), *right])} |")
    return "\n".join(lines)


def number(value: Any, digits: int = 3) -> str:
    """Return a figure, or the mean of a summary, as text; unknown is a dash, never 0."""
    if isinstance(value, dict):
        if isinstance(value["min"], int):  # a counter: whole where all trials agree
            digits = 0 if value["min"] == value["max"] else 1
        value = value["mean"]
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def tell(document: dict, verbose: bool) -> str:
    """Return the tables of a compare or benchmark result, and what they say in words."""
    if document["kind"] == "compare":
        return f"{compare_table(document, verbose)}\n\n{compare_words(document)}"
    sweep = [sweep_table(document["sweep"])] if "sweep" in document else []
    return "\n\n".join([benchmark_table(document, verbose), *sweep, benchmark_words(document)])


def compare_table(document: dict, verbose: bool = False) -> str:
    """Return load, skip and benefit: the published rows, with `verbose` every one."""
    titles = {one.label: one.title for one in COMPARED}
    rows = []
    for name, entry in document["summary"].items():
        if verbose or name in COMPARED_BRIEFLY:
            gain = entry.get("benefit", "")  # a counter has none
            gain = f"{gain:.2f}x" if isinstance(gain, float) else gain
            rows.append([titles.get(name, name), entry["load"], entry["skip"], gain])
    return markdown_table(["", "load", "skip", "benefit"], rows)


def compare_words(document: dict) -> str:
    """Return in words what the load saved, and where the rest of its time goes."""
    total = document["summary"]["total"]
    if not (total["load"] and total["skip"]):
        return "too few trials succeeded to compare them"
    load, skip = total["load"]["mean"], total["skip"]["mean"]
    rest = f"of the {load:.1f} s that stay, {_largest_stages(document, 'load')}"
    return f"loading saves {skip - load:.1f} s of {skip:.1f} s; {rest}"


def benchmark_table(document: dict, verbose: bool = False) -> str:
    """Return a column per mode, a row per measure: the published ones, with `verbose` all."""
    entries = list(document["summary"].values())
    shown = [one for one in MEASURES if one.brief or verbose]
    rows = [[one.title, *(entry[one.key] for entry in entries)] for one in shown]
    ratios = {"ttft_cold, x floor": "ttft_cold_over_floor"}
    if verbose:
        ratios["decode / read bandwidth"] = "decode_bandwidth_share"
    for label, key in ratios.items():
        if any(entry[key] for entry in entries):  # none without the mode floor
            rows.append([label, *(number(entry[key], 2) for entry in entries)])
    counters = entries[0]["compile"] if verbose else ["kernels_compiled"]
    rows += [[name, *(entry["compile"][name] for entry in entries)] for name in counters]
    return markdown_table(["measure", *document["summary"]], rows)


def benchmark_words(document: dict) -> str:
    """Return in words what preloading changed, for the start and for the speed after it."""

    def mean(mode: str, key: str) -> float | None:
        entry = document["summary"].get(mode, {}).get(key)
        return entry and entry["mean"]

    parts = []
    total = mean("compile_preload", "total_script_seconds")
    without = mean("compile_no_preload", "total_script_seconds")
    if total and without:
        parts.append(f"preloading saves {without - total:.1f} s of the whole process")
    tail = mean("compile_preload", "tail_tokens_per_second")
    eager = mean("eager", "tail_tokens_per_second")
    if tail and eager:
        parts.append(f"after the first request it is {tail / eager:.2f} times as fast as eager")
    if total:
        parts.append(f"of its start, {_largest_stages(document, 'compile_preload', 'decode')}")
    return "; ".join(parts) or "too few trials succeeded to compare the modes"


def sweep_table(entries: list[dict]) -> str:
    """Return a row per length: TTFT and time per token of each mode, in milliseconds."""
    columns = {"TTFT": "ttft_seconds", "per token": "seconds_per_token"}
    rows: dict[int, list[str]] = {}
    for name in columns.values():
        for entry in entries:
            row = rows.setdefault(entry["prompt_length"], [str(entry["prompt_length"])])
            row.append(number(entry[name] and entry[name] * 1e3, 2))
    modes = dict.fromkeys(entry["mode"] for entry in entries)
    header = ["prompt tokens", *(f"{mode} {name} (ms)" for name in columns for mode in modes)]
    return markdown_table(header, list(rows.values()))


def mean_stages(document: dict, mode: str) -> dict[str, float]:
    """Return the mean seconds of each stage of a mode's trials, of those that succeeded."""
    runs = [trial["stages"] for trial in succeeded(document["trials"], mode)]
    names = dict.fromkeys(name for stages in runs for name in stages)
    return {name: sum(stages.get(name, 0.0) for stages in runs) / len(runs) for name in names}


def _largest_stages(document: dict, mode: str, *left_out: str) -> str:
    means = mean_stages(document, mode)
    largest = sorted(means.keys() - left_out, key=means.__getitem__, reverse=True)[:3]
    return ", ".join(f"{name} takes {means[name]:.2f} s" for name in largest)


# ---- logits: the results of check_equivalence --------------------------------------------


def logits_document(approach: str, dtype: str, slots: int | None, steps: int, rows: list) -> dict:
    """Return the result of check_equivalence: logits beside those of the model in float32, eager.

    A row per prompt length, with the `logit_errors` of `eager` in `dtype` and of `load`.
    """
    return {
        "kind": "equivalence",
        "approach": approach,
        "environment": environment(),
        "dtype": dtype,
        "slots": slots,
        "reference": "eager float32",
        "steps": steps,
        "rows": rows,
    }


def logit_errors(found, expected) -> dict[str, float]:
    """Return absolute errors in standard deviations of the expected logits, and equal choices.

    Both are (steps, vocab) float32 on the CPU.
    """
    difference = (found - expected).abs() / expected.std()
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    return {
        "mean_abs_error": float(difference.mean()),
        "max_abs_error": float(difference.max()),
        "same_top_token_share": float(same),
    }


def logits_table(document: dict) -> str:
    """Return mean and largest error of eager and of the artifact, a row per prompt length."""
    header = ["prompt tokens", "eager mean", "eager max", "load mean", "load max", "same choice"]
    rows = []
    for row in document["rows"]:
        eager, load = row["eager"], row["load"]
        errors = [one[f"{of}_abs_error"] for one in (eager, load) for of in ("mean", "max")]
        same = f"{load['same_top_token_share']:.0%}"
        rows.append([row["prompt_length"], *(f"{error:.2g}" for error in errors), same])
    return markdown_table(header, rows)
