"""Result files, and the tables and lines that are printed from the very same dictionaries."""

import functools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.manifest import in_rehearsal
from common.measures import BRIEF_COUNTERS, COMPARED, COUNTERS, MEASURES

SCHEMA = 1

# ---- the machine and the stack -----------------------------------------------------------


def environment() -> dict[str, Any]:
    """Return the machine and the stack; what cannot be told is None.

    Imports nothing new: a process that has no torch yet gets the GPU's fields as None.
    """
    rehearsal = {"rehearsal": True} if in_rehearsal() else {}
    return gpu_environment() | _stack() | rehearsal


def gpu_environment() -> dict[str, Any]:
    """Return name, compute capability, driver and CUDA of the GPU, each None without one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return dict.fromkeys(("gpu", "compute_capability", "driver", "cuda"))
    return {
        "gpu": torch.cuda.get_device_name(),
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "driver": _driver(),
        "cuda": torch.version.cuda,
    }


def package_version(name: str) -> str | None:
    """Return an installed package's version without importing it, or None."""
    # imported here: --help does without its 50 ms
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


@functools.cache  # asks git, and reads metadata of packages: once a process
def _stack() -> dict[str, Any]:
    return {
        "torch": package_version("torch"),
        "triton": package_version("triton"),
        "transformers": package_version("transformers"),
        "python": platform.python_version(),
        # not platform.platform(): the name of a kernel build tells of the machine's owner
        "platform": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "cpu": _cpu_name(),
        "commit": _commit(),
    }


def _driver() -> str | None:
    # the kernel module says it at once; nvidia-smi takes a good part of a second, inside a start
    try:
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0].split()
        return next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, IndexError, StopIteration):
        return None


def _commit() -> str | None:
    """Return the commit of the repository that this file is in, marked when it has changes."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _cpu_name() -> str | None:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or None
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0].partition(':')[2].strip()} x{len(names)}" if names else None


# ---- result files ------------------------------------------------------------------------


def write_json(document: dict, path: Path | None) -> None:
    """Write a result file whole or not at all; None is no file."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    text = without_machine_paths(as_json_text(document))
    if not path.exists() or path.is_file():
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    else:  # a pipe or /dev/stdout cannot be replaced
        path.write_text(text)


def as_json_text(document: dict) -> str:
    """Return indented JSON in which an array of numbers stands on one line."""
    text = json.dumps(document, indent=2, allow_nan=False)
    return re.sub(r"\[[\s\d.,eE+-]*\]", lambda array: " ".join(array[0].split()), text) + "\n"


def without_machine_paths(text: str) -> str:
    """Name places as another machine can read them: a result file is made to be handed on."""
    folder = Path(__file__).resolve().parents[1]
    places = {
        f"{folder}/": "./",
        sys.executable: "python",
        tempfile.gettempdir(): "$TMPDIR",
        os.path.expanduser("~") + "/": "~/",
    }
    for place in sorted(places, key=len, reverse=True):  # a folder may lie in another one
        text = text.replace(place, places[place])
    return text


# ---- tables ------------------------------------------------------------------------------


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
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def compare_table(document: dict, verbose: bool = False) -> str:
    """Return load, skip and benefit: the published rows, with `verbose` every one."""
    summary = document["summary"]
    names = list(COMPARED) if verbose else list(COMPARED)[:3]
    rows = []
    for name in names:
        entry = summary[name]
        gain = "-" if entry["benefit"] is None else f"{entry['benefit']:.2f}x"
        unit = "tokens/s" if name == "gen_tps" else "s"
        rows.append([f"{name} ({unit})", number(entry["load"]), number(entry["skip"]), gain])
    for name in COUNTERS if verbose else BRIEF_COUNTERS:
        rows.append([name, count(summary[name]["load"]), count(summary[name]["skip"]), ""])
    return markdown_table(["", "load", "skip", "benefit"], rows)


def compare_words(document: dict) -> str:
    """Return in words what the load saved, and where the rest of its time goes."""
    total = document["summary"]["total"]
    if total["load"] is None or total["skip"] is None:
        return "too few trials succeeded to compare them"
    saved = total["skip"]["mean"] - total["load"]["mean"]
    rest = _largest_stages(document, "load")
    return (
        f"loading saves {saved:.1f} s of {total['skip']['mean']:.1f} s; "
        f"of the {total['load']['mean']:.1f} s that stay, {rest}"
    )


def benchmark_table(document: dict, verbose: bool = False) -> str:
    """Return a column per mode, a row per measure: the published ones, with `verbose` all."""
    summary = document["summary"]
    rows = [
        [f"{one.label} ({one.unit})", *(number(entry[one.key]) for entry in summary.values())]
        for one in MEASURES
        if one.brief or verbose
    ]
    if any(entry["ttft_cold_over_floor"] for entry in summary.values()):
        values = [number(entry["ttft_cold_over_floor"], 2) for entry in summary.values()]
        rows.append(["ttft_cold, x floor", *values])
    if verbose and any(entry["decode_bandwidth_share"] for entry in summary.values()):
        values = [number(entry["decode_bandwidth_share"], 2) for entry in summary.values()]
        rows.append(["decode / copy bandwidth", *values])
    for name in COUNTERS if verbose else ("kernels_compiled",):
        rows.append([name, *(count(entry["compile"].get(name)) for entry in summary.values())])
    table = markdown_table(["measure", *summary], rows)
    sweep = document.get("sweep")
    return f"{table}\n\n{sweep_table(sweep)}" if sweep else table


def benchmark_words(document: dict) -> str:
    """Return in words what preloading changed, for the start and for the speed after it."""
    summary = document["summary"]
    parts = []
    preload, without, eager = (
        summary.get(mode) for mode in ("compile_preload", "compile_no_preload", "eager")
    )
    if preload and without and preload["first_request_seconds"] and without["total_script_seconds"]:
        saved = without["total_script_seconds"]["mean"] - preload["total_script_seconds"]["mean"]
        parts.append(f"preloading saves {saved:.1f} s of the whole process")
    if preload and eager and preload["tail_tokens_per_second"] and eager["tail_tokens_per_second"]:
        gain = preload["tail_tokens_per_second"]["mean"] / eager["tail_tokens_per_second"]["mean"]
        parts.append(f"after the first request it is {gain:.2f} times as fast as eager")
    if preload and preload["total_script_seconds"]:
        parts.append(f"of its start, {_largest_stages(document, 'compile_preload', 'decode')}")
    return "; ".join(parts) or "too few trials succeeded to compare the modes"


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


def count(entry: dict | None) -> str:
    """Return a counter's mean over trials: whole where all trials agree."""
    if entry is None:
        return "-"
    return number(float(entry["mean"]), 0 if entry["min"] == entry["max"] else 1)


def _largest_stages(document: dict, mode: str, *left_out: str) -> str:
    """Return the three stages that take most of a mode's processes, in words."""
    runs = [
        trial["stages"] for trial in document["trials"] if trial["mode"] == mode and trial["ok"]
    ]
    names = dict.fromkeys(name for stages in runs for name in stages)
    means = {name: sum(stages.get(name, 0.0) for stages in runs) / len(runs) for name in names}
    largest = sorted(means.keys() - left_out, key=means.__getitem__, reverse=True)[:3]
    return ", ".join(f"{name} takes {means[name]:.2f} s" for name in largest)


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
    columns = [(mode, f"{of}_abs_error") for mode in ("eager", "load") for of in ("mean", "max")]
    rows = [
        [
            str(row["prompt_length"]),
            *(f"{row[mode][error]:.2g}" for mode, error in columns),
            f"{row['load']['same_top_token_share']:.0%}",
        ]
        for row in document["rows"]
    ]
    return markdown_table(header, rows)
