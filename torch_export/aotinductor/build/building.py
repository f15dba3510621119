"""One build, from the process's start to a verified package and its metadata."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aotinductor.build.runtime_compile import compile_package, open_compiled
from aotinductor.build.verify import verify_package
from aotinductor.flags import APPROACH, BuildSettings
from aotinductor.lengths import Plan, make_bounds
from aotinductor.models import refuse_unsupported
from aotinductor.recipe import files_identity, make_recipe
from common import machine
from common.artifact import disk, manifest
from common.cli import Console
from common.compiler import toolchain
from common.measure.measures import Stages, process_start
from common.model.eager import eager_logits, load_model
from common.model.target import choose_target

# beside the weights: code, and the copies that the compiler packs for its own kernels
_CODE_BYTES = 64 * 2**20


def build(settings: BuildSettings, console: Console) -> dict:
    """Compile, verify and write the package and its metadata; return the build's result."""
    stages = Stages(process_start())
    stages.close("imports")
    target = choose_target(settings.shared, console)
    target.checkpoint.require_weights()
    refuse_unsupported(target.checkpoint, settings.slots is not None)
    toolchain.quieten(target.device, console)
    toolchain.prepare_toolchain(target.device, host_code=True, console=console)
    pair, embed = settings.files.pair(), settings.weights_embedded
    stored = target.checkpoint.stored.values() if embed else ()
    disk.check_target(pair, APPROACH, _CODE_BYTES + sum(one.nbytes for one in stored))
    bounds, details = make_bounds(settings.shape), {}
    stages.close("device")

    @contextmanager
    def shown(name: str) -> Iterator[None]:  # the longest take minutes
        console.say(f"{name} ...")
        yield
        stages.close(name)
        console.say(f"{name}: {stages.seconds[name]:.1f} s")

    def produce(path: Path) -> None:
        with shown("weights"):
            model = load_model(target)
            eager_logits(model, list(range(8)), 1)  # an overflow is told now, not after minutes
        with shown("compile"):
            how = (path, embed, settings.graph.max_autotune)
            found = compile_package(model, bounds, settings.slots, *how)
        with shown("verify"):
            plan = Plan(bounds)
            engine = open_compiled(path, found, target, plan)
            checks = verify_package(engine, model, plan)
        details.update(found, verified=True, verification=checks)
        details["checkpoint"] = target.checkpoint.record
        details["weights_files"] = files_identity(target.checkpoint)

    def describe(file: dict) -> manifest.Manifest:
        recipe, seconds = make_recipe(settings, target), stages.elapsed()
        what = (APPROACH, target.describe_model(), machine.environment(), recipe)
        return manifest.Manifest(manifest.SCHEMA, *what, file, seconds, details)

    written = disk.write_pair(pair, produce, describe)
    return {"kind": "build", "command": sys.argv, "stages": stages.seconds, **written._asdict()}
