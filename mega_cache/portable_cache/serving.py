"""One run, top to bottom: load the artifact, make the model, serve the requests."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from common.artifact import disk
from common.artifact.store import fetch
from common.cli import Console
from common.compiler import toolchain
from common.errors import ScriptError
from common.measure import requests
from common.measure.measures import Stages, process_start
from common.model.target import Target, choose_target
from common.model.tokenizer import TextCodec, load_codec, prompts_of
from portable_cache import tensors
from portable_cache.flags import APPROACH, CacheFileFlags, RunSettings
from portable_cache.recipe import find_differences, settle

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from portable_cache.loading import Compiler


@dataclass(frozen=True)
class Ready:
    """Everything that requests need."""

    target: Target
    codec: TextCodec
    prompts: list[list[int]]
    padded: Callable[[list[int]], int]  # tokens of a prompt with its padding
    compiler: "Compiler | None"  # the eager mode imports nothing of it
    model: "PreTrainedModel"
    cache: "Cache | None"
    generate: requests.Generate


def run(settings: RunSettings, console: Console) -> dict:
    """Set up, serve every request, and return the run's result."""
    stages = Stages(process_start())
    ready = set_up(settings, stages, console)
    compiler = ready.compiler
    document = requests.serve_requests(
        APPROACH, settings.loading.mode, settings, ready.target, ready.codec, ready.prompts,
        ready.generate, stages, compiler and compiler.watch, console,
    )  # fmt: skip
    document["output"]["padded_tokens"] = ready.padded(ready.prompts[0])
    nothing = {"artifact": None, "graphs": [], "misses": []}
    return document | (compiler.describe(document["compile"]) if compiler else nothing)


def set_up(settings: RunSettings, stages: Stages, console: Console) -> Ready:
    """Bring model and artifact into this process."""
    stages.close("imports")
    built = disk.peek_manifest(settings.files.pair()) if settings.loading.mode == "load" else None
    known = built and built.details.get("checkpoint")
    target = choose_target(settings.shared, console, known)
    toolchain.quieten(target.device, console)
    target.checkpoint.require_weights()
    torch.empty(1, device=target.device)  # opens the device
    stages.close("device")
    weights_there = tensors.start_upload(target)
    stages.close("weights")
    # late: the weights are on their way meanwhile
    from portable_cache import generation

    stages.close("imports")
    settings = settle_artifact(settings, target, console)
    loading, flags = settings.loading, settings.compilation
    buckets = (loading.prefill_buckets or flags.prefill_lengths) if loading.bucket_pad else ()

    def padded(prompt: list[int]) -> int:
        return min((bucket for bucket in buckets if bucket >= len(prompt)), default=len(prompt))

    codec = load_codec(target.checkpoint)
    prompts = prompts_of(settings.prompt, codec, settings.shared.seed)
    new_tokens = settings.prompt.max_new_tokens
    slots = flags.slots_for(max(map(padded, prompts)) + new_tokens)
    compiler = cache = None
    if loading.mode != "eager":
        from portable_cache.loading import open_compiler

        compiler = open_compiler(settings, target, slots, console)
    stages.close("artifact")
    attention = generation.attention.NAME if compiler else generation.STOCK_ATTENTION
    model = generation.make_model(target, weights_there(), attention)
    choices = {}
    if not settings.prompt.ignore_eos:
        choices["eos_token_id"] = list(target.checkpoint.eos_token_ids) or None
    if settings.sampling.temperature:
        choices |= {"do_sample": True, **vars(settings.sampling)}
    generation.configure_generation(model, flags if compiler else None, new_tokens, **choices)
    stages.close("weights")
    if compiler:
        cache = generation.make_cache(model, slots)
        compiler.use_decode_step(loading.precompile, model, cache, console)
    stages.close("compile")
    generate = generation.make_generate(model, cache, settings.shared.seed, padded)
    return Ready(target, codec, prompts, padded, compiler, model, cache, generate)


def settle_artifact(settings: RunSettings, target: Target, console: Console) -> RunSettings:
    """Return the settings with what --fetch found, and the untold from artifact or defaults."""
    pair, loading, told = settings.files.pair(), settings.loading, settings.compilation
    unlike = partial(find_differences, target=target, flags=told)
    if loading.mode == "load":
        try:
            pair = fetch(pair, settings.store.fetch, APPROACH, unlike, settings.trust, console)
        except ScriptError as error:
            if loading.must_load:
                raise
            console.warn(f"{error}; compiling instead")
            loading = replace(loading, load_artifacts=False)
    flags = settle(told, disk.peek_manifest(pair))
    return replace(settings, files=CacheFileFlags(*pair), loading=loading, compilation=flags)
