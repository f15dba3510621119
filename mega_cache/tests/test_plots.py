"""Pictures: refused before the trials where they cannot be drawn, and true to the results."""

import pytest
import synthetic
from helpers import run_script

from common import plots
from common.errors import EnvironmentProblemError, UsageError


def test_an_unknown_format_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        plots.check_plot(tmp_path / "a.pdf")
    plots.check_plot(None)  # no plot was asked for


def test_without_matplotlib_the_error_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    with pytest.raises(EnvironmentProblemError, match="pip install matplotlib"):
        plots.check_plot(tmp_path / "a.png")


@pytest.mark.skipif(plots.has_matplotlib(), reason="matplotlib is installed")
def test_without_matplotlib_no_trial_is_run(tmp_path):
    flags = ["--modes=eager", f"--plot={tmp_path / 'a.png'}", f"--json={tmp_path / 'a.json'}"]
    done = run_script("benchmark_llama_modes.py", *flags)
    assert done.status == 5
    assert "pip install matplotlib" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_bars_add_up_to_the_cold_start(monkeypatch):
    runs = {"eager": synthetic.run(ttft=0.25), "floor": synthetic.floor_run(seconds=1.8)}
    document = synthetic.benchmark(monkeypatch, runs)
    starts = plots.cold_starts(document)
    for mode, stages in starts.items():
        cold = document["summary"][mode]["ttft_cold_start_seconds"]["mean"]
        assert sum(stages.values()) == pytest.approx(cold)
    assert list(starts["eager"]) == ["interpreter and imports", "model", "ready to first token"]


def test_set_up_that_no_stage_claimed_is_shown_as_such(monkeypatch):
    run = synthetic.run()
    run["stages"] = {"interpreter and imports": 2.0}
    starts = plots.cold_starts(synthetic.benchmark(monkeypatch, {"eager": run}))
    assert starts["eager"]["other set-up"] == pytest.approx(1.5)


def test_pictures_are_drawn_with_the_sweep_beside(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    document = synthetic.measurement(monkeypatch)
    for suffix in plots.SUFFIXES:
        written = plots.draw(document["benchmark"], tmp_path / f"a{suffix}")
        assert [path.name for path in written] == [f"a{suffix}", f"a_sweep{suffix}"]
        assert all(path.stat().st_size > 5000 for path in written)
    assert plots.draw(document["compare"], tmp_path / "b.png") == [tmp_path / "b.png"]
