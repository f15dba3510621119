"""Check that a loaded package is the same model: equal tokens, and how far the logits are off.

    ./check_equivalence.sh --model-id random:tiny
    ./check_equivalence.sh --model-id random:3b --no-check-tokens

Tokens are checked on a package of random:tiny made for it; logits on the package at hand.
"""

from functools import partial
from typing import TYPE_CHECKING

from aotinductor.flags import APPROACH, CHECKPOINTS
from common.console import Console
from common.equivalence import EquivalenceFlags, Kind, compare_logits, main
from common.errors import run_script
from measure import artifact_flags
from run_llama_aotinductor import RunSettings

if TYPE_CHECKING:
    from aotinductor.recipe import Target
    from common.equivalence import Engine


def check_logits(settings: RunSettings, flags: EquivalenceFlags, console: Console) -> dict:
    from aotinductor.recipe import choose_target

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
    """Return the logits of the base package, in one pass over prompt and forced tokens.

    The seam for further graphs: one that keeps a KV cache returns its own engine here, or None.
    """
    import torch
    from aotinductor.base_generation import pad_right
    from aotinductor.loading import load_package
    from aotinductor.recipe import find_bounds

    bounds, built = find_bounds(settings.files, settings.shape, loading=True)
    if built.get("kv_cache"):
        console.warn("no logits of the package: its graphs do not give them")
        return None
    loaded = load_package(settings.files.pair(), target, bounds, settings.trust, console)

    @torch.no_grad()
    def logits(prompt: list[int], forced: list[int]) -> torch.Tensor:
        sequence = prompt + forced[:-1]
        padded = bounds.padded(len(sequence), False)
        ids, mask = pad_right(sequence, padded, 0, target.device)
        found = loaded.step(ids, mask)[0]  # (padded, vocab)
        return found[len(prompt) - 1 : len(sequence)].float().cpu()

    return logits


if __name__ == "__main__":
    kind = Kind(APPROACH, RunSettings, artifact_flags, check_logits)
    run_script(partial(main, kind, __doc__))
