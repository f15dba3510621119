"""One run, from the process's start to its result: set up, serve every request, tell."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from aotinductor.base import BaseGenerator
from aotinductor.flags import APPROACH, PackageFileFlags, RunSettings
from aotinductor.kv_generation import Generator, make_sampler
from aotinductor.lengths import Plan, find_plan, shape_differences
from aotinductor.loading import load_package
from aotinductor.recipe import find_differences
from common import compile_counts, serve
from common.cli import Console, SamplingFlags
from common.errors import UsageError
from common.manifest import Difference, Manifest
from common.measures import Stages, process_start
from common.prompts import load_codec, padding_token_id, prompts_of
from common.store import fetch
from common.target import Target, choose_target, load_model
from common.toolchain import prepare_toolchain


def run(settings: RunSettings, console: Console) -> dict:
    """Set up, serve every request, and return the run's result."""
    stages = Stages(process_start())
    stages.close("imports")
    if settings.store.fetch is not None:
        settings = with_fetched_package(settings, console)
    plan = find_plan(settings)
    target = choose_target(plan.fill_in(settings.shared), console)
    cuda_graph = wants_cuda_graph(settings, target, plan)
    if settings.sampling.temperature and settings.mode != "eager" and plan.slots is None:
        raise UsageError(
            "--temperature samples from a package with a KV cache, the base graph is greedy: "
            "build one with ./build.sh --kv-cache, or leave --temperature out"
        )
    torch.empty(1, device=target.device)  # CUDA's context is there from here on
    stages.close("device")
    codec = load_codec(target.checkpoint.folder)
    prompts = prompts_of(settings.prompt, codec, settings.shared.seed)
    padded, bucket_pad = len(prompts[0]), settings.loading.bucket_pad
    if settings.mode != "eager":
        for prompt in prompts:
            plan.check_request(len(prompt), settings.prompt.max_new_tokens, bucket_pad)
        padded = plan.bounds.padded(padded, bucket_pad)
    artifact = watch = None
    if settings.mode == "load":
        engine, artifact = load_package(
            settings.files.pair(), target, plan, settings.trust, cuda_graph, padded, stages, console
        )
    else:
        if settings.mode == "skip":
            watch = compile_counts.watch_compilation()
        engine = without_package(settings, target, plan, cuda_graph, stages, console)
    padding_id = padding_token_id(codec, target.checkpoint)
    generate = generate_with(engine, settings, target, plan, padding_id)
    document = serve.serve_requests(
        APPROACH, settings.mode, settings, target, codec, prompts, generate, stages, watch, console
    )
    document["output"]["padded_tokens"] = padded
    return document | {"artifact": artifact}


def with_fetched_package(settings: RunSettings, console: Console) -> RunSettings:
    """Return the settings with the local copy of the store's package."""
    target = choose_target(settings.shared, Console(quiet=True))

    def fits(manifest: Manifest) -> list[Difference]:
        return find_differences(manifest, target) + shape_differences(manifest.recipe, settings)

    files, url = settings.files.pair(), settings.store.fetch
    pair = fetch(files, url, APPROACH, fits, settings.trust, console)
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


def without_package(
    settings: RunSettings, target: Target, plan: Plan, cuda_graph: bool, stages: Stages,
    console: Console,
):  # fmt: skip
    """Return what serves without the package: transformers' model, or its graphs compiled here."""
    # imported here: they bring the compiler and transformers, which a load does not pay for
    import transformers  # noqa: F401

    from aotinductor.runtime_compile import compile_at_runtime

    if settings.mode == "skip":
        export = settings.loading.no_preload_method == "export"
        prepare_toolchain(target.device, host_code=export, console=console)
    stages.close("imports")
    model = load_model(target)
    stages.close("weights")
    if settings.mode == "eager":
        return model
    engine = compile_at_runtime(model, plan, settings.loading, cuda_graph)
    stages.close("compile")
    return engine


def generate_with(
    engine, settings: RunSettings, target: Target, plan: Plan, padding_id: int
) -> serve.Generate:
    """Return the function that serves a prompt with the flags of the run.

    The engine is a package's, or transformers' model as it is.
    """
    sampling, seed = settings.sampling, settings.shared.seed
    stop_ids = () if settings.prompt.ignore_eos else target.checkpoint.eos_token_ids
    limits = (settings.prompt.max_new_tokens, stop_ids)

    def padded(length: int) -> int:
        return plan.bounds.padded(length, settings.loading.bucket_pad)

    def generate(prompt: list[int], on_token: Callable[[int], None]) -> list[int]:
        if isinstance(engine, BaseGenerator):
            return engine.generate(prompt, padded, padding_id, *limits, on_token)
        if not isinstance(engine, Generator):
            return generate_eagerly(engine, prompt, padding_id, *limits, on_token, sampling, seed)
        # of each request anew: the same prompt and seed give the same text
        sampler = make_sampler(**asdict(sampling), seed=seed, device=target.device)
        return engine.generate(prompt, padded(len(prompt)), *limits, on_token, sampler)

    return generate


def generate_eagerly(
    model, prompt: list[int], padding_id: int, max_new_tokens: int, stop_ids: Sequence[int],
    on_token: Callable[[int], None], sampling: SamplingFlags, seed: int,
) -> list[int]:  # fmt: skip
    """Return the new tokens of Hugging Face `generate` as it is, without any compilation."""
    from transformers import GenerationConfig

    ids = torch.tensor([prompt], device=model.device)  # (1, prompt) int64
    # every choice is set, so that none is left to the checkpoint's own defaults
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=padding_id,
        do_sample=sampling.temperature > 0,
        **asdict(sampling) if sampling.temperature else {},
    )
    torch.manual_seed(seed)
    streamer, mask = serve.TokenStreamer(on_token), torch.ones_like(ids)
    # (1, prompt + new_tokens) int64
    output = model.generate(ids, attention_mask=mask, disable_compile=True, streamer=streamer)
    return output[0, ids.shape[1] :].tolist()
