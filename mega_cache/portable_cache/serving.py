"""One run, top to bottom: load the artifact, make the model, serve the requests."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from common.artifacts import ArtifactPair
from common.cli import Console, config_of
from common.compile_counts import Watch, compiled_kernels, read_counts, watch_compilation
from common.errors import ArtifactMismatchError, ScriptError
from common.prompts import Printer, bucket_for, load_codec, padding_token_id, prompts_of
from common.serve import run_document, serve_requests
from common.stopwatch import Stages, process_start
from common.target import Target, choose_target
from common.weights import list_checkpoint, start_upload
from portable_cache.flags import APPROACH, CompileFlags, LoadFlags, RunSettings
from portable_cache.recipe import settle, shortest_that_holds

if TYPE_CHECKING:
    from portable_cache import loading


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


def run(settings: RunSettings, console: Console) -> dict:
    """Set up, serve every request, and return the run's result."""
    stages = Stages(process_start())
    stages.close("imports")
    target = choose_target(settings.shared, console)
    torch.empty(1, device=target.device)  # opens the device
    stages.close("device")
    # goes on while transformers is imported
    upload = start_upload(list_checkpoint(target.checkpoint.folder), target.device, target.dtype)
    stages.close("weights")
    from portable_cache import generation, hits, loading

    stages.close("imports")
    eager = settings.loading.eager
    codec = load_codec(target.checkpoint.folder)
    prompts = prompts_of(settings.prompt, codec, settings.shared.seed)
    plan = make_plan(settings, [len(prompt) for prompt in prompts], console)
    watch = None if eager else watch_compilation()
    lookups = [] if eager else hits.watch_lookups()
    loaded = load(settings, target, plan, watch, console)
    stages.close("artifact")
    attention = generation.STOCK_ATTENTION if eager else generation.attention.NAME
    model = generation.make_model(target, upload.wait(), attention)
    generation.configure_generation(
        model,
        plan.flags,
        settings.prompt.max_new_tokens,
        () if settings.prompt.ignore_eos else target.checkpoint.eos_token_ids,
        padding_token_id(codec, target.checkpoint),
        settings.sampling,
        eager,
    )
    cache = None if eager else generation.make_cache(model, plan.flags, plan.slots)
    stages.close("weights")
    wanted = settings.loading.precompile
    ahead = loading.use_decode_step(loaded, plan.slots, wanted, model, cache, console)
    if not (eager or ahead):
        generation.import_compiler()
    stages.close("compile")
    setup_seconds = stages.elapsed()
    generate = generation.make_generate(model, cache, settings.shared.seed, plan.padded_length)
    printer = Printer(settings.prompt, codec)
    served = serve_requests(generate, prompts, target, stages, printer, console)
    counts = read_counts(watch)
    document = run_document(
        APPROACH,
        mode_of(settings.loading),
        config_of(settings),
        target,
        codec,
        served,
        setup_seconds,
        stages,
        counts,
        artifact=loaded and loaded.as_json() | {"precompiled": ahead, "slots": plan.slots},
        graphs=[{"cache": one.cache, "key": one.key, "hit": one.hit} for one in lookups],
        misses=hits.missed(lookups, loaded.lookups if loaded else [])
        + hits.made_anew(counts, compiled_kernels(watch) if watch else []),
    )
    document["output"]["padded_tokens"] = plan.padded_length(len(prompts[0]))
    return document


def make_plan(settings: RunSettings, lengths: list[int], console: Console) -> Plan:
    """Choose lengths by what the user says, then the artifact, then the defaults."""
    flags = settle(settings.compilation, settings.files.pair())
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


def load(
    settings: RunSettings, target: Target, plan: Plan, watch: Watch | None, console: Console
) -> "loading.Loaded | None":
    """Load the artifact as the flags say: must, must not, or if it can be."""
    from portable_cache import bundle, loading

    wanted, pair = settings.loading.load_artifacts, settings.files.pair()
    if watch is None:
        return None
    bundle.configure()
    if wanted is False:
        return None
    try:
        check_length(plan, pair)
        return loading.load_artifact(pair, target, plan.flags, settings.trust, watch, console)
    except ScriptError as error:
        if wanted or settings.loading.require_hit:
            raise
        console.warn(f"{error}; compiling instead")
        return None


def check_length(plan: Plan, pair: ArtifactPair) -> None:
    if plan.warmed is None:
        raise ArtifactMismatchError(
            f"prompt and new tokens need {plan.needed} slots, the longest KV cache of {pair.path} "
            f"has {max(plan.flags.cache_lengths())}: shorten them, or rebuild with a larger "
            "--max-cache-len"
        )


def mode_of(flags: LoadFlags) -> str:
    if flags.eager:
        return "eager"
    return "skip" if flags.load_artifacts is False else "load"
