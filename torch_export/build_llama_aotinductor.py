"""Export the model, compile it ahead of time, and save it as one deployable `.pt2`.

    ./build.sh --model-id random:tiny
    python build_llama_aotinductor.py --max-seq-len 4096 --no-max-autotune

Writes the package (--package-path) and its metadata. Start from it with ./run.sh.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from aotinductor.flags import (
    APPROACH,
    CHECKPOINTS,
    CompileFlags,
    GraphFlags,
    PackageFileFlags,
    ShapeFlags,
)
from common.cli import parse_flags
from common.console import Console
from common.errors import run_script
from common.flags import SharedFlags

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from aotinductor.bounds import Bounds
    from common.stopwatch import Stages
    from common.targets import Target

# beside the weights: code, and the copies that the compiler packs for its own kernels
CODE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Settings:
    """Every flag of this script, by group."""

    shared: SharedFlags
    graph: GraphFlags
    shape: ShapeFlags
    compilation: CompileFlags
    files: PackageFileFlags

    def __post_init__(self):
        slots = self.graph.slots(self.shape)
        if slots is None:
            return
        if not self.shape.dynamic_seq_len:
            raise ValueError(
                "--kv-cache needs prompts of any length: leave --no-dynamic-seq-len out"
            )
        if slots < self.shape.max_seq_len:
            raise ValueError(
                f"--max-cache-len {slots} cannot hold a prompt of --max-seq-len "
                f"{self.shape.max_seq_len} tokens: lower the one or raise the other"
            )


def main(argv: Sequence[str]) -> None:
    (settings,) = parse_flags(__doc__, (Settings,), argv)
    console = Console(settings.shared.quiet)
    # imported late: --help answers without torch, and bad flags without its seconds
    from common.artifacts import building
    from common.results import write_json
    from common.trials import private_compiler_caches

    with private_compiler_caches(), building(settings.files.pair(), console):
        document = build(settings, console)
    write_json(document, settings.shared.json)
    report(document, settings, console)


def build(settings: Settings, console: Console) -> dict:
    """Compile, verify and write the package and its metadata; return the build's result."""
    from common.stopwatch import Stages, process_start

    stages = Stages(process_start())
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from aotinductor.bounds import make_bounds
    from aotinductor.recipe import recipe
    from common.artifacts import check_target, write_pair
    from common.manifest import SCHEMA, Manifest
    from common.results import environment
    from common.targets import choose_target

    stages.close("interpreter and imports")
    target = choose_target(settings.shared, CHECKPOINTS, console)
    check_target(settings.files.pair(), needed_bytes(settings.graph, target.checkpoint.folder))
    bounds = make_bounds(settings.shape)
    details = {}

    def describe(record: dict) -> Manifest:
        return Manifest(
            schema=SCHEMA,
            approach=APPROACH,
            model=target.describe_model(),
            environment=environment(),
            recipe=recipe(
                target,
                bounds,
                settings.shape.example_seq_len,
                settings.graph,
                settings.graph.slots(settings.shape),
                settings.compilation.max_autotune,
            ),
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


def needed_bytes(graph: GraphFlags, checkpoint_folder: "Path") -> int:
    if not graph.weights_embedded:
        return CODE_BYTES
    graphs = 2 if graph.kv_cache else 1  # each graph of a package carries its own copy
    weights = sum(path.stat().st_size for path in checkpoint_folder.glob("*.safetensors"))
    return graphs * weights + CODE_BYTES


def produce(
    path: "Path", settings: Settings, target: "Target", stages: "Stages", console: Console
) -> dict:
    """Write a verified package to `path`; return what its metadata tells beside the recipe."""
    from aotinductor.bounds import make_bounds
    from common.models import load_model

    bounds = make_bounds(settings.shape)
    with shown(stages, "load", console):
        model = load_model(target.checkpoint, target.device, target.dtype)
    if settings.graph.kv_cache:
        return produce_kv(path, settings, model, bounds, stages, console)
    return produce_base(path, settings, model, bounds, stages, console)


def produce_base(
    path: "Path", settings: Settings, model: "PreTrainedModel", bounds: "Bounds", stages: "Stages",
    console: Console,
) -> dict:  # fmt: skip
    from aotinductor import base_package
    from aotinductor.base_graph import export_base_graph
    from aotinductor.loading import base_step
    from aotinductor.verification import open_fresh_model

    embedded = settings.graph.weights_embedded
    with shown(stages, "export", console):
        exported = export_base_graph(model, bounds, settings.shape.example_seq_len)
    with shown(stages, "compile and package", console):
        details = base_package.compile_base_package(
            exported, path, embedded, settings.compilation.max_autotune
        )
    with shown(stages, "verify", console):
        graph = open_fresh_model(path, base_package.MODEL, details, model, embedded)
        checks = base_package.verify_base_package(base_step(graph), model, bounds)
    return details | {"verification": checks}


def produce_kv(
    path: "Path", settings: Settings, model: "PreTrainedModel", bounds: "Bounds", stages: "Stages",
    console: Console,
) -> dict:  # fmt: skip
    from aotinductor import kv_package

    embedded, slots = settings.graph.weights_embedded, settings.graph.slots(settings.shape)
    with shown(stages, "export, compile and package", console):
        details = kv_package.compile_kv_package(
            model, bounds, slots, settings.shape.example_seq_len, path, embedded,
            settings.compilation.max_autotune,
        )  # fmt: skip
    with shown(stages, "verify", console):
        generator = kv_package.open_fresh_package(path, details, model, embedded)
        checks = kv_package.verify_kv_package(generator, model, bounds, slots)
    return details | {"verification": checks}


@contextmanager
def shown(stages: "Stages", name: str, console: Console) -> Iterator[None]:
    """Time a stage and tell of it before and after: the longest take minutes."""
    console.say(f"{name} ...")
    with stages.stage(name):
        yield
    console.say(f"{name}: {stages.seconds[name]:.1f} s")


def report(document: dict, settings: Settings, console: Console) -> None:
    """Print what was saved, how close it is to eager, and the command that starts from it."""
    from common.tables import markdown_table

    recipe = document["recipe"]
    lengths = f"{recipe['min_seq_len']} to {recipe['max_seq_len']} tokens"
    multiple = recipe["dynamic_seq_multiple"]
    static = f"{recipe['max_seq_len']} tokens (static)"
    rows = [
        ["artifact", str(settings.files.package_path)],
        ["graphs", ", ".join(document["details"]["graphs"])],
        ["KV cache", f"{recipe['max_cache_len']} slots" if recipe["kv_cache"] else "none"],
        ["weights", "in the package" if recipe["embed_weights"] else "bound at load"],
        ["size", f"{document['file']['bytes'] / 1e6:.2f} MB"],
        ["lengths", f"{lengths}, x{multiple}" if recipe["dynamic_seq_len"] else static],
        ["build", f"{document['build_seconds']:.1f} s"],
    ]
    console.result(markdown_table(["saved", ""], rows))
    checks = [
        [
            check["graph"],
            str(check["tokens"]),
            str(check["padded_tokens"]),
            f"{check['max_absolute_difference']:.2e}",
            f"{check['max_relative_difference']:.2e}",
        ]
        for check in document["details"]["verification"]
    ]
    header = ["graph", "tokens", "padded", "logits: max abs difference", "of the largest logit"]
    console.result("\n" + markdown_table(header, checks))
    console.say("start from it with:\n  " + start_command(settings))


def start_command(settings: Settings) -> str:
    import shlex

    from common.cli import to_argv

    files = [word for word in to_argv(settings.files) if word not in to_argv(PackageFileFlags())]
    shared = [
        word
        for word in to_argv(replace(settings.shared, json=None))
        if word not in to_argv(SharedFlags())
    ]
    one = [] if settings.shape.dynamic_seq_len else ["--max-new-tokens=1"]
    return shlex.join(["./run.sh", *shared, *files, *one])


if __name__ == "__main__":
    run_script(main)
