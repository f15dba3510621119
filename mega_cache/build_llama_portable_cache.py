"""Warm up `generate` under torch.compile and save what was compiled as one portable file.

    ./build.sh --model-id random:tiny
    python build_llama_portable_cache.py --prefill-lengths 128,256 --decode-length 64

Writes the artifact (--cache-path) and its metadata. Start from it with ./run.sh.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by PYTHONSAFEPATH

from common import cuda, machine
from common.artifact import disk, store
from common.cli import Console, parse_flags
from common.compiler.caches import private_compiler_caches
from common.errors import run_script
from common.measure.report import markdown_table, write_json
from portable_cache.flags import APPROACH, BuildSettings

# the blob of a 3B's decode graphs is some megabytes a length; checked before the long compile
NEEDED_BYTES = 256 * 2**20


def main(argv: Sequence[str]) -> None:
    (settings,) = parse_flags(__doc__, (BuildSettings,), argv)
    console = Console(settings.shared.quiet, settings.shared.verbose)
    pair = settings.files.pair()
    machine.spin_less()  # before any library with threads is loaded
    cuda.open_early(settings.shared.device != "cpu")
    with private_compiler_caches(), disk.building(pair, console):
        disk.check_target(pair, APPROACH, NEEDED_BYTES)
        # imported late: --help answers without torch, and bad flags without its seconds
        from common.model.target import choose_target
        from portable_cache.build.building import build

        target = choose_target(settings.shared, console)
        flags, seed = settings.compilation, settings.shared.seed
        document = build(target, flags, pair, settings.build, seed, console)
    write_json(document, settings.shared.json)
    report(document, settings, console)
    store.publish(pair, settings.store.publish, APPROACH, console)


def report(document: dict, settings: BuildSettings, console: Console) -> None:
    """Print what was saved, and the command that starts from it."""
    details, files = document["details"], settings.files
    entries = ", ".join(f"{count} {kind}" for kind, count in details["entries"].items())
    rows = [
        ["artifact", str(files.cache_path)],
        ["size", f"{document['file']['bytes'] / 1e6:.2f} MB"],
        ["entries", entries],
        ["KV caches", ", ".join(str(entry["slots"]) for entry in details["warmed"]) + " slots"],
        ["decode step", "compiled ahead" if details["decode_step"] else "traced at each start"],
        ["verified", "hits in fresh processes" if details["verified"] else "no"],
        ["build", f"{document['build_seconds']:.1f} s"],
    ]
    console.result(markdown_table(["saved", ""], rows))
    words = ["--model-id", settings.shared.model_id, "--cache-path", str(files.cache_path)]
    if files.metadata_path:
        words += ["--metadata-path", str(files.metadata_path)]
    console.say("start from it with:\n  ./run.sh " + shlex.join(words))
    for line in document["shortcomings"]:
        console.warn(line)


if __name__ == "__main__":
    run_script(main)
