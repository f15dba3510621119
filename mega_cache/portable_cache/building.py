"""One build, top to bottom: warm up every cache length, save, verify, publish."""

import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import Cache, PreTrainedModel

from common.artifacts import ArtifactPair, write_pair
from common.cli import Console
from common.compile_counts import read_counts, watch_compilation
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
from portable_cache.flags import APPROACH, RUN_SCRIPT, BuildSettings
from portable_cache.recipe import recipe
from portable_cache.verification import check_margin, largest_margin

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
        margin = largest_margin(self.eager, prompt, token_ids)
        check_margin(f"a KV cache of {slots} slots", margin, self.target.dtype_name)


def build(settings: BuildSettings, console: Console) -> dict:
    """Warm up, write the artifact and its metadata, and return the build's result."""
    stages = Stages(process_start())
    stages.close("imports")
    bundle.check_caches_are_on()
    bundle.configure()
    bundle.watch()
    target = choose_target(settings.shared, console)
    prepare_toolchain(target.device, host_code=False, console=console)
    watch_compilation()
    lookups = hits.watch_lookups()
    stages.close("device")
    folder = target.checkpoint.folder
    tensors = start_upload(list_checkpoint(folder), target.device, target.dtype).wait()
    model = generation.make_model(target, tensors, attention.NAME)
    eager = generation.make_model(target, tensors, generation.STOCK_ATTENTION)
    builder = Builder(settings, console, target, load_codec(folder), model, eager)
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
        environment=environment(),
        recipe=recipe(settings.compilation, target.device),
        file={},  # known once it is written
        build_seconds=stages.elapsed(),
        details={
            "warmed": warmed,
            "entries": saved.entries,
            "decode_steps": {str(slots): step.contract for slots, step in steps.items()},
            "graphs": [asdict(lookup) for lookup in lookups],
            "verified": settings.build.verify,
        },
    )
    if settings.build.verify:
        verify(builder, manifest, saved.blob)
        stages.close("verify")
    written = write_artifact(settings.files.pair(), manifest, saved.blob)
    return {"kind": "build", "command": sys.argv, "stages": stages.seconds, **asdict(written)}


def warm_up(builder: Builder, cache: Cache, slots: int, length: int) -> dict:
    """Generate once from a prompt of `length` tokens; return what it took and compiled."""
    model, seed, watch = builder.model, builder.settings.shared.seed, watch_compilation()
    prompt = builder.codec.synthetic_prompt(length, seed)
    flags = builder.settings.compilation
    # the second one is the first that is decoded; the last takes no slot
    new_tokens = max(2, min(flags.decode_length, slots - length))
    generation.configure_generation(model, flags, new_tokens)
    before, began = read_counts(watch), time.monotonic()
    token_ids = generation.make_generate(model, cache, seed)(prompt, lambda token_id: None)
    seconds, after = time.monotonic() - began, read_counts(watch)
    graphs, kernels = (after[of] - before[of] for of in ("unique_graphs", "kernels_compiled"))
    builder.console.say(
        f"  cache of {slots} slots, prompt of {length} tokens: {graphs} graph(s), "
        f"{kernels} kernel(s) compiled in {seconds:.1f} s"
    )
    builder.check(slots, prompt, token_ids)
    return {
        "slots": slots, "prompt": length, "seconds": seconds, "unique_graphs": graphs,
        "kernels_compiled": kernels,
    }  # fmt: skip


def compile_ahead(builder: Builder, cache: Cache) -> decode_ahead.ExportedStep | None:
    """Compile the decode step for this cache ahead of time, where this stack can."""
    model = builder.model
    generation.forget_compiled_state(model)
    try:
        call = decode_ahead.capture_decode_call(model, cache)
        return decode_ahead.export(model, cache, call, builder.settings.compilation.compile_mode)
    except (decode_ahead.PrecompileMismatch, *decode_ahead.FAILURES) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        builder.console.warn(f"no decode step compiled ahead, runs will trace: {reason[0]}")
        return None


def verify(builder: Builder, manifest: Manifest, blob: bytes) -> None:
    """Load the artifact in a fresh process per cache length, where everything must hit.

    The tokens of that process must be eager's.
    """
    shared = builder.settings.shared
    with tempfile.TemporaryDirectory(prefix="llama-verify-") as folder:
        pair = ArtifactPair(Path(folder, "cache.bin"), Path(folder, "cache_meta.json"))
        write_artifact(pair, manifest, blob)
        same = [
            f"--model-id={shared.model_id}", f"--device={shared.device}", f"--dtype={shared.dtype}",
            f"--seed={shared.seed}", f"--cache-path={pair.path}", "--trust-artifact",
            "--load-artifacts", "--require-hit", "--ignore-eos",
        ]  # fmt: skip
        lengths = builder.settings.compilation.cache_lengths()
        for slots in builder.console.bar(lengths, "verify in fresh processes", "cache length"):
            new_tokens = min(_VERIFY_TOKENS, slots - 1)
            prompt = builder.codec.synthetic_prompt(slots - new_tokens, shared.seed)
            own = [f"--prompt-length={len(prompt)}", f"--max-new-tokens={new_tokens}"]
            if str(slots) in manifest.details["decode_steps"]:
                own.append("--precompile")
            outcome = run_trial([str(RUN_SCRIPT), *same, *own])
            if not outcome.ok:
                raise ScriptError(f"the artifact does not hit: {outcome.error}")
            builder.check(slots, prompt, outcome.document["output"]["token_ids"])


def write_artifact(pair: ArtifactPair, manifest: Manifest, blob: bytes) -> Manifest:
    return write_pair(
        pair, lambda path: path.write_bytes(blob), lambda record: replace(manifest, file=record)
    )
