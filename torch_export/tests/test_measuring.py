"""The measurement's commands fit this folder's scripts, and the READMEs show its results."""

from measure import artifact_flags
from run_llama_aotinductor import RunSettings

from common import flags, measuring, readme_tables
from common.cli import parse_flags
from common.console import Console
from common.equivalence import EquivalenceFlags
from common.steps import StateFolder


def test_the_readmes_show_the_committed_results():
    readme_tables.main(["--check"])


def test_the_flags_of_the_steps_are_flags_of_the_scripts(tmp_path):
    groups = (measuring.SharedFlags, measuring.MeasureFlags, measuring.StepFlags)
    plan = measuring.Plan("any", artifact_flags)
    one = measuring.Measurement(plan, *parse_flags("", groups, []), (), Console(True), 0.0)
    benchmark = (RunSettings, flags.BenchmarkFlags, flags.SweepFlags, flags.OutcomeFlags)
    known = {
        "compare": (RunSettings, flags.CompareFlags, flags.OutcomeFlags),
        "benchmark": benchmark,
        "sweep": benchmark,
        "speed": benchmark,
        "equivalence": (RunSettings, EquivalenceFlags),
    }
    state = StateFolder(tmp_path)
    steps = measuring.step_commands(one, state) | measuring.size_commands(one, state)
    for step, groups in known.items():
        settings = parse_flags("", groups, steps[step][1:])[0]
        assert settings.files.package_path == tmp_path / "artifact.pt2"
        assert settings.files.metadata_path == tmp_path / "artifact_meta.json"


def test_a_sweep_repeats_the_run_at_every_length_but_not_the_floor():
    import benchmark_llama_modes as script

    from common.sweep import sweep_commands

    (settings,) = parse_flags("", (RunSettings,), [])
    commands = sweep_commands(script.command, settings, ("eager", "floor"), (8, 128))
    assert list(commands) == [("eager", 8), ("eager", 128)]
    assert "--prompt-length=128" in commands["eager", 128]
