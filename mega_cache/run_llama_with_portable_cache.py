"""Load the portable cache, then serve requests through Hugging Face `generate`.

./run.sh --model-id random:tiny --prompt "Hello"
./run.sh --no-load-artifacts          the same, compiled from nothing
./compare.sh --model-id random:tiny   load against skip, in fresh processes
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by PYTHONSAFEPATH

from common import cuda, machine
from common.cli import CompareFlags, ComparisonFlags, Console, parse_flags
from common.compiler.caches import private_compiler_caches
from common.errors import ArtifactMismatchError, UsageError, run_script
from common.measure import report
from common.measure.compare import Subject, compare
from portable_cache import no_collections
from portable_cache.flags import APPROACH, MODE_WORDS, RUN_SCRIPT, UNTOLD, RunSettings


def main(argv: Sequence[str]) -> None:
    groups = (RunSettings, CompareFlags, ComparisonFlags)
    settings, comparing, results = parse_flags(__doc__, groups, argv, **UNTOLD)
    if comparing.compare_load_vs_skip:
        modes = {mode: MODE_WORDS[mode] for mode in ("load", "skip")}
        compare(Subject(APPROACH, RUN_SCRIPT, modes, argv, settings, comparing, results))
        return
    if results.plot:
        raise UsageError("--plot draws a comparison: add --compare-load-vs-skip")
    console = Console(settings.shared.quiet, settings.shared.verbose)
    machine.spin_less()  # before any library with threads is loaded
    cuda.open_early(settings.shared.device != "cpu")
    with private_compiler_caches():
        with no_collections():
            # imported here: --help answers without torch, and bad flags without its seconds
            from portable_cache.serving import run
        document = run(settings, console)
    if document is None:  # a conversation
        return
    report.write_json(document, settings.shared.json)
    if settings.loading.require_hit and document["misses"]:
        raise ArtifactMismatchError("not everything hit: " + " | ".join(document["misses"]))


if __name__ == "__main__":
    run_script(main)
