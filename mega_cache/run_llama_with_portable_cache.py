"""Load the portable cache, then serve requests through Hugging Face `generate`.

./run.sh --model-id random:tiny --prompt "Hello"
./run.sh --no-load-artifacts          the same, compiled from nothing
./compare.sh --model-id random:tiny   load against skip, in fresh processes
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from common import cuda, machine
from common.cli import CompareFlags, ComparisonFlags, Console, parse_flags
from common.compiler.caches import private_compiler_caches
from common.errors import ArtifactMismatchError, UsageError, run_script
from common.measure import report
from common.measure.compare import Subject, compare
from common.measure.measures import Stages, process_start
from portable_cache import no_collections
from portable_cache.flags import APPROACH, MODE_WORDS, RUN_SCRIPT, UNTOLD, RunSettings

if TYPE_CHECKING:
    from common.model.checkpoint import Checkpoint
    from common.model.tokenizer import TextCodec
    from portable_cache.start.generation import Generate
    from portable_cache.start.opening import Opened


def main(argv: Sequence[str]) -> None:
    groups = (RunSettings, CompareFlags, ComparisonFlags)
    settings, comparing, results = parse_flags(__doc__, groups, argv, **UNTOLD)
    if comparing.compare_load_vs_skip:
        modes = {mode: MODE_WORDS[mode] for mode in ("load", "skip")}
        compare(Subject(APPROACH, RUN_SCRIPT, modes, argv, settings, comparing, results))
        return
    if results.plot:
        raise UsageError("--plot draws a comparison: add --compare-load-vs-skip")
    console = Console(settings.shared.quiet, settings.shared.verbose)
    machine.spin_less()  # before any library with threads is loaded
    cuda.open_early(settings.shared.device != "cpu")
    with private_compiler_caches():
        document = run(settings, console)
    if document is None:  # a conversation
        return
    report.write_json(document, settings.shared.json)
    if settings.loading.require_hit and document["misses"]:
        raise ArtifactMismatchError("not everything hit: " + " | ".join(document["misses"]))


def run(settings: RunSettings, console: Console) -> dict | None:
    """Open the model, serve every request, and return the run's result; a conversation has none."""
    with no_collections():
        # imported here: --help answers without torch, and bad flags without its seconds
        from common.measure import requests
        from common.model.conversation import wants_conversation
        from common.model.target import choose_target
        from common.model.tokenizer import load_codec, prompts_of
        from portable_cache.start.opening import known_checkpoint, open_model

        stages, loading = Stages(process_start()), settings.loading
        stages.close("imports")
        pair = settings.files.pair()
        known = known_checkpoint(pair) if loading.mode == "load" else None
        target = choose_target(settings.shared, console, known)
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


def talk(
    settings: RunSettings, checkpoint: "Checkpoint", opened: "Opened", codec: "TextCodec"
) -> None:
    """Hold a conversation in the longest KV cache that is warmed."""
    from common.model.conversation import converse

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
    settings: RunSettings, checkpoint: "Checkpoint", opened: "Opened", tokens: int,
    padded: Callable[[list[int]], int],
) -> "Generate":  # fmt: skip
    """Return how a prompt is served, over one KV cache that holds so many tokens."""
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


if __name__ == "__main__":
    run_script(main)
