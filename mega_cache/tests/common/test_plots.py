"""Pictures: refused before the trials where they cannot be drawn, and true to the results."""

import importlib.util

import pytest

from common.errors import EnvironmentProblemError, UsageError
from common.measure import plots


def test_an_unknown_format_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        plots.check_plot(tmp_path / "a.pdf")
    plots.check_plot(None)  # no plot was asked for


def test_without_matplotlib_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblemError, match="pip install matplotlib"):
        plots.check_plot(tmp_path / "a.png")


def test_the_bars_add_up_to_the_cold_start():
    trial = {
        "mode": "eager",
        "ok": True,
        "metrics": {"setup_seconds": 2.5, "ttft_after_ready_seconds": 0.25},
        "stages": {"imports": 1.5, "weights": 0.5, "prefill": 0.25, "decode": 9.0},
    }
    starts = plots.cold_starts({"trials": [trial]})
    assert starts["eager"] == {
        "imports": 1.5, "weights": 0.5, "other set-up": 0.5, "ready to first token": 0.25,
    }  # fmt: skip
