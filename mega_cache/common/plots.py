"""Pictures of compare and benchmark results, drawn from the very dictionaries that are written.

matplotlib is an optional extra: it is asked for before the trials run, not after them.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import EnvironmentProblemError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
# Okabe and Ito's colours, which the colour-blind can tell apart; hatches do it in grey print
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_HATCHES = ("", "///", "...", "\\\\\\", "xx", "--", "oo", "++")
_MARKERS = ("o", "s", "^", "D")
_TINY_SHARE = 0.06  # of the longest bar: a shorter piece has no room for its figure


def check_plot(path: Path | None) -> None:
    """Raise when `--plot` could not be drawn: unknown format, or no matplotlib. None is no plot."""
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: the name must end in {' or '.join(SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise EnvironmentProblemError("--plot needs matplotlib: pip install matplotlib")


def draw(document: dict, path: Path | None) -> None:
    """Draw a compare or benchmark result into `path`: starts, latencies, and the sweep if any."""
    starts = cold_starts(document)
    if path is None or not starts:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    latencies = mean_latencies(document)
    panels: list[tuple[Callable, Any]] = [(_draw_starts, starts)]
    # compare serves one request a trial: nothing to show over the run
    if any(len(seconds) > 1 for seconds in latencies.values()):
        panels.append((_draw_latencies, latencies))
    if document.get("sweep"):
        panels.append((_draw_sweep, document["sweep"]))
    figure = Figure(figsize=(9, 0.6 + 3.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, whatever the user's settings say
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (paint, values) in zip(grid, panels, strict=True):
        paint(axes, values)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(caption(document), fontsize=9, x=0.01, ha="left", color="#444444")
    _save(figure, path)


def cold_starts(document: dict) -> dict[str, dict[str, float]]:
    """Return per mode the mean seconds of each stage up to the first token: they sum to ttft_cold.

    The stages of set-up, the rest of it that has no name, and from ready to the first token.
    """
    means = {}
    for mode in dict.fromkeys(trial["mode"] for trial in document["trials"]):
        starts = [_cold_start(t) for t in document["trials"] if t["mode"] == mode and t["ok"]]
        names = dict.fromkeys(name for start in starts for name in start)
        means[mode] = {
            name: sum(start.get(name, 0.0) for start in starts) / len(starts) for name in names
        }
    return {mode: stages for mode, stages in means.items() if stages}


def mean_latencies(document: dict) -> dict[str, list[float]]:
    """Return per mode the seconds of request 1, 2, ..., each the mean over the trials."""
    latencies = {}
    for mode in dict.fromkeys(trial["mode"] for trial in document["trials"]):
        runs = [
            [request["seconds"] for request in trial["requests"]]
            for trial in document["trials"]
            if trial["mode"] == mode and trial["ok"] and trial.get("requests")
        ]
        if runs:
            latencies[mode] = [sum(same) / len(same) for same in zip(*runs, strict=False)]
    return latencies


def caption(document: dict) -> str:
    """Return on what the figures were measured: approach, model, device, torch."""
    found, config = document["environment"], document["config"]
    where = found.get("gpu") or f"CPU ({found.get('cpu') or 'unknown'})"
    return (
        f"{document['approach']}, {config.get('model_id', 'unknown model')}, {where}, "
        f"torch {found.get('torch')}"
    )


def _cold_start(trial: dict) -> dict[str, float]:
    metrics = trial["metrics"]
    generation = ("prefill", "decode")
    stages = {name: s for name, s in trial.get("stages", {}).items() if name not in generation}
    stages["other set-up"] = max(0.0, metrics["setup_seconds"] - sum(stages.values()))
    stages["ready to first token"] = metrics["ttft_after_ready_seconds"] or 0.0
    return stages


def _draw_starts(axes: "Axes", starts: dict[str, dict[str, float]]) -> None:
    modes = list(starts)
    longest = max(sum(stages.values()) for stages in starts.values())
    left = dict.fromkeys(modes, 0.0)
    names = dict.fromkeys(name for stages in starts.values() for name in stages)
    for number, name in enumerate(names):
        seconds = [starts[mode].get(name, 0.0) for mode in modes]
        bars = axes.barh(
            modes, seconds, left=[left[mode] for mode in modes], label=name, height=0.62,
            color=_COLOURS[number % len(_COLOURS)], hatch=_HATCHES[number % len(_HATCHES)],
            edgecolor="white", linewidth=0.6,
        )  # fmt: skip
        shown = [f"{value:.2f}" if value > _TINY_SHARE * longest else "" for value in seconds]
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        for text in axes.bar_label(bars, shown, label_type="center", fontsize=8):
            text.set_bbox(box if text.get_text() else None)
        for mode, value in zip(modes, seconds, strict=True):
            left[mode] += value
    for mode in modes:
        axes.text(left[mode], mode, f"  {left[mode]:.2f} s", va="center", fontweight="bold")
    axes.set(xlabel="seconds since process start", xlim=(0, longest * 1.14))
    axes.set_title("Cold start to the first token, by stage", loc="left", fontsize=11)
    axes.invert_yaxis()
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.2), frameon=False)


def _draw_latencies(axes: "Axes", latencies: dict[str, list[float]]) -> None:
    for number, (mode, seconds) in enumerate(latencies.items()):
        requests = range(1, len(seconds) + 1)
        axes.plot(requests, seconds, label=mode, **_line(number))
    axes.set(xlabel="request", ylabel="seconds, log scale", yscale="log")
    axes.set_title("Latency of each request of a run", loc="left", fontsize=11)
    axes.legend(frameon=False)


def _draw_sweep(axes: "Axes", entries: list[dict]) -> None:
    known = [entry for entry in entries if entry["seconds_per_token"] is not None]
    for number, mode in enumerate(dict.fromkeys(entry["mode"] for entry in known)):
        mine = [entry for entry in known if entry["mode"] == mode]
        lengths = [entry["prompt_length"] for entry in mine]
        milliseconds = [entry["seconds_per_token"] * 1e3 for entry in mine]
        axes.plot(lengths, milliseconds, label=mode, **_line(number))
    axes.set(xlabel="prompt length (tokens)", ylabel="milliseconds", ylim=(0, None))
    axes.set_title("Time per further token", loc="left", fontsize=11)
    axes.legend(frameon=False)


def _line(number: int) -> dict:
    marker = _MARKERS[number % len(_MARKERS)]
    return {"marker": marker, "markersize": 4, "color": _COLOURS[number % len(_COLOURS)]}


def _save(figure: "Figure", path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # no date inside: the same result gives the same file
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
    figure.savefig(path, dpi=140, metadata=metadata)
