"""Pictures of compare and benchmark results, drawn from the very dictionaries that are written.

matplotlib is an optional extra: it is asked for before the trials run, not after them.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import EnvironmentProblemError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
# Okabe and Ito's colours, which the colour-blind can tell apart; hatches do it in grey print
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_HATCHES = ("", "///", "...", "\\\\\\", "xx", "--", "oo", "++")
_LIGHT = ("#E69F00", "#56B4E9", "#F0E442")  # on these a white hatch would not be seen
# blue, vermilion, green, purple: the furthest apart in lightness and hue; the same in every picture
_LINES = (
    {"marker": "o", "linestyle": "-", "color": "#0072B2"},
    {"marker": "s", "linestyle": "--", "color": "#D55E00"},
    {"marker": "^", "linestyle": "-.", "color": "#009E73"},
    {"marker": "D", "linestyle": ":", "color": "#CC79A7"},
)
_LINE_OF_MODE = {"compile_preload": 0, "compile_no_preload": 1, "eager": 2}
_TINY_SHARE = 0.06  # of the longest bar: a shorter piece has no room for its figure
_STEEP = 5.0  # slowest request over the median one: from here on the scale is logarithmic


def check_plot(path: Path | None) -> None:
    """Raise when `--plot` could not be drawn: unknown format, or no matplotlib. None is no plot."""
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: the name must end in {' or '.join(SUFFIXES)}")
    if not has_matplotlib():
        raise EnvironmentProblemError("--plot needs matplotlib: pip install matplotlib")


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(document: dict, path: Path | None) -> list[Path]:
    """Draw a compare or benchmark result into `path`, its sweep beside it; return the files."""
    if path is None:
        return []
    written = []
    if stages := cold_starts(document):
        latencies = mean_latencies(document)
        # compare serves one request a trial: nothing to show over the run
        panels = [(_draw_stages, stages)]
        if any(len(values) > 1 for values in latencies.values()):
            panels.append((_draw_latencies, latencies))
        written.append(_save(_figure(panels, document, stacked=True), path))
    if entries := document.get("sweep"):
        beside = path.with_name(f"{path.stem}_sweep{path.suffix}")
        panels = [(_draw_growth_of_ttft, entries), (_draw_growth_per_token, entries)]
        written.append(_save(_figure(panels, document, stacked=False), beside))
    return written


def cold_starts(document: dict) -> dict[str, dict[str, float]]:
    """Return per mode the mean seconds of each stage of a cold start, up to the first token.

    The stages of set-up, the rest of it that has no name, and from ready to the first token: they
    add up to `ttft_cold`.
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


def _cold_start(trial: dict) -> dict[str, float]:
    metrics, stages = trial["metrics"], {}
    ready, claimed = metrics["setup_seconds"], 0.0
    for name, seconds in (trial.get("stages") or {}).items():
        if claimed + seconds > ready + 0.001:
            break  # booked after ready: the requests
        stages[name] = seconds
        claimed += seconds
    if ready - claimed > 0.001:
        stages["other set-up"] = ready - claimed
    if metrics["ttft_after_ready_seconds"] is not None:
        stages["ready to first token"] = metrics["ttft_after_ready_seconds"]
    return stages


def _stage_order(starts: dict[str, dict[str, float]]) -> list[str]:
    """Return all stages in one order that keeps each mode's own as far as possible."""
    order: list[str] = []
    for stages in sorted(starts.values(), key=len, reverse=True):
        place = 0
        for name in stages:
            if name in order:
                place = order.index(name) + 1
            else:
                order.insert(place, name)
                place += 1
    return order


def _draw_stages(axes: "Axes", starts: dict[str, dict[str, float]]) -> None:
    modes = list(starts)
    longest = max(sum(stages.values()) for stages in starts.values())
    left = dict.fromkeys(modes, 0.0)
    seen = 0.002 * longest  # a piece below is thinner than the line around it
    order = [
        name
        for name in _stage_order(starts)
        if max(stages.get(name, 0.0) for stages in starts.values()) > seen
    ]
    for number, name in enumerate(order):
        seconds = [starts[mode].get(name, 0.0) for mode in modes]
        bars = axes.barh(
            modes, seconds, left=[left[mode] for mode in modes], label=name, height=0.62,
            **_fill(number),
        )  # fmt: skip
        for bar, mode, value in zip(bars, modes, seconds, strict=True):
            if value > _TINY_SHARE * longest:
                _write_on(axes, bar, value)
            left[mode] += value
    for mode in modes:
        axes.annotate(
            f"{left[mode]:.2f} s", (left[mode], mode), (5, 0), textcoords="offset points",
            va="center", fontweight="bold",
        )  # fmt: skip
    axes.set(xlabel="seconds since process start", xlim=(0, longest * 1.14))
    axes.set_title("Cold start to the first token, by stage", loc="left", fontsize=11)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    columns = 3 if len(order) > 4 else 4
    axes.legend(ncols=columns, loc="upper center", bbox_to_anchor=(0.45, -0.2), frameon=False)


def _fill(number: int) -> dict:
    colour = _COLOURS[number % len(_COLOURS)]
    edge = "#333333" if colour in _LIGHT else "white"
    # moved on by one each round, so that no pair of colour and hatch comes twice
    hatch = _HATCHES[(number + number // len(_COLOURS)) % len(_HATCHES)]
    return {"color": colour, "hatch": hatch, "edgecolor": edge, "linewidth": 0.6}


def _line(mode: str, number: int) -> dict:
    return _LINES[_LINE_OF_MODE.get(mode, number) % len(_LINES)]


def _write_on(axes: "Axes", bar, value: float) -> None:
    axes.annotate(
        f"{value:.2f}",
        (bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height() / 2),
        ha="center", va="center", fontsize=8,
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
    )  # fmt: skip


def _draw_latencies(axes: "Axes", latencies: dict[str, list[float]]) -> None:
    steep = False
    for number, (mode, seconds) in enumerate(latencies.items()):
        requests = range(1, len(seconds) + 1)
        axes.plot(requests, seconds, label=mode, markersize=4, **_line(mode, number))
        steep |= max(seconds) > _STEEP * sorted(seconds)[len(seconds) // 2]
    if steep:
        axes.set_yscale("log")
        _plain_log_labels(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel="request", ylabel="seconds" + (", log scale" if steep else ""))
    axes.set_title("Latency of each request of a run", loc="left", fontsize=11)
    count = max(map(len, latencies.values()))
    axes.set_xticks([1, *range(5, count + 1, 5 * (1 + count // 60))] if count > 8 else
                    range(1, count + 1))  # fmt: skip
    axes.grid(which="both", alpha=0.25)
    axes.legend(frameon=False)


def _draw_growth_of_ttft(axes: "Axes", entries: list[dict]) -> None:
    _draw_growth(axes, entries, "ttft_seconds", "Time to first token, second request")


def _draw_growth_per_token(axes: "Axes", entries: list[dict]) -> None:
    _draw_growth(axes, entries, "seconds_per_token", "Time per further token")


def _draw_growth(axes: "Axes", entries: list[dict], key: str, title: str) -> None:
    known = [entry for entry in entries if entry.get(key) is not None]
    for number, mode in enumerate(dict.fromkeys(entry["mode"] for entry in known)):
        mine = sorted((e["prompt_length"], e[key] * 1e3) for e in known if e["mode"] == mode)
        axes.plot(*zip(*mine, strict=True), label=mode, **_line(mode, number))
    lengths = sorted({entry["prompt_length"] for entry in known})
    axes.set_xticks(_readable(lengths))
    axes.set(xlabel="prompt length (tokens)", ylabel="milliseconds")
    values = [entry[key] for entry in known]
    if values and max(values) > 20 * min(values):
        axes.set_yscale("log")
        _plain_log_labels(axes.yaxis)
        axes.set_ylabel("milliseconds, log scale")
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(which="both", alpha=0.25)
    axes.legend(frameon=False)


def _readable(lengths: list[int]) -> list[int]:
    """Return the lengths that have room for their figure on a linear axis."""
    kept: list[int] = []
    for length in lengths:
        if not kept or length - kept[-1] >= 0.055 * lengths[-1]:
            kept.append(length)
    return kept


def _plain_log_labels(axis) -> None:
    """Write 0.5 and 20 at the ticks of a logarithmic axis instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _figure(panels: list, document: dict, stacked: bool) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(panels)
    figure = Figure(figsize=(9, 0.6 + 3.7 * count) if stacked else (10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # no window system, whatever the user's settings say
    grid = figure.subplots(count, 1) if stacked else figure.subplots(1, count)
    for axes, (paint, values) in zip([grid] if count == 1 else grid, panels, strict=True):
        paint(axes, values)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    figure.suptitle(caption(document), fontsize=9, x=0.01, ha="left", color="#444444")
    return figure


def caption(document: dict) -> str:
    """Return on what the figures were measured: approach, model, device, torch."""
    found, config = document["environment"], document["config"]
    where = found.get("gpu") or f"CPU ({found.get('cpu') or 'unknown'})"
    return (
        f"{document['approach']}, {config.get('model_id', 'unknown model')}, {where}, "
        f"torch {found.get('torch')}"
    )


def _save(figure: "Figure", path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # no date inside: the same result gives the same file
    metadata = {"Date": None} if path.suffix.lower() == ".svg" else {"Software": None}
    figure.savefig(path, dpi=140, metadata=metadata)
    return path
