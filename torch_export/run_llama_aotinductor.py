"""Load the ahead-of-time compiled package, then generate from it: no compiler in the process.

./run.sh --model-id random:tiny --prompt "Hello"
./run.sh --no-load-artifacts          the same graph, compiled at runtime
./compare.sh --model-id random:tiny   load against skip, in fresh processes
"""

from collections.abc import Sequence
from pathlib import Path

from aotinductor.flags import APPROACH, LOAD, SKIP, RunSettings
from common.cli import CompareFlags, ComparisonFlags, Console, config_of, parse_flags
from common.errors import UsageError, run_script
from common.toolchain import open_driver
from common.trials import private_compiler_caches


def main(argv: Sequence[str]) -> None:
    own = (CompareFlags, ComparisonFlags)
    settings, comparing, results = parse_flags(__doc__, (RunSettings, *own), argv)
    if comparing.compare_load_vs_skip:
        # imported here: a plain run starts without them
        from aotinductor.lengths import find_plan
        from common.compare import compare, trial_words

        if settings.store.fetch is None:
            find_plan(settings)  # a disagreement shows before any trial
        script, words = Path(__file__), trial_words(own, argv, settings.prompt)
        modes, config = {"load": LOAD, "skip": SKIP}, config_of(settings, comparing)
        compare(APPROACH, script, words, modes, settings.shared, comparing, results, config)
        return
    if results.plot:
        raise UsageError("--plot draws a comparison: add --compare-load-vs-skip")
    open_driver(settings.shared.device)
    console = Console(settings.shared.quiet, settings.shared.verbose)
    with private_compiler_caches():
        # imported here: --help answers without torch, and bad flags without its seconds
        from aotinductor.serving import run
        from common.report import write_json
        from common.serve import print_run

        document = run(settings, console)
    write_json(document, settings.shared.json)
    print_run(document, console)


if __name__ == "__main__":
    run_script(main)
