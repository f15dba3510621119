"""Serve the same requests in each mode, in fresh processes, and compare the whole of it.

    ./benchmark.sh --model-id random:tiny --num-requests 5 --repeats 1

compile_preload loads the package, compile_no_preload compiles at runtime (--no-preload-method),
eager is Hugging Face `generate` uncompiled, floor only brings the weights to the device. Build the
package first with ./build.sh.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by PYTHONSAFEPATH

from aotinductor.flags import APPROACH, EAGER, LOAD, SKIP, RunSettings
from aotinductor.lengths import find_plan
from common.cli import BenchmarkFlags, ComparisonFlags, parse_flags
from common.errors import run_script
from common.measure.compare import Subject, benchmark

RUN_SCRIPT = Path(__file__).with_name("run_llama_aotinductor.py")
MODES = {"compile_preload": LOAD, "compile_no_preload": SKIP, "eager": EAGER}


def main(argv: Sequence[str]) -> None:
    groups = (RunSettings, BenchmarkFlags, ComparisonFlags)
    settings, flags, results = parse_flags(__doc__, groups, argv, num_requests=50)
    if settings.store.fetch is None:  # a disagreement shows before any trial
        find_plan(settings.files.pair(), settings.shape, settings.mode == "load")
    benchmark(Subject(APPROACH, RUN_SCRIPT, MODES, argv, settings, flags, results))


if __name__ == "__main__":
    run_script(main)
