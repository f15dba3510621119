"""Check that a loaded package is the same model: equal tokens, and how far the logits are off.

    ./check_equivalence.sh --model-id random:tiny
    ./check_equivalence.sh --model-id random:3b --no-check-tokens

Tokens are checked on a package of random:tiny made for it; logits on the package at hand.
"""

from functools import partial
from typing import TYPE_CHECKING

from measure import artifact_flags

from aotinductor.flags import APPROACH, CHECKPOINTS
from common.console import Console
from common.equivalence import EquivalenceFlags, Kind, compare_logits, main
from common.errors import run_script
from run_llama_aotinductor import RunSettings, wants_cuda_graph

if TYPE_CHECKING:
    import torch

    from aotinductor.base_generation import Step
    from aotinductor.bounds import Bounds
    from aotinductor.kv_generation import Generator
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
    """Return the function that gives the package's logits of each forced token."""
    from aotinductor.loading import load_package
    from aotinductor.recipe import find_plan
    from common.stopwatch import Stages, process_start

    plan = find_plan(settings.files, settings.shape, loading=True)
    cuda_graph = wants_cuda_graph(settings, target, plan)
    loaded = load_package(
        settings.files.pair(), target, plan, settings.trust, cuda_graph, Stages(process_start()),
        console,
    )  # fmt: skip
    logits = base_logits if plan.slots is None else kv_logits
    return partial(logits, loaded.engine, plan.bounds, target.device)


def base_logits(
    step: "Step", bounds: "Bounds", device: "torch.device", prompt: list[int], forced: list[int]
) -> "torch.Tensor":
    """Return (forced, vocab) float32 logits, in one pass over prompt and forced tokens."""
    import torch

    from aotinductor.base_generation import pad_right

    sequence = prompt + forced[:-1]
    with torch.no_grad():
        found = step(*pad_right(sequence, bounds.padded(len(sequence)), 0, device))[0]
    return found[len(prompt) - 1 : len(sequence)].float().cpu()


def kv_logits(
    generator: "Generator", bounds: "Bounds", device: "torch.device", prompt: list[int],
    forced: list[int],
) -> "torch.Tensor":  # fmt: skip
    """Return (forced, vocab) float32 logits: prefill, then one decode step per forced token."""
    import torch

    with torch.no_grad():
        generator.prefill(prompt, bounds.padded(len(prompt)))
        rows = [generator.logits.float().cpu()]
        for token in forced[:-1]:
            generator.token.fill_(token)  # instead of the package's own choice
            generator.decode()
            rows.append(generator.logits.float().cpu())
    return torch.cat(rows)


if __name__ == "__main__":
    kind = Kind(APPROACH, RunSettings, artifact_flags, check_logits)
    run_script(partial(main, kind, __doc__))
