"""Serve the same requests in each mode, in fresh processes, and compare the whole of it.

    ./benchmark.sh --model-id random:tiny --num-requests 5 --repeats 1

compile_preload loads the package, compile_no_preload compiles at runtime (--no-preload-method),
eager is Hugging Face `generate` uncompiled, floor only brings the weights to the device. Build the
package first with ./build.sh.
"""

from collections.abc import Sequence

from run_llama_aotinductor import RunSettings, trial_command

from aotinductor.flags import APPROACH, CHECKPOINTS
from common.cli import parse_flags
from common.console import Console
from common.errors import run_script
from common.flags import BenchmarkFlags, OutcomeFlags, PlotFlags, SweepFlags
from common.floor import floor_command
from common.ratios import FLOOR

MODES = {
    "compile_preload": {"load_artifacts": True, "eager": False},
    "compile_no_preload": {"load_artifacts": False, "eager": False},
    "eager": {"load_artifacts": False, "eager": True},
}


def main(argv: Sequence[str]) -> None:
    groups = (RunSettings, BenchmarkFlags, SweepFlags, PlotFlags, OutcomeFlags)
    settings, benchmark, sweep, picture, outcome = parse_flags(__doc__, groups, argv)
    console = Console(settings.shared.quiet)
    from aotinductor.recipe import find_plan
    from common.comparison import check_outcome, run_benchmark, show_trials
    from common.plots import check_plot, draw
    from common.results import config_of, write_json
    from common.sweep import sweep_commands
    from common.tables import benchmark_table

    check_plot(picture.plot)
    find_plan(settings.files, settings.shape, loading=True)  # disagreement: before any trial
    document = run_benchmark(
        APPROACH,
        {mode: command(settings, mode) for mode in benchmark.modes},
        benchmark.repeats,
        config_of(settings, benchmark, sweep),
        console,
        sweep_commands(command, settings, benchmark.modes, sweep.sweep_prompt_lengths),
    )
    write_json(document, settings.shared.json)
    draw(document, picture.plot)
    show_trials(document, settings.prompt.show_completions, console)
    console.result(benchmark_table(document))
    check_outcome(document, outcome.tokens_may_differ)


def command(settings: RunSettings, mode: str) -> list[str]:
    """Return the command of one trial in this mode."""
    if mode == FLOOR:
        return floor_command(settings.shared, CHECKPOINTS, Console(settings.shared.quiet))
    return trial_command(settings, **MODES[mode])


if __name__ == "__main__":
    run_script(main)
