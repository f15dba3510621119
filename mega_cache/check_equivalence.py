"""Check that a loaded artifact is the same model: equal tokens, and how far the logits are off.

    ./check_equivalence.sh --model-id random:tiny
    ./check_equivalence.sh --model-id random:3b --no-check-tokens

Tokens are checked on an artifact of random:tiny made for it; logits on the artifact at hand.
"""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from measure import artifact_flags
from run_llama_with_portable_cache import RunSettings, load, make_cache, make_model

from common.console import Console
from common.equivalence import EquivalenceFlags, Kind, compare_logits, main
from common.errors import run_script
from portable_cache.flags import APPROACH, CHECKPOINTS

if TYPE_CHECKING:
    import torch

    from common.equivalence import Engine
    from common.targets import Target


def check_logits(settings: RunSettings, flags: EquivalenceFlags, console: Console) -> dict:
    from common.targets import choose_target

    target = choose_target(settings.shared, CHECKPOINTS, console)
    return compare_logits(
        target.checkpoint,
        target.device,
        target.dtype,
        flags,
        lambda: make_engine(settings, target, console),
        settings.shared.seed,
    )


def make_engine(settings: RunSettings, target: "Target", console: Console) -> "Engine | None":
    """Return the logits of `generate` with the artifact loaded, led along the forced tokens."""
    import torch

    from common.compile_evidence import watch_compilation
    from portable_cache.generation import Prompt
    from portable_cache.loading import use_decode_step

    if not settings.compilation.max_cache_len:
        console.warn("no logits of the artifact: they need one cache for all (--max-cache-len)")
        return None
    settings = replace(
        settings,
        loading=replace(settings.loading, load_artifacts=True),
        prompt=replace(settings.prompt, ignore_eos=True),
    )
    any_prompt = Prompt([0], 0, 0)  # with one cache for all, no setting hangs on the prompt
    loaded = load(settings, target, any_prompt, watch_compilation(), console)
    model = make_model(settings, target, any_prompt)
    cache = make_cache(model, settings, any_prompt)
    use_decode_step(loaded, settings.loading.precompile, model, cache, console)

    def logits(prompt: list[int], forced: list[int]) -> torch.Tensor:
        cache.reset()
        ids = torch.tensor([prompt], device=target.device)  # (1, prompt) int64
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=len(forced),
            logits_processor=[lead_along(len(prompt), forced)],
            output_logits=True,  # as the model gave them, before the processor
            return_dict_in_generate=True,
        )
        return torch.cat(output.logits).float().cpu()  # (forced, vocab)

    return logits


def lead_along(prompt_length: int, forced: list[int]):
    """Return a logits processor that leaves only the next forced token."""

    def process(ids: "torch.Tensor", scores: "torch.Tensor") -> "torch.Tensor":
        only = scores.new_full(scores.shape, float("-inf"))
        only[:, forced[ids.shape[1] - prompt_length]] = 0.0
        return only

    return process


if __name__ == "__main__":
    kind = Kind(APPROACH, RunSettings, artifact_flags, check_logits)
    run_script(partial(main, kind, __doc__))
