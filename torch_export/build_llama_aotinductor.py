"""Export the model, compile it ahead of time, and save it as one deployable `.pt2`.

    ./build.sh --model-id random:tiny
    python build_llama_aotinductor.py --kv-cache --max-seq-len 4096

Writes the package (--package-path) and its metadata, once its logits are the model's. Start from it
with ./run.sh.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # left out by PYTHONSAFEPATH

from aotinductor.flags import APPROACH, BuildSettings, PackageFileFlags
from common import cuda, machine
from common.artifact import disk, store
from common.cli import Console, SharedFlags, config_of, parse_flags
from common.compiler.caches import private_compiler_caches
from common.errors import run_script
from common.measure.report import markdown_table, write_json


def main(argv: Sequence[str]) -> None:
    (settings,) = parse_flags(__doc__, (BuildSettings,), argv)
    console, pair = Console(settings.shared.quiet, settings.shared.verbose), settings.files.pair()
    machine.spin_less()  # before any library with threads is loaded
    cuda.open_early(settings.shared.device != "cpu")
    with private_compiler_caches(), disk.building(pair, console):
        # imported here: --help answers without torch, and bad flags without its seconds
        from aotinductor.build.building import build

        document = build(settings, console)
    store.publish(pair, settings.store.publish, APPROACH, console)
    write_json(document, settings.shared.json)
    report(document, settings, console)


def report(document: dict, settings: BuildSettings, console: Console) -> None:
    """Print what was saved, how close it is to eager, and the command that starts from it."""
    recipe, details = document["recipe"], document["details"]
    longest, multiple = recipe["max_seq_len"], recipe["dynamic_seq_multiple"]
    lengths = f"{recipe['min_seq_len']} to {longest} tokens, x{multiple}"
    saved = {
        "artifact": str(settings.files.package_path),
        "graphs": ", ".join(details.get("programs", ["base"])),
        "KV cache": f"{recipe['max_cache_len']} slots" if recipe["kv_cache"] else "none",
        "weights": "in the package" if recipe["embed_weights"] else "bound at load",
        "size": f"{document['file']['bytes'] / 1e6:.2f} MB",
        "lengths": lengths if recipe["dynamic_seq_len"] else f"{longest} tokens (static)",
        "build": f"{document['build_seconds']:.1f} s",
    }
    console.result(markdown_table(["saved", ""], list(saved.items())))
    checks = details["verification"]
    names = [name for name in checks[0] if name != "float32"]
    found = [[check[name] for name in names] for check in checks]
    rows = [[f"{x:.2e}" if isinstance(x, float) else str(x) for x in row] for row in found]
    header = [name.replace("_", " ") for name in names]
    console.result("\nlogits beside those of eager:\n\n" + markdown_table(header, rows))
    for check in checks:
        if off := check.get("float32"):
            console.result(
                f"at {check['tokens']} tokens from float32: the package {off['package']:.2g} of "
                f"the largest logit, eager itself {off['eager']:.2g}"
            )
    # its device and dtype the package knows itself
    given = config_of(SharedFlags(settings.shared.model_id), settings.files)
    usual = config_of(SharedFlags(), PackageFileFlags())
    changed = [name for name in given if given[name] != usual[name]]
    words = [f"--{name.replace('_', '-')}={given[name]}" for name in changed]
    one = [] if recipe["dynamic_seq_len"] else ["--max-new-tokens=1"]
    console.say("start from it with:\n  " + shlex.join(["./run.sh", *words, *one]))


if __name__ == "__main__":
    run_script(main)
