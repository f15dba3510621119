"""How far the logits of a loaded package are from those of the model in float32, uncompiled."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from aotinductor.base import BaseGenerator, pad_right
from aotinductor.flags import APPROACH, RunSettings
from aotinductor.lengths import Bounds, find_plan
from aotinductor.loading import Engine, load_package
from aotinductor.serving import wants_cuda_graph
from common.cli import Console, EquivalenceFlags
from common.measures import Stages, process_start
from common.prompts import load_codec
from common.report import logit_errors, logits_document
from common.target import choose_target, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compare_logits(settings: RunSettings, flags: EquivalenceFlags, console: Console) -> dict:
    """Return, for each prompt length, the errors of the logits of eager and of the package.

    Along one continuation: the greedy one of the model in float32.
    """
    plan = find_plan(settings)
    target = choose_target(plan.fill_in(settings.shared), console)
    steps, lengths = flags.logit_steps, flags.logit_prompt_lengths
    for length in lengths:
        plan.check_request(length, steps, bucket_pad=False)
    loaded = load_package(
        settings.files.pair(), target, plan, settings.trust,
        wants_cuda_graph(settings, target, plan), plan.bounds.padded(lengths[0]),
        Stages(process_start()), console,
    )  # fmt: skip
    reference = load_model(replace(target, dtype=torch.float32))
    eager = load_model(target)
    codec = load_codec(target.checkpoint.folder)
    rows = []
    for length in console.bar(lengths, "logits", "prompt"):
        prompt = codec.synthetic_prompt(length, settings.shared.seed)
        forced = continue_greedily(reference, prompt, steps)
        expected = eager_logits(reference, prompt, forced)
        candidates = {
            "eager": eager_logits(eager, prompt, forced),
            "load": engine_logits(loaded.engine, plan.bounds, prompt, forced),
        }
        errors = {mode: logit_errors(found, expected) for mode, found in candidates.items()}
        rows.append({"prompt_length": length, **errors})
    return logits_document(APPROACH, target.dtype_name, plan.slots, steps, rows)


@torch.no_grad()
def continue_greedily(model: "PreTrainedModel", prompt: list[int], steps: int) -> list[int]:
    """Return the most likely next `steps` token ids, one after another."""
    forced: list[int] = []
    for _ in range(steps):
        ids = torch.tensor([prompt + forced], device=model.device)
        logits = model(ids, use_cache=False, logits_to_keep=1).logits  # (1, 1, vocab)
        forced.append(int(logits.argmax()))
    return forced


@torch.no_grad()
def eager_logits(model: "PreTrainedModel", prompt: list[int], forced: list[int]) -> torch.Tensor:
    """Return (forced, vocab) float32 logits on the CPU: those that each forced token follows."""
    ids = torch.tensor([prompt + forced[:-1]], device=model.device)
    return model(ids, use_cache=False, logits_to_keep=len(forced)).logits[0].float().cpu()


@torch.no_grad()
def engine_logits(
    engine: Engine, bounds: Bounds, prompt: list[int], forced: list[int]
) -> torch.Tensor:
    """Return the package's (forced, vocab) float32 logits on the CPU, token after token."""
    if isinstance(engine, BaseGenerator):
        sequence = prompt + forced[:-1]
        padded = bounds.padded(len(sequence))
        found = engine.step(*pad_right(sequence, padded, 0, engine.device))[0]
        return found[len(prompt) - 1 : len(sequence)].float().cpu()
    engine.prefill(prompt, bounds.padded(len(prompt)))
    rows = [engine.logits.float().cpu()]
    for token in forced[:-1]:
        engine.token.fill_(token)  # instead of the package's own choice
        engine.decode()
        rows.append(engine.logits.float().cpu())
    return torch.cat(rows)
