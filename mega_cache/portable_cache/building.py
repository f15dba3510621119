"""One build, top to bottom: warm up every cache length, save, verify, publish."""

import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import Cache, PreTrainedModel

from common import errors
from common.artifact.disk import ArtifactPair, write_pair
from common.artifact.manifest import SCHEMA, Manifest
from common.cli import Console
from common.compiler import counts, toolchain
from common.measure import report, trials
from common.measure.measures import Stages, process_start
from common.model.target import Target, choose_target
from common.model.tokenizer import TextCodec, load_codec
from portable_cache import attention, bundle, decode_ahead, generation, hits, tensors, verification
from portable_cache.flags import APPROACH, RUN_SCRIPT, BuildSettings, CacheFileFlags
from portable_cache.recipe import recipe

_VERIFY_TOKENS = 8


@dataclass(frozen=True)
class Builder:
    """What warm-up and verification work with."""

    settings: BuildSettings
    console: Console
    target: Target
    codec: TextCodec
    model: PreTrainedModel  # to compile
    eager: PreTrainedModel  # transformers' own, over the same weights

    def check(self, slots: int, prompt: list[int], token_ids: list[int]) -> None:
        """Raise ScriptError unless eager would have gone on like this."""
        margin = verification.largest_margin(self.eager, prompt, token_ids)
        what = f"a KV cache of {slots} slots"
        verification.check_margin(what, margin, self.target.dtype)


def build(settings: BuildSettings, console: Console) -> dict:
    """Warm up, write the artifact and its metadata, and return the build's result."""
    stages = Stages(process_start())
    stages.close("imports")
    bundle.check_caches_are_on()
    bundle.configure()
    bundle.watch()
    target = choose_target(settings.shared, console)
    toolchain.quieten(target.device, console)
    target.checkpoint.require_weights()
    toolchain.prepare_toolchain(target.device, host_code=False, console=console)
    counts.watch_compilation()
    lookups = hits.watch_lookups()
    stages.close("device")
    there = tensors.start_upload(target)()
    model = generation.make_model(target, there, attention.NAME)
    eager = generation.make_model(target, there, generation.STOCK_ATTENTION)
    builder = Builder(settings, console, target, load_codec(target.checkpoint), model, eager)
    stages.close("weights")
    warmed, steps, ahead = [], {}, settings.build.precompile
    for slots, length in settings.compilation.cache_lengths().items():
        generation.forget_compiled_state(model)
        cache = generation.make_cache(model, slots)
        warmed.append(warm_up(builder, cache, slots, length))
        if ahead and (step := compile_ahead(builder, cache)):
            steps[slots] = step
        ahead = slots in steps
    saved = bundle.save_bundle({slots: step.content for slots, step in steps.items()})
    stages.close("compile")
    manifest = Manifest(
        schema=SCHEMA,
        approach=APPROACH,
        model=target.describe_model(),
        environment=report.environment(),
        recipe=recipe(settings.compilation, target.device),
        file={},  # known once it is written
        build_seconds=stages.elapsed(),
        details={
            "warmed": warmed,
            "checkpoint": target.checkpoint.resolved,
            "entries": saved.entries,
            "decode_steps": {str(slots): step.contract for slots, step in steps.items()},
            "graphs": [asdict(lookup) for lookup in lookups],
            "verified": settings.build.verify,
        },
    )
    if settings.build.verify:
        verify(builder, manifest, saved.blob)
        stages.close("verify")
    written = asdict(write_artifact(settings.files.pair(), manifest, saved.blob))
    del written["details"]["graphs"]  # thousands of lines that only a run's look-ups ask for
    return {"kind": "build", "command": sys.argv, "stages": stages.seconds, **written}


def warm_up(builder: Builder, cache: Cache, slots: int, length: int) -> dict:
    """Generate once from a prompt of `length` tokens; return what it took and compiled."""
    model, seed, flags = builder.model, builder.settings.shared.seed, builder.settings.compilation
    prompt = builder.codec.synthetic_prompt(length, seed)
    # the second one is the first that is decoded; the last takes no slot
    new_tokens = max(2, min(flags.decode_length, slots - length))
    generation.configure_generation(model, flags, new_tokens)
    generate = generation.make_generate(model, cache, seed)
    watch = counts.watch_compilation()
    before, began = counts.read_counts(watch), time.monotonic()
    token_ids = generate(prompt, lambda token_id: None)
    seconds, after = time.monotonic() - began, counts.read_counts(watch)
    compiled = {name: after[name] - before[name] for name in ("unique_graphs", "kernels_compiled")}
    builder.console.say(
        f"  cache of {slots} slots, prompt of {length} tokens: {compiled['unique_graphs']} "
        f"graph(s), {compiled['kernels_compiled']} kernel(s) compiled in {seconds:.1f} s"
    )
    builder.check(slots, prompt, token_ids)
    return {"slots": slots, "prompt": length, "seconds": seconds, **compiled}


def compile_ahead(builder: Builder, cache: Cache) -> decode_ahead.SavedStep | None:
    """Compile the decode step for this cache ahead of time, where this stack can."""
    generation.forget_compiled_state(builder.model)
    try:
        mode = builder.settings.compilation.compile_mode
        return decode_ahead.export(builder.model, cache, mode)
    except decode_ahead.FAILURES as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        builder.console.warn(f"no decode step compiled ahead, runs will trace: {reason[0]}")
        return None


def verify(builder: Builder, manifest: Manifest, blob: bytes) -> None:
    """Load it in a fresh process per cache length: all must hit, and the tokens be eager's."""
    shared = builder.settings.shared
    with tempfile.TemporaryDirectory(prefix="llama-verify-") as folder:
        files = CacheFileFlags(Path(folder, "cache.bin"))
        write_artifact(files.pair(), manifest, blob)
        same = [
            f"--model-id={shared.model_id}", f"--device={shared.device}", f"--dtype={shared.dtype}",
            f"--seed={shared.seed}", f"--cache-path={files.cache_path}", "--trust-artifact",
            "--load-artifacts", "--require-hit", "--ignore-eos",
        ]  # fmt: skip
        lengths = builder.settings.compilation.cache_lengths()
        for slots in builder.console.bar(lengths, "verify in fresh processes", "cache length"):
            new_tokens = min(_VERIFY_TOKENS, slots - 1)
            prompt = builder.codec.synthetic_prompt(slots - new_tokens, shared.seed)
            own = [f"--prompt-length={len(prompt)}", f"--max-new-tokens={new_tokens}"]
            if str(slots) in manifest.details["decode_steps"]:
                own.append("--precompile")
            outcome = trials.run_trial([str(RUN_SCRIPT), *same, *own])
            if not outcome.ok:
                raise errors.ScriptError(f"the artifact does not hit: {outcome.error}")
            builder.check(slots, prompt, outcome.document["output"]["token_ids"])


def write_artifact(pair: ArtifactPair, manifest: Manifest, blob: bytes) -> Manifest:
    return write_pair(
        pair, lambda path: path.write_bytes(blob), lambda record: replace(manifest, file=record)
    )
