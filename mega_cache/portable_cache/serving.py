"""One run: set up in the mode that the flags name, serve every request, tell."""

from collections.abc import Callable

from common.cli import Console
from common.errors import UsageError
from common.measure import requests
from common.measure.measures import Stages, process_start
from common.model.checkpoint import Checkpoint
from common.model.conversation import converse, wants_conversation
from common.model.tokenizer import Generate, TextCodec, load_codec, prompts_of
from portable_cache import no_collections
from portable_cache.flags import APPROACH, RunSettings
from portable_cache.start.opening import Opened, choose_built_target, open_model


def run(settings: RunSettings, console: Console) -> dict | None:
    """Open the model, serve every request, and return the run's result; a conversation has none."""
    stages, loading = Stages(process_start()), settings.loading
    stages.close("imports")
    with no_collections():
        pair = settings.files.pair()
        target = choose_built_target(settings.shared, pair, console)
        opened = open_model(target, pair, settings.wanted(), console, stages.close)
        codec = load_codec(target.checkpoint)
    if wants_conversation(settings.prompt, settings.shared.json):
        return talk(settings, target.checkpoint, opened, codec)
    prompts = prompts_of(settings.prompt, codec, settings.shared.seed)
    buckets = loading.buckets(opened.flags)

    def padded(prompt: list[int]) -> int:
        return min((bucket for bucket in buckets if bucket >= len(prompt)), default=len(prompt))

    tokens = max(map(padded, prompts)) + settings.prompt.max_new_tokens
    generate = prepare_requests(settings, target.checkpoint, opened, tokens, padded)
    stages.close("compile")
    document = requests.serve_requests(
        APPROACH, loading.mode, settings, target, codec, prompts, generate, stages,
        opened.watch, console,
    )  # fmt: skip
    document["output"]["padded_tokens"] = padded(prompts[0])
    document |= opened.describe(document["compile"], loading.precompile is False)
    requests.print_run(document, console)
    return document


def talk(settings: RunSettings, checkpoint: Checkpoint, opened: Opened, codec: TextCodec) -> None:
    """Hold a conversation in the longest KV cache that is warmed."""
    new_tokens, longest = settings.prompt.max_new_tokens, max(opened.flags.cache_lengths())
    generate = prepare_requests(settings, checkpoint, opened, longest, len)

    def answer(prompt: list[int], on_token: Callable[[int], None]) -> list[int]:
        if len(prompt) + new_tokens > longest:
            raise UsageError(
                f"{len(prompt)} tokens so far and --max-new-tokens {new_tokens} more: the longest "
                f"KV cache has {longest} slots; start a new conversation"
            )
        return generate(prompt, on_token)

    converse(codec, answer)


def prepare_requests(
    settings: RunSettings, checkpoint: Checkpoint, opened: Opened, tokens: int,
    padded: Callable[[list[int]], int],
) -> Generate:  # fmt: skip
    """Return how a prompt is served, over one KV cache that holds so many tokens."""
    # late: its imports wait until the weights are on their way
    from portable_cache.start import generation

    choices, new_tokens = {}, settings.prompt.max_new_tokens
    if not settings.prompt.ignore_eos:
        choices["eos_token_id"] = list(checkpoint.eos_token_ids) or None
    if settings.sampling.temperature:
        choices |= {"do_sample": True, **vars(settings.sampling)}
    flags = opened.flags if opened.watch else None
    generation.configure_generation(opened.model, flags, new_tokens, **choices)
    cache = opened.make_cache(tokens)
    return generation.make_generate(opened.model, cache, settings.shared.seed, padded)
