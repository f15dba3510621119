"""Warm up `generate` under torch.compile and save what was compiled as one portable file.

    ./build.sh --model-id random:tiny
    python build_llama_portable_cache.py --prefill-lengths 128,256 --decode-length 64

Writes the artifact (--cache-path) and its metadata. Start from it with ./run.sh.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from common.cli import parse_flags, to_argv
from common.console import Console
from common.errors import run_script
from common.flags import SharedFlags
from portable_cache.flags import APPROACH, CHECKPOINTS, BuildFlags, CacheFileFlags, CompileFlags

if TYPE_CHECKING:
    from portable_cache.decode_ahead import ExportedStep
    from transformers import Cache, PreTrainedModel

    from common.prompts import TextCodec
    from portable_cache.compile_evidence import Watch

# the blob of a 3B's decode graph is some megabytes a length; checked before the long compile
NEEDED_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Settings:
    """Every flag of this script, by group."""

    shared: SharedFlags
    lengths: BuildFlags
    compilation: CompileFlags
    files: CacheFileFlags


def main(argv: Sequence[str]) -> None:
    (settings,) = parse_flags(__doc__, (Settings,), argv)
    console = Console(settings.shared.quiet)
    # imported late: --help answers without torch, and bad flags without its seconds
    from common.artifacts import building, check_target
    from common.results import write_json
    from common.trials import private_compiler_caches

    pair = settings.files.pair()
    with private_compiler_caches():
        check_target(pair, NEEDED_BYTES)
        with building(pair, console):
            document = build(settings, console)
    write_json(document, settings.shared.json)
    report(document, settings, console)


def build(settings: Settings, console: Console) -> dict:
    """Warm up, write the artifact and its metadata, and return the build's result."""
    from common.stopwatch import Stages, process_start

    stages = Stages(process_start())
    import transformers  # noqa: F401

    from common.artifacts import write_pair
    from common.compile_evidence import watch_compilation
    from common.manifest import SCHEMA, Manifest
    from common.models import load_model
    from common.prompts import load_codec
    from common.results import environment
    from common.targets import choose_target
    from portable_cache import bundle
    from portable_cache.recipe import recipe

    stages.close("interpreter and imports")
    bundle.check_caches_are_on()
    target = choose_target(settings.shared, CHECKPOINTS, console)
    bundle.configure()
    bundle.watch()
    watch = watch_compilation()
    with stages.stage("load model"):
        model = load_model(target.checkpoint, target.device, target.dtype)
    with stages.stage("warm up"):
        codec = load_codec(target.checkpoint.folder)
        warmed, caches = warm_up(model, codec, settings, watch, console)
    with stages.stage("precompile"):
        steps = precompile_decode(model, caches, settings, console)
    with stages.stage("save"):
        saved = bundle.save_bundle({slots: step.content for slots, step in steps.items()})
        manifest = Manifest(
            schema=SCHEMA,
            approach=APPROACH,
            model=target.describe_model(),
            environment=environment(),
            recipe=recipe(settings.compilation, settings.lengths.prefill_lengths, target.device),
            file={},
            build_seconds=stages.elapsed(),
            details={
                "warmed": warmed,
                "entries": saved.entries,
                "decode_steps": {slots: step.contract for slots, step in steps.items()},
                "graphs": [asdict(graph) for graph in watch.graphs],
            },
        )
        written = write_pair(
            settings.files.pair(),
            lambda path: path.write_bytes(saved.blob),
            lambda record: replace(manifest, file=record),
        )
    return {"kind": "build", "command": sys.argv, "stages": stages.seconds, **asdict(written)}


def warm_up(
    model: "PreTrainedModel",
    codec: "TextCodec",
    settings: Settings,
    watch: "Watch",
    console: Console,
) -> tuple[list[dict], dict[int, "Cache"]]:
    """Generate once per prefill length; return what each took and compiled, and the caches by slots."""
    from common.compile_evidence import read_evidence
    from portable_cache import generation

    flags = settings.compilation
    generation.configure_generation(model, flags, flags.decode_length, (), padding_id=0)
    caches, warmed = {}, []
    for length in settings.lengths.prefill_lengths:
        slots = generation.slots_for(flags, length, flags.decode_length)
        if slots not in caches:
            generation.forget_compiled_state(model)
            caches[slots] = generation.make_cache(model, flags, slots)
        cache = caches[slots]
        before = read_evidence(watch)
        prompt = generation.Prompt(codec.synthetic_prompt(length, settings.shared.seed), 0, 0)
        began = time.monotonic()
        generation.serve(model, prompt, cache, settings.shared.seed)
        after = read_evidence(watch)
        warmed.append(
            {
                "prefill_length": length,
                "slots": slots,
                "seconds": time.monotonic() - began,
                "graphs": after.unique_graphs - before.unique_graphs,
                "kernels_compiled": after.kernels_compiled - before.kernels_compiled,
            }
        )
        console.say(describe_warmed(warmed[-1]))
    return warmed, caches


def precompile_decode(
    model: "PreTrainedModel", caches: dict[int, "Cache"], settings: Settings, console: Console
) -> dict[int, "ExportedStep"]:
    """Compile the decode step of every cache ahead of time; return what could be, by slots."""
    if not settings.lengths.precompile:
        return {}
    from portable_cache import decode_ahead, generation

    steps = {}
    try:
        for slots, cache in caches.items():
            generation.forget_compiled_state(model)
            call = decode_ahead.capture_decode_call(model, cache)
            steps[slots] = decode_ahead.export(
                model, cache, call, settings.compilation.compile_mode
            )
    except decode_ahead.FAILURES as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        console.warn(f"this stack cannot compile the decode step ahead of time: {reason[0]}")
    return steps


def describe_warmed(entry: dict) -> str:
    return (
        f"  prompt of {entry['prefill_length']} tokens, cache of {entry['slots']} slots: "
        f"{entry['graphs']} graph(s), {entry['kernels_compiled']} kernel(s) compiled "
        f"in {entry['seconds']:.1f} s"
    )


def report(document: dict, settings: Settings, console: Console) -> None:
    """Print what was saved, and the command that starts from it."""
    from common.tables import markdown_table

    entries = ", ".join(f"{count} {kind}" for kind, count in document["details"]["entries"].items())
    rows = [
        ["artifact", str(settings.files.cache_path)],
        ["size", f"{document['file']['bytes'] / 1e6:.2f} MB"],
        ["entries", entries],
        ["build", f"{document['build_seconds']:.1f} s"],
    ]
    console.result(markdown_table(["saved", ""], rows))
    model = ["--model-id", settings.shared.model_id]
    changed = [
        argument
        for argument in to_argv(settings.compilation, settings.files)
        if argument not in to_argv(CompileFlags(max_cache_len=2048), CacheFileFlags())
    ]
    console.say("start from it with:\n  ./run.sh " + shlex.join([*model, *changed]))


if __name__ == "__main__":
    run_script(main)
