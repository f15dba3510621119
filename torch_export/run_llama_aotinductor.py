"""Load the ahead-of-time compiled package, then generate from it: no compiler in the process.

./run.sh --model-id random:tiny --prompt "Hello"
./run.sh --no-load-artifacts          the same graph, compiled at runtime
./compare.sh --model-id random:tiny   load against skip, in fresh processes
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by PYTHONSAFEPATH

from aotinductor.flags import APPROACH, LOAD, SKIP, RunSettings
from common import cuda, errors, machine
from common.cli import CompareFlags, ComparisonFlags, Console, parse_flags


def main(argv: Sequence[str]) -> None:
    groups = (RunSettings, CompareFlags, ComparisonFlags)
    settings, comparing, results = parse_flags(__doc__, groups, argv)
    if comparing.compare_load_vs_skip:
        # imported here: a plain run starts without them
        from aotinductor.lengths import find_plan
        from common.measure.compare import Subject, compare

        if settings.store.fetch is None:  # a disagreement shows before any trial
            find_plan(settings.files.pair(), settings.shape, settings.mode == "load")
        modes = {"load": LOAD, "skip": SKIP}
        compare(Subject(APPROACH, Path(__file__), modes, argv, settings, comparing, results))
        return
    if results.plot:
        raise errors.UsageError("--plot draws a comparison: add --compare-load-vs-skip")
    machine.spin_less()  # before any library with threads is loaded
    cuda.open_early(settings.shared.device != "cpu")
    console = Console(settings.shared.quiet, settings.shared.verbose)
    # imported here: --help and bad flags answer without what a run needs
    from aotinductor.serving import run

    caches = nullcontext()
    if settings.mode == "skip":
        from common.compiler.caches import private_compiler_caches

        caches = private_compiler_caches()
    with caches:
        document = run(settings, console)
    if document:
        from common.measure.report import write_json
        from common.measure.requests import print_run

        write_json(document, settings.shared.json)
        print_run(document, console)


if __name__ == "__main__":
    errors.run_script(main)
