"""Serve the same requests in each mode, in fresh processes, and compare the whole of it.

    ./benchmark.sh --model-id random:tiny --num-requests 5 --repeats 1

compile_preload loads the package, compile_no_preload compiles at runtime (--no-preload-method),
eager is Hugging Face `generate` uncompiled, floor only brings the weights to the device. Build the
package first with ./build.sh.
"""

from collections.abc import Sequence
from pathlib import Path

from aotinductor.flags import APPROACH, EAGER, LOAD, SKIP, RunSettings
from aotinductor.lengths import find_plan
from common.cli import BenchmarkFlags, ComparisonFlags, config_of, parse_flags
from common.compare import benchmark, trial_words
from common.errors import run_script

RUN_SCRIPT = Path(__file__).with_name("run_llama_aotinductor.py")
MODES = {"compile_preload": LOAD, "compile_no_preload": SKIP, "eager": EAGER}
NUM_REQUESTS = 50


def main(argv: Sequence[str]) -> None:
    own = (BenchmarkFlags, ComparisonFlags)
    settings, flags, results = parse_flags(
        __doc__, (RunSettings, *own), argv, num_requests=NUM_REQUESTS
    )
    if settings.store.fetch is None:
        find_plan(settings)  # a disagreement shows before any trial
    words = trial_words(own, argv, settings.prompt)
    words = [f"--num-requests={settings.prompt.num_requests}", *words]
    config = config_of(settings, flags)
    benchmark(APPROACH, RUN_SCRIPT, words, MODES, settings.shared, flags, results, config)


if __name__ == "__main__":
    run_script(main)
