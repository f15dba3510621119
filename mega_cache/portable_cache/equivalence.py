"""How far the logits of a loaded artifact are from those of the model in float32, uncompiled."""

from dataclasses import replace

import torch

from common.cli import Console, EquivalenceFlags
from common.measures import Stages, process_start
from common.report import logit_errors, logits_document
from common.weights import list_checkpoint, start_upload
from portable_cache import generation
from portable_cache.flags import APPROACH, RunSettings
from portable_cache.serving import set_up
from portable_cache.verification import eager_logits, generated_logits, largest_margin


def compare_logits(settings: RunSettings, flags: EquivalenceFlags, console: Console) -> dict:
    """Return, for each prompt length, the errors of the logits of eager and of the artifact.

    Along one continuation: what the artifact itself generates.
    """
    steps, longest = flags.logit_steps, max(flags.logit_prompt_lengths)
    wanted = replace(
        settings,
        loading=replace(settings.loading, load_artifacts=True),
        prompt=replace(
            settings.prompt, prompt_length=longest, max_new_tokens=steps, ignore_eos=True
        ),
    )
    ready = set_up(wanted, Stages(process_start()), console)
    target = ready.target
    exact = replace(target, dtype=torch.float32)
    stored = list_checkpoint(target.checkpoint.folder)
    exact_tensors = start_upload(stored, target.device, torch.float32).wait()
    reference = generation.make_model(exact, exact_tensors, generation.STOCK_ATTENTION)
    eager = generation.make_model(target, ready.tensors, generation.STOCK_ATTENTION)
    generate = generation.make_generate(ready.model, ready.cache, settings.shared.seed)
    rows = []
    for length in console.bar(flags.logit_prompt_lengths, "logits", "prompt"):
        prompt = ready.codec.synthetic_prompt(length, settings.shared.seed)
        forced = generate(prompt, lambda token_id: None)
        expected = eager_logits(reference, prompt, forced)
        candidates = {
            "eager": eager_logits(eager, prompt, forced),
            "load": generated_logits(ready.model, ready.cache, prompt, forced),
        }
        rows.append(
            {
                "prompt_length": length,
                "largest_margin": largest_margin(eager, prompt, forced),
                **{mode: logit_errors(found, expected) for mode, found in candidates.items()},
            }
        )
    return logits_document(APPROACH, target.dtype_name, ready.plan.slots, steps, rows)
