"""Pictures of compare and benchmark results, drawn from the very dictionaries that are written.

matplotlib is an optional extra: it is asked for before the trials run, not after them.
"""

import importlib.util
from pathlib import Path

from common.errors import EnvironmentProblemError, UsageError
from common.measure.measures import succeeded, summarize
from common.measure.report import mean_stages


def check_plot(path: Path | None) -> None:
    """Raise when `--plot` could not be drawn: unknown format, or no matplotlib. None is no plot."""
    if path and path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--plot {path}: the name must end in .png or .svg")
    if path and importlib.util.find_spec("matplotlib") is None:
        raise EnvironmentProblemError("--plot needs matplotlib: pip install matplotlib")


def draw(document: dict, path: Path | None) -> None:
    """Draw a compare or benchmark result into `path`: the starts, and each request's latency."""
    starts = cold_starts(document)
    if path is None or not starts:
        return
    import matplotlib.style
    from matplotlib.figure import Figure

    # the floor serves no request, and compare one a trial: nothing to show over the run
    latencies = {mode: _mean_latencies(document, mode) for mode in starts}
    latencies = {mode: seconds for mode, seconds in latencies.items() if len(seconds) > 1}
    charts = 2 if latencies else 1
    with matplotlib.style.context("tableau-colorblind10"):
        figure = Figure(figsize=(9, 4 * charts), layout="constrained")
        _draw_starts(figure.add_subplot(charts, 1, 1), starts)
        if latencies:
            axes = figure.add_subplot(charts, 1, 2)
            for mode, seconds in latencies.items():
                axes.plot(range(1, len(seconds) + 1), seconds, marker=".", label=mode)
            axes.set(title="Latency of each request", xlabel="request", ylabel="seconds, log scale")
            axes.set_yscale("log")
            axes.legend()
    found = document["environment"]
    where = found.get("gpu") or f"CPU ({found.get('cpu')})"
    model = document["config"].get("model_id")
    figure.suptitle(f"{document['approach']}, {model}, {where}, torch {found.get('torch')}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)


def cold_starts(document: dict) -> dict[str, dict[str, float]]:
    """Return per mode the mean seconds of each stage up to the first token: they sum to ttft_cold.

    The stages of set-up, the rest of it that has no name, and from ready to the first token.
    """
    starts = {}
    for mode in dict.fromkeys(trial["mode"] for trial in document["trials"]):
        metrics = [trial["metrics"] for trial in succeeded(document["trials"], mode)]
        if setup := summarize(one["setup_seconds"] for one in metrics):
            stages = mean_stages(document, mode)
            stages = {name: stages[name] for name in stages if name not in ("prefill", "decode")}
            stages["other set-up"] = max(0.0, setup["mean"] - sum(stages.values()))
            first_token = summarize(one["ttft_after_ready_seconds"] for one in metrics)
            stages["ready to first token"] = first_token["mean"] if first_token else 0.0
            starts[mode] = stages
    return starts


def _draw_starts(axes, starts: dict[str, dict[str, float]]) -> None:
    ends = dict.fromkeys(starts, 0.0)
    longest = max(sum(stages.values()) for stages in starts.values())
    for name in dict.fromkeys(name for stages in starts.values() for name in stages):
        seconds = [stages.get(name, 0.0) for stages in starts.values()]
        bars = axes.barh(list(starts), seconds, left=list(ends.values()), label=name)
        # a short piece has no room for its figure
        shown = [f"{value:.2f}" if value > 0.06 * longest else "" for value in seconds]
        axes.bar_label(bars, shown, label_type="center", bbox={"facecolor": "white", "pad": 1})
        ends = {mode: ends[mode] + value for mode, value in zip(starts, seconds, strict=True)}
    for mode, end in ends.items():
        axes.text(end, mode, f"  {end:.2f} s", va="center")
    axes.set(title="Cold start to the first token", xlabel="seconds since process start")
    axes.set_xlim(0, longest * 1.14)
    axes.invert_yaxis()
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _mean_latencies(document: dict, mode: str) -> list[float]:
    """Return the seconds of request 1, 2, ..., each the mean over the trials."""
    runs = [trial["requests"] for trial in succeeded(document["trials"], mode)]
    same_requests = zip(*runs, strict=False)
    return [sum(one["seconds"] for one in same) / len(same) for same in same_requests]
