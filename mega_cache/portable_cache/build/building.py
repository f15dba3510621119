"""One build, top to bottom: compile the decode step, warm up every cache length, save, verify."""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

# Before transformers, as in a start: the keys of Inductor's caches name the first module that is
# found to have `torch` (2.11.0 with transformers 5.17.0), and every graph would be missed.
import torch  # noqa: F401
from transformers import Cache, PreTrainedModel

from common import errors
from common.artifact.disk import ArtifactPair, write_pair
from common.artifact.manifest import SCHEMA, Manifest
from common.cli import Console
from common.compiler import counts, toolchain
from common.measure import report, trials
from common.measure.measures import Stages, process_start
from common.model.eager import eager_logits
from common.model.target import Target
from common.model.tokenizer import TextCodec, load_codec
from portable_cache import torch_private
from portable_cache.build import export_step, saving, verify
from portable_cache.flags import APPROACH, RUN_SCRIPT, BuildFlags, CacheFileFlags, CompileFlags
from portable_cache.recipe import recipe
from portable_cache.start import attention, bundle, decode_step, generation, tensors

_VERIFY_TOKENS = 8


@dataclass(frozen=True)
class Builder:
    """What warm-up and verification work with."""

    target: Target
    flags: CompileFlags
    seed: int  # of prompts
    console: Console
    codec: TextCodec
    model: PreTrainedModel  # to compile
    eager: PreTrainedModel  # transformers' own, over the same weights

    def check(self, slots: int, prompt: list[int], token_ids: list[int]) -> None:
        """Raise ScriptError unless eager would have gone on like this."""
        verify.check_choices(f"a KV cache of {slots} slots", self.eager, prompt, token_ids)


def build(
    target: Target, flags: CompileFlags, pair: ArtifactPair, what: BuildFlags, seed: int,
    console: Console,
) -> dict:  # fmt: skip
    """Warm up, write the artifact and its metadata, and return the build's result."""
    stages = Stages(process_start())
    stages.close("imports")
    bundle.check_caches_are_on()
    target.checkpoint.require_weights()
    bundle.configure(target.device)
    toolchain.quieten(target.device, console)
    # the decode step's host code is C++ on CUDA too
    toolchain.prepare_toolchain(target.device, what.precompile, console)
    counts.watch_compilation()
    stages.close("device")
    builder = make_builder(target, flags, seed, console)
    stages.close("weights")
    step = compile_ahead(builder) if what.precompile else None
    stages.close("export")
    # from here on: the step's own kernels are in its library
    saving.watch()
    warmed = []
    # the longest first: sizes of a graph that serves all are tried out for it
    for slots, length in reversed(flags.cache_lengths().items()):
        torch_private.forget_compiled_state(builder.model)
        cache = generation.make_cache(builder.model, slots)
        warmed.insert(0, warm_up(builder, cache, slots, length))
    blob, entries = saving.save_bundle(step.package if step else None)
    stages.close("compile")
    manifest = Manifest(
        schema=SCHEMA,
        approach=APPROACH,
        model=target.describe_model(),
        environment=report.environment(),
        recipe=recipe(flags, target.device),
        file={},  # known once it is written
        build_seconds=stages.elapsed(),
        details={
            "warmed": warmed,
            "checkpoint": target.checkpoint.record,
            "entries": entries,
            "decode_step": step.contract if step else None,
            "verified": what.verify,
        },
    )
    if what.verify:
        verify_starts(builder, manifest, blob)
        stages.close("verify")
    written = write_artifact(pair, manifest, blob)._asdict()
    return {
        "kind": "build", "command": sys.argv, "stages": stages.seconds,
        "shortcomings": torch_private.lost, **written,
    }  # fmt: skip


def make_builder(target: Target, flags: CompileFlags, seed: int, console: Console) -> Builder:
    """Return the model twice over the same weights, to compile and as it is, and its tokenizer."""
    there = tensors.start_upload(target)()
    model = generation.make_model(target, there, attention.NAME)
    generation.make_cache(model, 2)  # refused now, not after a compile
    eager = generation.make_model(target, there, generation.STOCK_ATTENTION)
    codec = load_codec(target.checkpoint)
    eager_logits(eager, codec.synthetic_prompt(16, seed), 1)  # an overflow is told now as well
    return Builder(target, flags, seed, console, codec, model, eager)


def warm_up(builder: Builder, cache: Cache, slots: int, length: int) -> dict:
    """Generate once from a prompt of `length` tokens; return what it took and compiled."""
    model, seed, flags = builder.model, builder.seed, builder.flags
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


def compile_ahead(builder: Builder) -> decode_step.SavedStep | None:
    """Compile the decode step for every cache length ahead of time, where this stack can."""
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    began = time.monotonic()
    try:
        with torch_private.fresh_entries():
            step = export_step.export_step(builder.model, builder.flags, folder)
    except errors.ScriptError as error:
        torch_private.lost.append(f"no decode step compiled ahead, runs will trace: {error}")
        return None
    builder.console.say(f"  decode step compiled ahead in {time.monotonic() - began:.1f} s")
    return step


def verify_starts(builder: Builder, manifest: Manifest, blob: bytes) -> None:
    """Load it in fresh processes, for the shortest and the longest KV cache, and each that has a
    graph of its own: all must hit, and the tokens be eager's.
    """
    target, step = builder.target, manifest.details["decode_step"]
    with tempfile.TemporaryDirectory(prefix="llama-verify-") as folder:
        files = CacheFileFlags(Path(folder, "cache.bin"))
        write_artifact(files.pair(), manifest, blob)
        same = [
            f"--model-id={target.checkpoint.model_id}", f"--device={target.device}",
            f"--dtype={target.dtype}", f"--seed={builder.seed}",
            f"--cache-path={files.cache_path}", "--trust-artifact", "--load-artifacts",
            "--require-hit", "--ignore-eos", "--precompile" if step else "--no-precompile",
        ]  # fmt: skip
        lengths = list(builder.flags.cache_lengths())
        if step:  # one library for all of them
            lengths = sorted({lengths[0], lengths[-1]})
        for slots in builder.console.bar(lengths, "verify in fresh processes", "cache length"):
            new_tokens = min(_VERIFY_TOKENS, slots - 1)
            prompt = builder.codec.synthetic_prompt(slots - new_tokens, builder.seed)
            own = [f"--prompt-length={len(prompt)}", f"--max-new-tokens={new_tokens}"]
            outcome = trials.run_trial([str(RUN_SCRIPT), *same, *own])
            if not outcome.ok:
                raise errors.ScriptError(f"the artifact does not hit: {outcome.error}")
            builder.check(slots, prompt, outcome.document["output"]["token_ids"])


def write_artifact(pair: ArtifactPair, manifest: Manifest, blob: bytes) -> Manifest:
    return write_pair(
        pair, lambda path: path.write_bytes(blob), lambda record: manifest._replace(file=record)
    )
