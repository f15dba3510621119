"""One run, from the process's start to its result: set up, serve every request, tell."""

from dataclasses import dataclass, replace

import torch

from aotinductor.flags import APPROACH, PackageFileFlags, RunSettings
from aotinductor.kv_generation import make_sampler
from aotinductor.lengths import Plan, find_plan, shape_differences
from aotinductor.loading import Engine, load_package
from aotinductor.recipe import find_differences
from common.cli import Console, config_of
from common.compile_counts import Watch, read_counts, watch_compilation
from common.errors import UsageError
from common.manifest import Difference, Manifest
from common.measures import Stages, process_start
from common.prompts import Printer, load_codec, padding_token_id, prompts_of
from common.serve import Generate, run_document, serve_requests
from common.store import fetch
from common.target import Target, choose_target, load_model
from common.toolchain import prepare_toolchain


@dataclass(frozen=True)
class Request:
    """What every request of a run has in common."""

    settings: RunSettings
    target: Target
    plan: Plan
    padding_id: int

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return () if self.settings.prompt.ignore_eos else self.target.checkpoint.eos_token_ids

    def padded(self, length: int) -> int:
        return self.plan.bounds.padded(length, self.settings.loading.bucket_pad)


def run(settings: RunSettings, console: Console) -> dict:
    """Set up, serve every request, and return the run's result."""
    stages = Stages(process_start())
    stages.close("imports")
    settings = with_fetched_package(settings, console)
    plan = find_plan(settings)
    target = choose_target(plan.fill_in(settings.shared), console)
    cuda_graph = wants_cuda_graph(settings, target, plan)
    check_sampling(settings, plan)
    torch.empty(1, device=target.device)  # CUDA's context is there from here on
    stages.close("device")
    codec = load_codec(target.checkpoint.folder)
    prompts = prompts_of(settings.prompt, codec, settings.shared.seed)
    if settings.mode != "eager":
        for prompt in prompts:
            plan.check_request(
                len(prompt), settings.prompt.max_new_tokens, settings.loading.bucket_pad
            )
    request = Request(settings, target, plan, padding_token_id(codec, target.checkpoint))
    loaded, watch = None, None
    if settings.mode == "load":
        loaded = load_package(
            settings.files.pair(), target, plan, settings.trust, cuda_graph,
            request.padded(len(prompts[0])), stages, console,
        )  # fmt: skip
        generate = generate_with(loaded.engine, request)
    else:
        watch, generate = set_up_without(request, cuda_graph, stages, console)
    setup_seconds = stages.elapsed()
    printer = Printer(settings.prompt, codec)
    served = serve_requests(generate, prompts, target, stages, printer, console)
    document = run_document(
        APPROACH, settings.mode, config_of(settings), target, codec, served, setup_seconds, stages,
        read_counts(watch), artifact=loaded.as_json() if loaded else None,
    )  # fmt: skip
    length = len(prompts[0])
    padded = length if settings.mode == "eager" else request.padded(length)
    document["output"]["padded_tokens"] = padded
    return document


def with_fetched_package(settings: RunSettings, console: Console) -> RunSettings:
    """Return the settings with the local copy of a store's package, where --fetch asks for one."""
    if settings.store.fetch is None:
        return settings
    target = choose_target(settings.shared, Console(quiet=True))

    def fits(manifest: Manifest) -> list[Difference]:
        return find_differences(manifest, target) + shape_differences(manifest.recipe, settings)

    pair = fetch(
        settings.files.pair(), settings.store.fetch, APPROACH, fits, settings.trust, console
    )
    return replace(settings, files=PackageFileFlags(pair.path, pair.metadata_path))


def wants_cuda_graph(settings: RunSettings, target: Target, plan: Plan) -> bool:
    """Return whether decode is captured; asking for it where it cannot be is an error."""
    possible = target.device.type == "cuda" and plan.slots is not None
    if settings.loading.cuda_graph and not possible:
        raise UsageError(
            "--cuda-graph captures the decode step of a package with a KV cache on a CUDA GPU: "
            f"this is {'the base graph' if plan.slots is None else 'a CPU'}"
        )
    return possible and settings.loading.cuda_graph is not False


def check_sampling(settings: RunSettings, plan: Plan) -> None:
    if settings.sampling.temperature and settings.mode != "eager" and plan.slots is None:
        raise UsageError(
            "--temperature samples from a package with a KV cache, the base graph is greedy: "
            "build one with ./build.sh --kv-cache, or leave --temperature out"
        )


def generate_with(engine: Engine, request: Request) -> Generate:
    """Return the function that serves a prompt from the engine, with the flags of the run."""
    limits = (request.settings.prompt.max_new_tokens, request.stop_ids)
    if request.plan.slots is None:
        return lambda prompt, on_token: engine.generate(
            prompt, request.padded, request.padding_id, *limits, on_token
        )
    flags = request.settings.sampling

    def generate(prompt, on_token):
        # of each request anew: the same prompt and seed give the same text
        sampler = make_sampler(
            flags.temperature, flags.top_k or None, flags.top_p, request.settings.shared.seed,
            request.target.device,
        )  # fmt: skip
        padded = request.padded(len(prompt))
        return engine.generate(prompt, padded, *limits, on_token, sampler)

    return generate


def set_up_without(
    request: Request, cuda_graph: bool, stages: Stages, console: Console
) -> tuple[Watch | None, Generate]:
    """Return what serves a request without the package: eager, or compiled at runtime."""
    # imported here: they bring the compiler and transformers, which a load does not pay for
    import transformers  # noqa: F401

    from aotinductor.runtime_compile import EagerGenerator, RuntimeCompiler

    settings, plan = request.settings, request.plan
    eager = settings.mode == "eager"
    export = settings.loading.no_preload_method == "export"
    watch = None if eager else watch_compilation()
    if not eager:
        prepare_toolchain(request.target.device, host_code=export, console=console)
    stages.close("imports")
    model = load_model(request.target)
    stages.close("weights")
    if eager:
        engine = EagerGenerator(model, request.padding_id, settings.sampling, settings.shared.seed)
        limits = (settings.prompt.max_new_tokens, request.stop_ids)
        return None, lambda prompt, on_token: engine.generate(prompt, *limits, on_token)
    max_autotune = settings.loading.max_autotune
    if max_autotune is None:  # as the package was built where there is one
        max_autotune = bool(plan.built.get("max_autotune", True))
    compiler = RuntimeCompiler(
        export=export,
        one_dynamic_graph=settings.loading.compile_dynamic_seq_len,
        max_autotune=max_autotune,
        cuda_graph=cuda_graph,
    )
    compiled = compiler.compile(model, plan)
    stages.close("compile")
    return watch, generate_with(compiled, request)
