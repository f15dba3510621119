"""Are the compiled outputs those of the model? Compared with transformers' own, uncompiled.

Two correct kernels round differently, so a token is right when eager's logits have it first, or
have nothing that is better by more than rounding. Logits are compared with those in float32.
"""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from common.cli import Console, EquivalenceFlags
from common.errors import ScriptError
from common.measure.measures import Stages, process_start
from common.measure.report import logit_errors, logits_document
from common.model.eager import load_model
from portable_cache import serving
from portable_cache.flags import APPROACH, RunSettings

# in standard deviations of the logits; a model whose attention is wrong is off by whole ones
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}


def largest_margin(eager: PreTrainedModel, prompt: list[int], token_ids: list[int]) -> float:
    """Return by how much, at most, eager prefers another token than the given next ones.

    In standard deviations of its logits; 0 where every token is its first choice.
    """
    logits = eager_logits(eager, prompt, token_ids)
    chosen = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    return float(((logits.amax(-1) - chosen) / logits.std(-1)).max())


def check_margin(what: str, margin: float, dtype_name: str) -> None:
    """Raise ScriptError if the largest margin of `what` was generated is more than rounding."""
    if not margin <= _TOLERANCES[dtype_name]:  # written so that NaN fails
        raise ScriptError(
            f"{what}: the compiled model chose a token that eager puts {margin:.3g} standard "
            "deviations of its logits behind its own choice"
        )


def eager_logits(eager: PreTrainedModel, prompt: list[int], forced: list[int]) -> torch.Tensor:
    """Return the logits of the tokens after `prompt` if they are `forced`: (forced, vocab)."""
    ids = torch.tensor([prompt + forced[:-1]], device=eager.device)  # (1, all but the last)
    return eager(ids, use_cache=False, logits_to_keep=len(forced)).logits[0].float().cpu()


def compare_logits(settings: RunSettings, flags: EquivalenceFlags, console: Console) -> dict:
    """Return the errors of eager's and the artifact's logits, along what the latter generates."""
    steps, lengths = flags.logit_steps, flags.logit_prompt_lengths
    loading = replace(settings.loading, load_artifacts=True)
    longest = {"prompt_length": max(lengths), "max_new_tokens": steps, "ignore_eos": True}
    wanted = replace(settings, loading=loading, prompt=replace(settings.prompt, **longest))
    ready = serving.set_up(wanted, Stages(process_start()), console)
    target, slots = ready.target, ready.compiler.artifact["slots"]
    reference, eager = load_model(target, "float32"), load_model(target)
    rows = []
    for length in console.bar(lengths, "logits", "prompt"):
        prompt = ready.codec.synthetic_prompt(length, settings.shared.seed)
        forced = ready.generate(prompt, lambda token_id: None)
        expected = eager_logits(reference, prompt, forced)
        errors = {
            "eager": logit_errors(eager_logits(eager, prompt, forced), expected),
            "load": logit_errors(generated_logits(ready, prompt, forced), expected),
        }
        margin = largest_margin(eager, prompt, forced)
        rows.append({"prompt_length": length, "largest_margin": margin, **errors})
    return logits_document(APPROACH, target.dtype, slots, steps, rows)


def generated_logits(ready: serving.Ready, prompt: list[int], forced: list[int]) -> torch.Tensor:
    """Return the same of `generate`, as it decodes: (forced, vocab) float32 on the CPU."""
    ready.cache.reset()
    ids = torch.tensor([prompt], device=ready.model.device)  # (1, prompt) int64
    output = ready.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=ready.cache,
        max_new_tokens=len(forced),
        prefix_allowed_tokens_fn=lambda _, so_far: [forced[len(so_far) - len(prompt)]],
        output_logits=True,  # as the model gave them, before that
        return_dict_in_generate=True,
    )
    return torch.cat(output.logits).float().cpu()
