"""One run, top to bottom: load the artifact, make the model, serve the requests."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from common.artifacts import ArtifactPair, peek_manifest
from common.cli import Console, config_of
from common.compile_counts import Watch, compiled_kernels, read_counts, watch_compilation
from common.errors import ArtifactMismatchError, ScriptError
from common.manifest import Difference, Manifest
from common.measures import Stages, process_start
from common.prompts import (
    Printer,
    TextCodec,
    bucket_for,
    load_codec,
    padding_token_id,
    prompts_of,
)
from common.serve import run_document, serve_requests
from common.store import fetch
from common.target import Target, choose_target
from common.toolchain import prepare_toolchain
from common.weights import list_checkpoint, start_upload
from portable_cache.flags import (
    APPROACH,
    CacheFileFlags,
    CompileFlags,
    LoadFlags,
    RunSettings,
)
from portable_cache.recipe import find_differences, settle, shortest_that_holds

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from portable_cache.hits import Lookup
    from portable_cache.loading import Loaded


@dataclass(frozen=True)
class Plan:
    """What a run compiles for, or finds compiled."""

    flags: CompileFlags
    buckets: tuple[int, ...]  # prompt lengths in tokens to pad to; none: no padding
    needed: int  # tokens that the KV cache must hold
    warmed: int | None  # slots of the artifact's KV cache that holds them

    @property
    def slots(self) -> int:
        return self.warmed or self.needed

    def padded_length(self, length: int) -> int:
        return bucket_for(length, self.buckets) or length


@dataclass(frozen=True)
class Compiler:
    """What the compiled modes look at and load; the eager mode imports nothing of it."""

    watch: Watch
    lookups: "list[Lookup]"
    loaded: "Loaded | None"


@dataclass(frozen=True)
class Ready:
    """Everything that requests need."""

    target: Target
    tensors: dict[str, torch.Tensor]
    codec: TextCodec
    prompts: list[list[int]]
    plan: Plan
    compiler: Compiler | None
    model: "PreTrainedModel"
    cache: "Cache | None"
    precompiled: bool


def run(settings: RunSettings, console: Console) -> dict:
    """Set up, serve every request, and return the run's result."""
    stages = Stages(process_start())
    ready = set_up(settings, stages, console)
    setup_seconds = stages.elapsed()
    from portable_cache.generation import make_generate

    seed, printer = settings.shared.seed, Printer(settings.prompt, ready.codec)
    generate = make_generate(ready.model, ready.cache, seed, ready.plan.padded_length)
    served = serve_requests(generate, ready.prompts, ready.target, stages, printer, console)
    counts = read_counts(ready.compiler and ready.compiler.watch)
    document = run_document(
        APPROACH, mode_of(settings.loading), config_of(settings), ready.target, ready.codec,
        served, setup_seconds, stages, counts, **describe_artifact(ready, counts),
    )  # fmt: skip
    document["output"]["padded_tokens"] = ready.plan.padded_length(len(ready.prompts[0]))
    return document


def set_up(settings: RunSettings, stages: Stages, console: Console) -> Ready:
    """Bring model and artifact into this process."""
    stages.close("imports")
    target = choose_target(settings.shared, console)
    torch.empty(1, device=target.device)  # opens the device
    stages.close("device")
    upload = start_upload(list_checkpoint(target.checkpoint.folder), target.device, target.dtype)
    stages.close("weights")
    # late: the weights are on their way meanwhile
    from portable_cache import generation

    stages.close("imports")
    settings = fetch_artifact(settings, target, console)
    codec = load_codec(target.checkpoint.folder)
    prompts = prompts_of(settings.prompt, codec, settings.shared.seed)
    plan = make_plan(settings, [len(prompt) for prompt in prompts], console)
    compiler = None if settings.loading.eager else open_compiler(settings, target, plan, console)
    stages.close("artifact")
    attention = generation.attention.NAME if compiler else generation.STOCK_ATTENTION
    tensors = upload.wait()
    model = generation.make_model(target, tensors, attention)
    generation.configure_generation(
        model,
        plan.flags,
        settings.prompt.max_new_tokens,
        () if settings.prompt.ignore_eos else target.checkpoint.eos_token_ids,
        padding_token_id(codec, target.checkpoint),
        settings.sampling,
        eager=compiler is None,
    )
    cache = generation.make_cache(model, plan.flags, plan.slots) if compiler else None
    stages.close("weights")
    ahead = compiler is not None and use_decode_step(
        settings, compiler, plan, model, cache, console
    )
    stages.close("compile")
    return Ready(target, tensors, codec, prompts, plan, compiler, model, cache, ahead)


def fetch_artifact(settings: RunSettings, target: Target, console: Console) -> RunSettings:
    """Return the settings with the artifact that --fetch finds in its store, if it is asked for."""
    flags = settings.loading
    if flags.eager or flags.load_artifacts is False:
        return settings

    def unlike(manifest: Manifest) -> list[Difference]:
        return find_differences(manifest, target, settle(settings.compilation, manifest))

    pair = settings.files.pair()
    try:
        found = fetch(pair, settings.store.fetch, APPROACH, unlike, settings.trust, console)
    except ScriptError as error:
        if flags.must_load:
            raise
        console.warn(f"{error}; compiling instead")
        return replace(settings, loading=replace(flags, load_artifacts=False))
    return replace(settings, files=CacheFileFlags(found.path, found.metadata_path))


def make_plan(settings: RunSettings, lengths: list[int], console: Console) -> Plan:
    """Choose lengths by what the user says, then the artifact, then the defaults."""
    flags = settle(settings.compilation, peek_manifest(settings.files.pair()))
    loading = settings.loading
    buckets = (loading.prefill_buckets or flags.prefill_lengths) if loading.bucket_pad else ()
    if buckets and max(lengths) > max(buckets):
        console.warn(
            f"a prompt of {max(lengths)} tokens is longer than the longest prefill length "
            f"({max(buckets)}): it stays unpadded"
        )
    padded = max(bucket_for(length, buckets) or length for length in lengths)
    needed = padded + settings.prompt.max_new_tokens
    return Plan(flags, buckets, needed, shortest_that_holds(flags, needed))


def open_compiler(settings: RunSettings, target: Target, plan: Plan, console: Console) -> Compiler:
    """Set the compiler up, and load the artifact: must, must not, or if it can be."""
    from portable_cache import bundle, hits, loading

    bundle.configure()
    watch, lookups = watch_compilation(), hits.watch_lookups()
    if settings.loading.load_artifacts is False:
        prepare_toolchain(target.device, host_code=False, console=console)
        return Compiler(watch, lookups, None)
    pair = settings.files.pair()
    try:
        check_length(plan, pair)
        loaded = loading.load_artifact(pair, target, plan.flags, settings.trust, watch, console)
    except ScriptError as error:
        if settings.loading.must_load:
            raise
        console.warn(f"{error}; compiling instead")
        prepare_toolchain(target.device, host_code=False, console=console)
        loaded = None
    return Compiler(watch, lookups, loaded)


def check_length(plan: Plan, pair: ArtifactPair) -> None:
    if plan.warmed is None:
        raise ArtifactMismatchError(
            f"prompt and new tokens need {plan.needed} slots, the longest KV cache of {pair.path} "
            f"has {max(plan.flags.cache_lengths())}: shorten them, or rebuild with a larger "
            "--max-cache-len"
        )


def use_decode_step(
    settings: RunSettings,
    compiler: Compiler,
    plan: Plan,
    model: "PreTrainedModel",
    cache: "Cache",
    console: Console,
) -> bool:
    """Return whether `generate` has a decode step from the artifact; else it will trace."""
    from portable_cache import generation, loading

    wanted = settings.loading.precompile
    if loading.use_decode_step(compiler.loaded, plan.slots, wanted, model, cache, console):
        return True
    generation.import_compiler()
    return False


def describe_artifact(ready: Ready, counts: dict[str, int | None]) -> dict:
    """Return what was loaded, what was looked up, and what did not hit."""
    compiler = ready.compiler
    if compiler is None:
        return {"artifact": None, "graphs": [], "misses": []}
    from portable_cache import hits

    loaded = compiler.loaded
    used = {"precompiled": ready.precompiled, "slots": ready.plan.slots}
    missed = hits.missed(compiler.lookups, loaded.lookups if loaded else [])
    return {
        "artifact": loaded.as_json() | used if loaded else None,
        "graphs": [
            {"cache": one.cache, "key": one.key, "hit": one.hit} for one in compiler.lookups
        ],
        "misses": missed + hits.made_anew(counts, compiled_kernels(compiler.watch)),
    }


def mode_of(flags: LoadFlags) -> str:
    if flags.eager:
        return "eager"
    return "skip" if flags.load_artifacts is False else "load"
