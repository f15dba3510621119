"""One run, from the process's start to its result: set up, serve every request, tell."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from aotinductor.flags import APPROACH, PackageFileFlags, RunSettings
from aotinductor.kv_generation import Sampler
from aotinductor.lengths import Plan, find_plan
from aotinductor.loading import load_package
from aotinductor.models import refuse_unsupported
from aotinductor.recipe import find_differences
from common import errors
from common.artifact import manifest, store
from common.cli import Console, SamplingFlags
from common.compiler import counts
from common.measure import requests
from common.measure.measures import Stages, process_start
from common.model.target import Target, choose_target
from common.model.tokenizer import load_codec, prompts_of


def run(settings: RunSettings, console: Console) -> dict:
    """Set up, serve every request, and return the run's result."""
    stages = Stages(process_start())
    stages.close("imports")
    settings = with_fetched_package(settings, console)
    plan = find_plan(settings)
    target = choose_target(plan.fill_in(settings.shared), console, plan.checkpoint)
    if settings.mode != "eager":
        refuse_unsupported(target.checkpoint, plan.slots is not None)
    cuda_graph = wants_cuda_graph(settings, target, plan)
    if settings.sampling.temperature and settings.mode != "eager" and plan.slots is None:
        raise errors.UsageError(
            "--temperature samples from a package with a KV cache, the base graph is greedy: "
            "build one with ./build.sh --kv-cache, or leave --temperature out"
        )
    torch.empty(1, device=target.device)  # CUDA's context is there from here on
    stages.close("device")
    codec = load_codec(target.checkpoint)
    prompts = prompts_of(settings.prompt, codec, settings.shared.seed)
    padded, bucket_pad = len(prompts[0]), settings.loading.bucket_pad
    if settings.mode != "eager":
        for prompt in prompts:
            plan.check_request(len(prompt), settings.prompt.max_new_tokens, bucket_pad)
        padded = plan.bounds.padded(padded, bucket_pad)
    artifact = watch = None
    if settings.mode == "load":
        engine, artifact = load_package(settings, target, plan, cuda_graph, padded, stages, console)
    else:
        if settings.mode == "skip":
            watch = counts.watch_compilation()
        # imported here: it brings the compiler and transformers, which a load does not pay for
        from aotinductor.runtime_compile import serve_without_package

        engine = serve_without_package(settings, target, plan, cuda_graph, stages, console)
    generate = generate_with(engine, settings, target, plan)
    document = requests.serve_requests(
        APPROACH, settings.mode, settings, target, codec, prompts, generate, stages, watch, console
    )
    document["output"]["padded_tokens"] = padded
    return document | {"artifact": artifact}


def with_fetched_package(settings: RunSettings, console: Console) -> RunSettings:
    """Return the settings with the local copy of a store's package, where --fetch names one."""
    if settings.store.fetch is None:
        return settings
    target = choose_target(settings.shared, Console(quiet=True))
    asked = settings.shape.given

    def fits(built: manifest.Manifest) -> list[manifest.Difference]:
        return find_differences(built, target) + manifest.differences(built.recipe, asked, asked)

    files, url = settings.files.pair(), settings.store.fetch
    pair = store.fetch(files, url, APPROACH, fits, settings.trust, console)
    return replace(settings, files=PackageFileFlags(pair.path, pair.metadata_path))


def wants_cuda_graph(settings: RunSettings, target: Target, plan: Plan) -> bool:
    """Return whether decode is captured; asking for it where it cannot be is an error."""
    possible = target.device.type == "cuda" and plan.slots is not None
    if settings.loading.cuda_graph and not possible:
        raise errors.UsageError(
            "--cuda-graph captures the decode step of a package with a KV cache on a CUDA GPU: "
            f"this is {'the base graph' if plan.slots is None else 'a CPU'}"
        )
    return possible and settings.loading.cuda_graph is not False


def generate_with(engine, settings: RunSettings, target: Target, plan: Plan) -> requests.Generate:
    """Return what serves a prompt with the flags of the run; eager's engine is the model itself."""
    sampling, seed = settings.sampling, settings.shared.seed
    stop_ids = () if settings.prompt.ignore_eos else target.checkpoint.eos_token_ids
    limits = (settings.prompt.max_new_tokens, stop_ids)
    padded = partial(plan.bounds.padded, bucket_pad=settings.loading.bucket_pad)

    def generate(prompt: list[int], on_token: Callable[[int], None]) -> list[int]:
        if settings.mode == "eager":
            return generate_eagerly(engine, prompt, *limits, on_token, sampling, seed)
        if plan.slots is None:
            return engine.generate(prompt, padded, *limits, on_token)
        sampler = None
        if sampling.temperature:  # of each request anew: the same prompt and seed, the same text
            sampler = Sampler(sampling, torch.Generator(target.device).manual_seed(seed))
        return engine.generate(prompt, padded(len(prompt)), *limits, on_token, sampler)

    return generate


def generate_eagerly(
    model, prompt: list[int], max_new_tokens: int, stop_ids: Sequence[int],
    on_token: Callable[[int], None], sampling: SamplingFlags, seed: int,
) -> list[int]:  # fmt: skip
    """Return the new tokens of Hugging Face `generate` as it is, without any compilation."""
    from transformers import GenerationConfig

    ids = torch.tensor([prompt], device=model.device)  # (1, prompt) int64
    # every choice is set, so that none is left to the checkpoint's own defaults
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,  # of one sequence none is padded
        do_sample=sampling.temperature > 0,
        **vars(sampling) if sampling.temperature else {},
    )
    torch.manual_seed(seed)
    streamer, mask = requests.TokenStreamer(on_token), torch.ones_like(ids)
    # (1, prompt + new_tokens) int64
    output = model.generate(ids, attention_mask=mask, disable_compile=True, streamer=streamer)
    return output[0, ids.shape[1] :].tolist()
