"""One run: set up in the mode that the flags name, serve every request, tell."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from aotinductor.flags import APPROACH, PackageFileFlags, RunSettings
from aotinductor.lengths import find_plan
from aotinductor.models import refuse_unsupported
from aotinductor.recipe import find_differences
from aotinductor.start.engine import Engine
from aotinductor.start.loading import Opening, choose_library, make_opening
from common.cli import Console
from common.errors import UsageError
from common.measure import requests
from common.measure.measures import Stages, process_start
from common.model.conversation import converse, wants_conversation
from common.model.target import choose_target
from common.model.tokenizer import TokenStreamer, prompts_of


def run(settings: RunSettings, console: Console) -> dict | None:
    """Set up, serve every request, and return the run's result; a conversation has none."""
    stages = Stages(process_start())
    stages.close("imports")
    settings = with_fetched_package(settings, console)
    opening = open_run(settings, console)
    stages.close("device")
    plan, codec = opening.plan, opening.codec
    limits = (settings.prompt.max_new_tokens, settings.sampling.temperature)
    if wants_conversation(settings.prompt, settings.shared.json):
        if settings.mode != "eager":
            plan.check_request(plan.bounds.min_seq_len, *limits)
        generate, *_ = set_up(settings, opening, plan.padded(1), stages, console)
        converse(codec, generate)
        return None
    prompts = prompts_of(settings.prompt, codec, settings.shared.seed)
    if settings.mode != "eager":
        for prompt in prompts:
            plan.check_request(len(prompt), *limits)
    padded = len(prompts[0]) if settings.mode == "eager" else plan.padded(len(prompts[0]))
    generate, artifact, watch = set_up(settings, opening, padded, stages, console)
    document = requests.serve_requests(
        APPROACH, settings.mode, settings, opening.target, codec, prompts, generate, stages, watch,
        console,
    )  # fmt: skip
    document["output"]["padded_tokens"] = padded
    return document | {"artifact": artifact}


def set_up(
    settings: RunSettings, opening: Opening, padded: int, stages: Stages, console: Console
) -> tuple[requests.Generate, Mapping[str, Any] | None, Any]:
    """Return what serves a prompt, what is told of the package, and what watches the compiler.

    `padded`: tokens of the first prompt, with its padding.
    """
    if settings.mode != "load":
        generate, watch = serve_without_package(settings, opening, stages, console)
        return generate, None, watch
    engine = opening.load(console, stages.close, padded)
    return generate_with(engine.tokens, settings), engine.artifact, None


def open_run(settings: RunSettings, console: Console) -> Opening:
    """Return what is known before anything is loaded or compiled; refuse what cannot be."""
    loading, pair = settings.loading, settings.files.pair()
    plan = find_plan(pair, settings.shape, settings.mode == "load", loading.bucket_pad)
    opening = make_opening(pair, settings.shared, settings.trust, plan, console)
    if settings.mode != "eager":
        refuse_unsupported(opening.target.checkpoint, plan.slots is not None)
    if loading.cuda_graph and (opening.target.device != "cuda" or plan.slots is None):
        raise UsageError(
            "--cuda-graph captures the decode step of a package with a KV cache on a CUDA GPU: "
            f"this is {'the base graph' if plan.slots is None else 'a CPU'}"
        )
    return opening._replace(library=loading.library, capture=loading.cuda_graph is not False)


def serve_without_package(
    settings: RunSettings, opening: Opening, stages: Stages, console: Console
) -> tuple[requests.Generate, Any]:
    """Return what serves a prompt in the modes eager and skip, and what watches the compiler."""
    # imported here: they bring transformers, and the compiler, which a load does not pay for
    from aotinductor.build import runtime_compile
    from common.compiler import counts
    from common.model.eager import load_model

    if settings.mode == "skip":
        watch = counts.watch_compilation()
        made = runtime_compile.compile_engine(opening, settings.loading, stages.close, console)
        engine = Engine(made, opening.target, opening.plan, opening.codec, {})
        return generate_with(engine.tokens, settings), watch
    stages.close("imports")
    model = load_model(opening.target)
    stages.close("weights")
    stop_ids = () if settings.prompt.ignore_eos else opening.target.checkpoint.eos_token_ids
    limits = (settings.prompt.max_new_tokens, stop_ids, settings.sampling, settings.shared.seed)

    def generate(prompt: list[int], on_token: Callable[[int], None]) -> list[int]:
        streamer = TokenStreamer(on_token)
        return runtime_compile.generate_eagerly(model, prompt, *limits, streamer)

    return generate, None


def generate_with(tokens: Callable[..., Iterable[int]], settings: RunSettings) -> requests.Generate:
    """Return what serves a prompt with the flags of the run; `tokens` is an engine's."""
    # of each request anew: the same prompt and seed, the same text
    choices: dict[str, Any] = {"max_new_tokens": settings.prompt.max_new_tokens}
    if settings.prompt.ignore_eos:
        choices["stop_ids"] = ()
    if settings.sampling.temperature:
        choices |= vars(settings.sampling) | {"seed": settings.shared.seed}

    def generate(prompt: list[int], on_token: Callable[[int], None]) -> list[int]:
        token_ids = []
        for token_id in tokens(prompt, **choices):
            on_token(token_id)
            token_ids.append(token_id)
        return token_ids

    return generate


def with_fetched_package(settings: RunSettings, console: Console) -> RunSettings:
    """Return the settings with the local copy of a store's package, where --fetch names one."""
    if settings.store.fetch is None:
        return settings
    # imported here: most starts find their package where it was built
    from common.artifact import manifest, store

    asked = settings.shape.given

    def fits(built: manifest.Manifest) -> list[manifest.Difference]:
        # transformers need not be asked what a package was built from
        known = built.details.get("checkpoint")
        target = choose_target(settings.shared, Console(quiet=True), known)
        library = choose_library("auto", built.details)
        return find_differences(built, target, library) + manifest.differences(
            built.recipe, asked, asked
        )

    files, url = settings.files.pair(), settings.store.fetch
    pair = store.fetch(files, url, APPROACH, fits, settings.trust, console)
    return settings.changed(files=PackageFileFlags(pair.path, pair.metadata_path))
