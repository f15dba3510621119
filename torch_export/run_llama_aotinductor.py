"""Load the ahead-of-time compiled package, then generate from it: no compiler in the process.

./run.sh --model-id random:tiny --prompt "Hello"
./run.sh --no-load-artifacts          the same graph, compiled at runtime
./compare.sh --model-id random:tiny   load against skip, in fresh processes
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from aotinductor.flags import (
    APPROACH,
    CHECKPOINTS,
    ExpectedShapeFlags,
    LoadFlags,
    PackageFileFlags,
)
from common.cli import parse_flags, to_argv
from common.console import Console
from common.errors import UsageError, run_script
from common.flags import CompareFlags, OutcomeFlags, PlotFlags, PromptFlags, SharedFlags
from common.trust import TrustFlags

if TYPE_CHECKING:
    from aotinductor.base_generation import Prompt
    from aotinductor.loading import Loaded
    from aotinductor.recipe import Plan
    from common.compile_evidence import Watch
    from common.measures import Request
    from common.prompts import TextCodec
    from common.stopwatch import Stages
    from common.targets import Target

    Serve = Callable[[Prompt], tuple[Request, list[int]]]


@dataclass(frozen=True)
class RunSettings:
    """Every flag that a trial of this script is started with, by group."""

    shared: SharedFlags
    prompt: PromptFlags
    loading: LoadFlags
    shape: ExpectedShapeFlags
    files: PackageFileFlags
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
    return None


def run(settings: RunSettings, console: Console) -> dict:
    """Set up, serve every request, and return the run's result."""
    from common.stopwatch import Stages, process_start

    stages = Stages(process_start())
    import torch

    from aotinductor.loading import load_package, server_of
    from aotinductor.recipe import find_plan
    from common.devices import device_memory
    from common.prompts import load_codec
    from common.targets import choose_target

    stages.close("interpreter and imports")
    target = choose_target(settings.shared, CHECKPOINTS, console)
    torch.empty(1, device=target.device)  # CUDA makes its context here
    stages.close("device")
    mode = mode_of(settings)
    plan = find_plan(settings.files, settings.shape, loading=mode == "load")
    cuda_graph = wants_cuda_graph(settings, target, plan)
    codec = load_codec(target.checkpoint.folder)
    prompt = make_prompt(settings, codec, target, plan)
    stages.close("prompt")
    loaded, watch = None, None
    if mode == "load":
        loaded = load_package(
            settings.files.pair(), target, plan, settings.trust, cuda_graph, stages, console
        )
        serve = server_of(loaded.engine, target.device)
    else:
        watch, serve = set_up_without(settings, target, plan, cuda_graph, stages)
    setup_seconds = stages.elapsed()
    served = [
        serve(prompt)
        for _ in console.bar(range(settings.prompt.num_requests), "generate", "request")
    ]
    stages.close("decode")
    # request 1 up to its first token is prefill; all the rest of generation stays decode
    stages.split("decode", "prefill", served[0][0].ttft_seconds or 0.0)
    requests = [request for request, _ in served]
    outputs = [token_ids for _, token_ids in served]
    return {
        **describe_run(settings, prompt, codec, outputs),
        **describe_compilation(loaded, watch),
        **describe_timing(requests, setup_seconds, stages),
        "device_memory": device_memory(target.device),
    }


def mode_of(settings: RunSettings) -> str:
    loading = settings.loading
    return "eager" if loading.eager else "load" if loading.load_artifacts else "skip"


def wants_cuda_graph(settings: RunSettings, target: "Target", plan: "Plan") -> bool:
    """Return whether decode is captured; asking for it where it cannot be is an error."""
    possible = target.device.type == "cuda" and plan.slots is not None
    if settings.loading.cuda_graph and not possible:
        raise UsageError(
            "--cuda-graph captures the decode step of a package with a KV cache on a CUDA GPU: "
            f"this is {'the base graph' if plan.slots is None else 'a CPU'}"
        )
    return possible and settings.loading.cuda_graph is not False


def make_prompt(
    settings: RunSettings, codec: "TextCodec", target: "Target", plan: "Plan"
) -> "Prompt":
    """Return the prompt with its padding; one that the graphs cannot serve is an error."""
    from aotinductor.base_generation import Prompt
    from common.prompts import padding_token_id, prompt_token_ids

    flags, bucket_pad = settings.prompt, settings.loading.bucket_pad
    token_ids = prompt_token_ids(codec, flags, settings.shared.seed)
    if not settings.loading.eager:
        plan.check_request(len(token_ids), flags.max_new_tokens, bucket_pad)
    return Prompt(
        token_ids,
        flags.max_new_tokens,
        () if flags.ignore_eos else target.checkpoint.eos_token_ids,
        padding_token_id(codec, target.checkpoint),
        plan.bounds,
        bucket_pad,
    )


def set_up_without(
    settings: RunSettings, target: "Target", plan: "Plan", cuda_graph: bool, stages: "Stages"
) -> "tuple[Watch | None, Serve]":
    """Return what serves a request without the package: eager, or compiled at runtime."""
    import transformers  # noqa: F401

    from common.compile_evidence import watch_compilation
    from common.models import load_model

    eager = settings.loading.eager
    watch = None if eager else watch_compilation()
    stages.close("more imports")
    model = load_model(target.checkpoint, target.device, target.dtype)
    stages.close("weights")
    if eager:
        from aotinductor import eager_generation

        return watch, lambda prompt: eager_generation.serve(model, prompt)
    from aotinductor.loading import server_of
    from aotinductor.runtime_compile import RuntimeCompiler

    loading = settings.loading
    max_autotune = loading.max_autotune
    if max_autotune is None:  # as the package was built where there is one
        max_autotune = bool(plan.built.get("max_autotune", True))
    compiler = RuntimeCompiler(
        export=loading.no_preload_method == "export",
        one_dynamic_graph=loading.compile_dynamic_seq_len,
        max_autotune=max_autotune,
        cuda_graph=cuda_graph,
    )
    engine = compiler.compile(model, plan)
    stages.close("compile")
    return watch, server_of(engine, target.device)


def describe_run(
    settings: RunSettings, prompt: "Prompt", codec: "TextCodec", outputs: list[list[int]]
) -> dict:
    from common.results import config_of, run_header

    mode = mode_of(settings)
    length = len(prompt.token_ids)
    return {
        **run_header(APPROACH, mode, config_of(settings)),
        "output": {
            "prompt_tokens": length,
            "padded_tokens": length if mode == "eager" else prompt.padded(length),
            "new_tokens": len(outputs[0]),
            "token_ids": outputs[0],
            "text": codec.decode(outputs[0]),
            "requests_identical": all(token_ids == outputs[0] for token_ids in outputs),
        },
        "completions": [codec.decode(token_ids) for token_ids in outputs],
    }


def describe_compilation(loaded: "Loaded | None", watch: "Watch | None") -> dict:
    """Return what was loaded and what the compiler did; in load mode nothing, and it shows."""
    from common.compile_evidence import read_evidence

    return {
        "artifact": loaded.as_json() if loaded else None,
        "compile": asdict(read_evidence(watch)),
    }


def describe_timing(requests: "list[Request]", setup_seconds: float, stages: "Stages") -> dict:
    from common.measures import run_metrics

    return {
        "metrics": run_metrics(requests, setup_seconds, stages.elapsed()),
        "stages": stages.seconds,
        "requests": [asdict(request) for request in requests],
    }


def report(document: dict, settings: RunSettings, console: Console) -> None:
    """Print the completion and the measures."""
    from common.tables import run_table

    texts = document["completions"]
    for text in texts if settings.prompt.show_completions else texts[:1]:
        console.result(text)
    console.result("\n" + run_table(document))


def compare(
    settings: RunSettings,
    comparing: CompareFlags,
    picture: PlotFlags,
    outcome: OutcomeFlags,
    console: Console,
) -> None:
    """Run this very command with and without the package, in fresh processes."""
    from aotinductor.recipe import find_plan
    from common.comparison import check_outcome, run_compare, show_trials
    from common.plots import check_plot, draw
    from common.results import config_of, write_json
    from common.tables import compare_table

    check_plot(picture.plot)

    find_plan(settings.files, settings.shape, loading=True)  # disagreement: before any trial
    document = run_compare(
        APPROACH,
        {
            "load": trial_command(settings, load_artifacts=True, eager=False),
            "skip": trial_command(settings, load_artifacts=False, eager=False),
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
