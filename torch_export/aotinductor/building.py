"""One build, from the process's start to a verified package and its metadata."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from aotinductor.compile_package import compile_base_package, compile_kv_package
from aotinductor.flags import APPROACH, BuildSettings, GraphFlags
from aotinductor.lengths import make_bounds
from aotinductor.recipe import make_recipe
from aotinductor.runtime_compile import open_fresh_package
from aotinductor.verify import verify_package
from common.artifacts import check_target, write_pair
from common.cli import Console
from common.manifest import SCHEMA, Manifest
from common.measures import Stages, process_start
from common.report import environment
from common.target import Target, choose_target, load_model
from common.toolchain import prepare_toolchain
from common.weights import list_checkpoint

# beside the weights: code, and the copies that the compiler packs for its own kernels
_CODE_BYTES = 64 * 2**20


def build(settings: BuildSettings, console: Console) -> dict:
    """Compile, verify and write the package and its metadata; return the build's result."""
    stages = Stages(process_start())
    stages.close("imports")
    target = choose_target(settings.shared, console)
    prepare_toolchain(target.device, host_code=True, console=console)
    check_target(settings.files.pair(), needed_bytes(settings.graph, target.checkpoint.folder))
    details: dict = {}

    def describe(record: dict) -> Manifest:
        return Manifest(
            schema=SCHEMA,
            approach=APPROACH,
            model=target.describe_model(),
            environment=environment(),
            recipe=make_recipe(settings, target, make_bounds(settings.shape)),
            file=record,
            build_seconds=stages.elapsed(),
            details=details,
        )

    written = write_pair(
        settings.files.pair(),
        lambda path: details.update(produce(path, settings, target, stages, console)),
        describe,
    )
    return {"kind": "build", "command": sys.argv, "stages": stages.seconds, **asdict(written)}


def needed_bytes(graph: GraphFlags, checkpoint_folder: Path) -> int:
    if not graph.weights_embedded:
        return _CODE_BYTES
    return sum(one.nbytes for one in list_checkpoint(checkpoint_folder).values()) + _CODE_BYTES


def produce(
    path: Path, settings: BuildSettings, target: Target, stages: Stages, console: Console
) -> dict:
    """Write a verified package to `path`; return what its metadata tells beside the recipe."""
    bounds, slots = make_bounds(settings.shape), settings.graph.slots(settings.shape)
    example, embed = settings.shape.example_seq_len, settings.graph.weights_embedded
    max_autotune = settings.compilation.max_autotune
    with shown(stages, "weights", console):
        model = load_model(target)
    with shown(stages, "compile", console):
        if slots is None:
            details = compile_base_package(model, bounds, example, path, embed, max_autotune)
        else:
            details = compile_kv_package(model, bounds, slots, example, path, embed, max_autotune)
    with shown(stages, "verify", console):
        checks = verify_package(open_fresh_package(path, details, model), model, bounds)
    return details | {"verified": True, "verification": checks}


@contextmanager
def shown(stages: Stages, name: str, console: Console) -> Iterator[None]:
    """Time a stage and tell of it before and after: the longest take minutes."""
    console.say(f"{name} ...")
    with stages.stage(name):
        yield
    console.say(f"{name}: {stages.seconds[name]:.1f} s")
