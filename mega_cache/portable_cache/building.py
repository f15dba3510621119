"""One build, top to bottom: warm up every cache length, save, verify, publish."""

import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import Cache, PreTrainedModel

from common.artifacts import ArtifactPair, write_pair
from common.cli import Console, SamplingFlags
from common.compile_counts import Watch, read_counts, watch_compilation
from common.errors import ScriptError
from common.manifest import SCHEMA, Manifest
from common.measures import Stages, process_start
from common.prompts import TextCodec, load_codec
from common.report import environment
from common.target import Target, choose_target
from common.toolchain import prepare_toolchain
from common.trials import run_trial
from common.weights import list_checkpoint, start_upload
from portable_cache import attention, bundle, decode_ahead, generation, hits
from portable_cache.flags import APPROACH, RUN_SCRIPT, BuildSettings, CompileFlags
from portable_cache.recipe import recipe
from portable_cache.verification import check_differences, largest_margin

_VERIFY_TOKENS = 8


def build(settings: BuildSettings, console: Console) -> dict:
    """Warm up, write the artifact and its metadata, and return the build's result."""
    stages = Stages(process_start())
    stages.close("imports")
    bundle.check_caches_are_on()
    bundle.configure()
    bundle.watch()
    target = choose_target(settings.shared, console)
    prepare_toolchain(target.device, host_code=False, console=console)
    watch, lookups = watch_compilation(), hits.watch_lookups()
    stages.close("device")
    stored = list_checkpoint(target.checkpoint.folder)
    tensors = start_upload(stored, target.device, target.dtype).wait()
    model = generation.make_model(target, tensors, attention.NAME)
    eager = generation.make_model(target, tensors, generation.STOCK_ATTENTION)
    codec = load_codec(target.checkpoint.folder)
    stages.close("weights")
    warmed, steps = warm_up_all(model, eager, codec, settings, watch, console)
    saved = bundle.save_bundle({slots: step.content for slots, step in steps.items()})
    stages.close("compile")
    manifest = describe(settings, target, warmed, steps, saved, lookups, stages.elapsed())
    if settings.build.verify:
        margins = verify(manifest, saved.blob, eager, codec, settings, console)
        check_differences(margins, target.dtype_name)
        stages.close("verify")
    written = write_artifact(settings.files.pair(), manifest, saved.blob)
    return {"kind": "build", "command": sys.argv, "stages": stages.seconds, **asdict(written)}


def describe(
    settings: BuildSettings,
    target: Target,
    warmed: list[dict],
    steps: dict[int, decode_ahead.ExportedStep],
    saved: bundle.SavedBundle,
    lookups: list[hits.Lookup],
    seconds: float,
) -> Manifest:
    """Return the metadata, but for what is known of the file once it is written."""
    return Manifest(
        schema=SCHEMA,
        approach=APPROACH,
        model=target.describe_model(),
        environment=environment(),
        recipe=recipe(settings.compilation, target.device),
        file={},
        build_seconds=seconds,
        details={
            "warmed": warmed,
            "entries": saved.entries,
            "decode_steps": {str(slots): step.contract for slots, step in steps.items()},
            "graphs": [asdict(lookup) for lookup in lookups],
            "verified": settings.build.verify,
        },
    )


def warm_up_all(
    model: PreTrainedModel,
    eager: PreTrainedModel,
    codec: TextCodec,
    settings: BuildSettings,
    watch: Watch,
    console: Console,
) -> tuple[list[dict], dict[int, decode_ahead.ExportedStep]]:
    """Compile for each cache length; return what each took, and the steps compiled ahead."""
    flags, seed = settings.compilation, settings.shared.seed
    warmed, margins, steps = [], {}, {}
    wants_steps = settings.build.precompile
    for slots, length in flags.cache_lengths().items():
        generation.forget_compiled_state(model)
        cache = generation.make_cache(model, flags, slots)
        prompt = codec.synthetic_prompt(length, seed)
        entry, token_ids = warm_up(model, cache, prompt, slots, flags, seed, watch)
        warmed.append(entry)
        console.say(describe_warmed(entry))
        margins[f"a KV cache of {slots} slots"] = largest_margin(eager, prompt, token_ids)
        if wants_steps:
            step = compile_ahead(model, cache, flags, console)
            wants_steps = step is not None
            steps |= {slots: step} if step else {}
    check_differences(margins, str(model.dtype).removeprefix("torch."))
    return warmed, steps


def warm_up(
    model: PreTrainedModel,
    cache: Cache,
    prompt: list[int],
    slots: int,
    flags: CompileFlags,
    seed: int,
    watch: Watch,
) -> tuple[dict[str, Any], list[int]]:
    """Generate once; return what it took and compiled, and the new tokens."""
    # the second one is the first that is decoded; the last takes no slot
    new_tokens = max(2, min(flags.decode_length, slots - len(prompt)))
    generation.configure_generation(model, flags, new_tokens, (), 0, SamplingFlags())
    before, began = read_counts(watch), time.monotonic()
    token_ids = generation.make_generate(model, cache, seed)(prompt, lambda token_id: None)
    seconds, after = time.monotonic() - began, read_counts(watch)
    compiled = {name: after[name] - before[name] for name in ("unique_graphs", "kernels_compiled")}
    return {"slots": slots, "prompt": len(prompt), "seconds": seconds, **compiled}, token_ids


def compile_ahead(
    model: PreTrainedModel, cache: Cache, flags: CompileFlags, console: Console
) -> decode_ahead.ExportedStep | None:
    """Compile the decode step for this cache ahead of time, where this stack can."""
    generation.forget_compiled_state(model)
    try:
        call = decode_ahead.capture_decode_call(model, cache)
        return decode_ahead.export(model, cache, call, flags.compile_mode)
    except (decode_ahead.PrecompileMismatch, *decode_ahead.FAILURES) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        console.warn(f"no decode step is compiled ahead of time, runs will trace: {reason[0]}")
        return None


def verify(
    manifest: Manifest,
    blob: bytes,
    eager: PreTrainedModel,
    codec: TextCodec,
    settings: BuildSettings,
    console: Console,
) -> dict[str, float]:
    """Load the artifact in a fresh process per cache length, where everything must hit.

    Returns for each one how far the tokens of that process are from eager's.
    """
    shared, margins = settings.shared, {}
    with tempfile.TemporaryDirectory(prefix="llama-verify-") as folder:
        pair = ArtifactPair(Path(folder, "cache.bin"), Path(folder, "cache_meta.json"))
        write_artifact(pair, manifest, blob)
        same = [
            f"--model-id={shared.model_id}", f"--device={shared.device}", f"--dtype={shared.dtype}",
            f"--seed={shared.seed}", f"--cache-path={pair.path}", "--trust-artifact",
            "--load-artifacts", "--require-hit", "--ignore-eos",
        ]  # fmt: skip
        lengths = settings.compilation.cache_lengths()
        for slots in console.bar(lengths, "verify in fresh processes", "cache length"):
            new_tokens = min(_VERIFY_TOKENS, slots - 1)
            prompt = codec.synthetic_prompt(slots - new_tokens, shared.seed)
            own = [f"--prompt-length={len(prompt)}", f"--max-new-tokens={new_tokens}"]
            if str(slots) in manifest.details["decode_steps"]:
                own.append("--precompile")
            outcome = run_trial([str(RUN_SCRIPT), *same, *own])
            if not outcome.ok:
                raise ScriptError(f"the artifact does not hit: {outcome.error}")
            margins[f"a KV cache of {slots} slots"] = largest_margin(
                eager, prompt, outcome.document["output"]["token_ids"]
            )
    return margins


def write_artifact(pair: ArtifactPair, manifest: Manifest, blob: bytes) -> Manifest:
    return write_pair(
        pair, lambda path: path.write_bytes(blob), lambda record: replace(manifest, file=record)
    )


def describe_warmed(entry: dict) -> str:
    return (
        f"  cache of {entry['slots']} slots, prompt of {entry['prompt']} tokens: "
        f"{entry['unique_graphs']} graph(s), {entry['kernels_compiled']} kernel(s) compiled "
        f"in {entry['seconds']:.1f} s"
    )
