"""Load the portable cache, then serve requests through Hugging Face `generate`.

./run.sh --model-id random:tiny --prompt "Hello"
./run.sh --no-load-artifacts          the same, compiled from nothing
./compare.sh --model-id random:tiny   load against skip, in fresh processes
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from common.cli import parse_flags, to_argv
from common.console import Console
from common.errors import ArtifactMismatchError, ScriptError, UsageError, run_script
from common.flags import (
    CompareFlags,
    OutcomeFlags,
    PlotFlags,
    PromptFlags,
    SamplingFlags,
    SharedFlags,
)
from common.trust import TrustFlags
from portable_cache.flags import APPROACH, CHECKPOINTS, CacheFileFlags, CompileFlags, LoadFlags

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from common.compile_evidence import Watch
    from common.prompts import TextCodec
    from common.targets import Target
    from portable_cache.generation import Prompt
    from portable_cache.loading import Loaded


@dataclass(frozen=True)
class RunSettings:
    """Every flag that a trial of this script is started with, by group."""

    shared: SharedFlags
    prompt: PromptFlags
    sampling: SamplingFlags
    loading: LoadFlags
    compilation: CompileFlags
    files: CacheFileFlags
    trust: TrustFlags


def main(argv: Sequence[str]) -> None:
    groups = (RunSettings, CompareFlags, PlotFlags, OutcomeFlags)
    settings, comparing, picture, outcome = parse_flags(__doc__, groups, argv)
    console = Console(settings.shared.quiet)
    if comparing.compare_load_vs_skip:
        return compare(settings, comparing, picture, outcome, console)
    if picture.plot:
        raise UsageError("--plot draws a comparison: add --compare-load-vs-skip")
    # imported late: --help answers without torch, and bad flags without its seconds
    from common.results import write_json
    from common.trials import private_compiler_caches

    with private_compiler_caches():
        document = run(settings, console)
    write_json(document, settings.shared.json)
    report(document, settings, console)
    if settings.loading.require_hit and document["misses"]:
        raise ArtifactMismatchError("not everything hit: " + " | ".join(document["misses"]))
    return None


def run(settings: RunSettings, console: Console) -> dict:
    """Set up, serve every request, and return the run's result."""
    from common.stopwatch import Stages, process_start

    stages = Stages(process_start())
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from common.compile_evidence import watch_compilation
    from common.devices import device_memory
    from common.prompts import load_codec
    from common.targets import choose_target
    from portable_cache import bundle, generation
    from portable_cache.loading import use_decode_step

    stages.close("interpreter and imports")
    target = choose_target(settings.shared, CHECKPOINTS, console)
    codec = load_codec(target.checkpoint.folder)
    prompt = make_prompt(settings, codec, target, console)
    stages.close("prompt")
    watch = None
    if not settings.loading.eager:
        bundle.configure()
        watch = watch_compilation()
    loaded = load(settings, target, prompt, watch, console)
    stages.close("artifact")
    model = make_model(settings, target, prompt)
    cache = make_cache(model, settings, prompt)
    stages.close("model")
    precompiled = use_decode_step(loaded, settings.loading.precompile, model, cache, console)
    if watch is not None and not precompiled:
        import torch._inductor.compile_fx  # noqa: F401  else request 1 pays for this import
    stages.close("compiler")
    setup_seconds = stages.elapsed()
    served = [
        generation.serve(model, prompt, cache, settings.shared.seed)
        for _ in console.bar(range(settings.prompt.num_requests), "generate", "request")
    ]
    stages.close("generation")
    requests = [request for request, _ in served]
    outputs = [token_ids for _, token_ids in served]
    return {
        **describe_run(settings, prompt, codec, outputs),
        **describe_compilation(loaded, watch, precompiled),
        **describe_timing(requests, setup_seconds, stages),
        "device_memory": device_memory(target.device),
    }


def make_prompt(
    settings: RunSettings, codec: "TextCodec", target: "Target", console: Console
) -> "Prompt":
    """Return the prompt, padded to a warmed length where that is asked for."""
    from common.prompts import bucket_for, padding_token_id, prompt_token_ids
    from portable_cache.generation import Prompt
    from portable_cache.loading import warmed_lengths

    flags, compilation = settings.prompt, settings.compilation
    token_ids = prompt_token_ids(codec, flags, settings.shared.seed)
    length, slots = len(token_ids), compilation.max_cache_len
    padding = 0
    if slots and length + flags.max_new_tokens > slots:
        raise UsageError(
            f"{length} prompt tokens + {flags.max_new_tokens} new ones need more than the "
            f"{slots} slots of --max-cache-len: shorten them, or rebuild with a larger one"
        )
    if settings.loading.bucket_pad and not slots:
        buckets = settings.loading.prefill_buckets or warmed_lengths(settings.files.pair())
        bucket = bucket_for(length, buckets)
        if bucket is not None:
            padding = bucket - length
        elif buckets:
            console.warn(
                f"the prompt has {length} tokens, more than the longest warmed length "
                f"({max(buckets)}): it runs unpadded and will have to compile"
            )
    return Prompt(token_ids, padding, padding_token_id(codec, target.checkpoint))


def load(
    settings: RunSettings,
    target: "Target",
    prompt: "Prompt",
    watch: "Watch | None",
    console: Console,
) -> "Loaded | None":
    """Load the artifact as the flags say: must, must not, or if it can be."""
    from portable_cache.loading import load_artifact

    wanted = settings.loading.load_artifacts
    if settings.loading.eager or wanted is False:
        return None
    try:
        return load_artifact(
            settings.files.pair(), target, settings.compilation, prompt.padded_length,
            settings.trust, watch, console,
        )  # fmt: skip
    except ScriptError as error:
        if wanted or settings.loading.require_hit:
            raise
        console.warn(f"{error}; compiling instead")
        return None


def make_model(settings: RunSettings, target: "Target", prompt: "Prompt") -> "PreTrainedModel":
    from common.models import load_model
    from portable_cache.generation import configure_generation

    model = load_model(target.checkpoint, target.device, target.dtype)
    configure_generation(
        model,
        settings.compilation,
        settings.prompt.max_new_tokens,
        () if settings.prompt.ignore_eos else target.checkpoint.eos_token_ids,
        prompt.padding_id,
        settings.sampling.temperature,
        settings.loading.eager,
    )
    return model


def make_cache(model: "PreTrainedModel", settings: RunSettings, prompt: "Prompt") -> "Cache | None":
    """Return the static cache of the compiled modes; eager uses `generate`'s own, growing one."""
    from portable_cache import generation

    if settings.loading.eager:
        return None
    flags = settings.compilation
    slots = generation.slots_for(flags, prompt.padded_length, settings.prompt.max_new_tokens)
    return generation.make_cache(model, flags, slots)


def describe_run(
    settings: RunSettings, prompt: "Prompt", codec: "TextCodec", outputs: list[list[int]]
) -> dict:
    from common.results import config_of, run_header

    loading = settings.loading
    mode = "eager" if loading.eager else "skip" if loading.load_artifacts is False else "load"
    return {
        **run_header(APPROACH, mode, config_of(settings)),
        "output": {
            "prompt_tokens": len(prompt.token_ids),
            "padded_tokens": prompt.padded_length,
            "new_tokens": len(outputs[0]),
            "token_ids": outputs[0],
            "text": codec.decode(outputs[0]),
            "requests_identical": all(token_ids == outputs[0] for token_ids in outputs),
        },
        "completions": [codec.decode(token_ids) for token_ids in outputs],
    }


def describe_compilation(loaded: "Loaded | None", watch: "Watch | None", precompiled: bool) -> dict:
    """Return what was loaded, what the compiler did, and per graph whether it hit."""
    from common.compile_evidence import missed, read_evidence

    graphs = watch.graphs if watch else []
    return {
        "artifact": loaded.as_json() | {"precompiled": precompiled} if loaded else None,
        "compile": asdict(read_evidence(watch)),
        "graphs": [{"cache": g.cache, "key": g.key, "hit": g.hit} for g in graphs],
        "misses": missed(graphs, loaded.graphs if loaded else []),
    }


def describe_timing(requests: list, setup_seconds: float, stages) -> dict:
    from common.measures import run_metrics

    return {
        "metrics": run_metrics(requests, setup_seconds, stages.elapsed()),
        "stages": stages.seconds,
        "requests": [asdict(request) for request in requests],
    }


def report(document: dict, settings: RunSettings, console: Console) -> None:
    """Print the completion and the measures, and per graph hit or miss."""
    from common.tables import run_table

    texts = document["completions"]
    for text in texts if settings.prompt.show_completions else texts[:1]:
        console.result(text)
    console.result("\n" + run_table(document))
    for graph in document["graphs"]:
        found = "hit" if graph["hit"] else "miss"
        console.say(f"  {graph['cache']} {graph['key'][:12]}: {found}")


def compare(
    settings: RunSettings,
    comparing: CompareFlags,
    picture: PlotFlags,
    outcome: OutcomeFlags,
    console: Console,
) -> None:
    """Run this very command with and without the artifact, in fresh processes."""
    from common.comparison import check_outcome, run_compare, show_trials
    from common.plots import check_plot, draw
    from common.results import config_of, write_json
    from common.tables import compare_table

    check_plot(picture.plot)

    document = run_compare(
        APPROACH,
        {
            "load": trial_command(settings, load_artifacts=True),
            "skip": trial_command(
                settings, load_artifacts=False, precompile=None, require_hit=False
            ),
        },
        comparing.compare_runs,
        config_of(settings, comparing),
        console,
    )
    write_json(document, settings.shared.json)
    draw(document, picture.plot)
    show_trials(document, settings.prompt.show_completions, console)
    console.result(compare_table(document))
    check_outcome(document, outcome.tokens_may_differ)


def trial_command(settings: RunSettings, **loading: bool) -> list[str]:
    """Return the command of one trial: this script with these flags, loading changed."""
    trial = replace(
        settings,
        loading=replace(settings.loading, **loading),
        # a trial writes its own result file and stays quiet: its parent adds both
        shared=replace(settings.shared, json=None, quiet=False),
    )
    return [__file__, *to_argv(trial)]


if __name__ == "__main__":
    run_script(main)
