"""Serve the same requests in each mode, in fresh processes, and compare the whole of it.

    ./benchmark.sh --model-id random:tiny --num-requests 5 --repeats 1

compile_preload loads the portable cache, compile_no_preload compiles from nothing, eager never
compiles. Build the artifact first with ./build.sh.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by PYTHONSAFEPATH

from common.cli import BenchmarkFlags, ComparisonFlags, parse_flags
from common.errors import run_script
from common.measure.compare import Subject, benchmark
from portable_cache.flags import APPROACH, MODE_WORDS, RUN_SCRIPT, UNTOLD, RunSettings

MODES = {
    "compile_preload": MODE_WORDS["load"],
    "compile_no_preload": MODE_WORDS["skip"],
    "eager": MODE_WORDS["eager"],
}


def main(argv: Sequence[str]) -> None:
    groups = (RunSettings, BenchmarkFlags, ComparisonFlags)
    settings, flags, results = parse_flags(__doc__, groups, argv, num_requests=50, **UNTOLD)
    benchmark(Subject(APPROACH, RUN_SCRIPT, MODES, argv, settings, flags, results))


if __name__ == "__main__":
    run_script(main)
