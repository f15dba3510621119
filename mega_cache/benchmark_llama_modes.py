"""Serve the same requests in each mode, in fresh processes, and compare the whole of it.

    ./benchmark.sh --model-id random:tiny --num-requests 5 --repeats 1

compile_preload loads the portable cache, compile_no_preload compiles from nothing, eager never
compiles. Build the artifact first with ./build.sh.
"""

from collections.abc import Sequence

from common.cli import parse_flags
from common.console import Console
from common.errors import run_script
from common.flags import BenchmarkFlags, OutcomeFlags
from portable_cache.flags import APPROACH
from run_llama_with_portable_cache import RunSettings, trial_command

MODES = {
    "compile_preload": {"load_artifacts": True, "eager": False},
    "compile_no_preload": {"load_artifacts": False, "eager": False},
    "eager": {"load_artifacts": None, "eager": True, "require_hit": False},
}


def main(argv: Sequence[str]) -> None:
    groups = (RunSettings, BenchmarkFlags, OutcomeFlags)
    settings, benchmark, outcome = parse_flags(__doc__, groups, argv)
    console = Console(settings.shared.quiet)
    from common.comparison import check_outcome, run_benchmark, show_trials
    from common.results import config_of, write_json
    from common.tables import benchmark_table

    document = run_benchmark(
        APPROACH,
        {mode: trial_command(settings, **MODES[mode]) for mode in benchmark.modes},
        benchmark.repeats,
        config_of(settings, benchmark),
        console,
    )
    write_json(document, settings.shared.json)
    show_trials(document, settings.prompt.show_completions, console)
    console.result(benchmark_table(document))
    check_outcome(document, outcome.tokens_may_differ)


if __name__ == "__main__":
    run_script(main)
