"""Are the compiled outputs those of the model? Compared with transformers' own, uncompiled.

Two correct kernels round differently, so a token is right when eager's logits have it first, or
have nothing that is better by more than rounding. Logits are compared with those in float32.
"""

import copy
from collections.abc import Sequence

import torch
from transformers import Cache, PreTrainedModel

from common.cli import Console
from common.errors import ScriptError
from common.measure.report import logit_errors, logits_document
from common.model.eager import eager_logits, load_model
from common.model.target import Target
from common.model.tokenizer import load_codec
from portable_cache.flags import APPROACH
from portable_cache.start import generation
from portable_cache.start.opening import Opened

# in standard deviations of the logits; a model whose attention is wrong is off by whole ones
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}
_FARTHER_THAN_EAGER = 2.0


def check_choices(
    what: str, eager: PreTrainedModel, prompt: list[int], token_ids: list[int]
) -> None:
    """Raise ScriptError unless eager would have gone on with these tokens, but for rounding.

    In 16 bits it may be larger than the tolerance, in a large model: then eager's own choices are
    held against float32 as well.
    """
    ids, count = prompt + token_ids[:-1], len(token_ids)
    logits = eager_logits(eager, ids, count)
    margin = largest_margin(logits, token_ids)
    dtype = str(eager.dtype).removeprefix("torch.")
    if margin <= _TOLERANCES[dtype]:
        return
    text = (
        f"{what}: the compiled model chose a token that eager puts {margin:.3g} standard "
        "deviations of its logits behind its own choice"
    )
    if dtype != "float32":
        exact = eager_logits(copy.deepcopy(eager).float(), ids, count)
        behind = largest_margin(exact, token_ids)
        eagers = largest_margin(exact, logits.argmax(-1).tolist())
        if behind <= _FARTHER_THAN_EAGER * eagers:  # written so that NaN fails
            return
        text += f" (in float32 {behind:.3g}, and eager's own choices {eagers:.3g})"
    raise ScriptError(text)


def largest_margin(logits: torch.Tensor, token_ids: list[int]) -> float:
    """Return by how much, at most, (tokens, vocab) logits prefer another than the given tokens.

    In standard deviations of the logits; 0 where every token is the first choice.
    """
    chosen = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    return float(((logits.amax(-1) - chosen) / logits.std(-1)).max())


def compare_logits(
    target: Target, opened: Opened, lengths: Sequence[int], steps: int, seed: int, console: Console
) -> tuple[dict, list[str]]:
    """Return the errors of eager's and the artifact's logits, along what the latter generates.

    And a line for each prompt where that is not what eager would have chosen, but for rounding.
    """
    model, codec = opened.model, load_codec(target.checkpoint)
    cache = opened.make_cache(max(lengths) + steps)
    generation.configure_generation(model, opened.flags, steps)
    generate = generation.make_generate(model, cache, seed)
    reference, eager = load_model(target, "float32"), load_model(target)
    rows, wrong = [], []
    for length in console.bar(lengths, "logits", "prompt"):
        prompt = codec.synthetic_prompt(length, seed)
        forced = generate(prompt, lambda token_id: None)
        ids = prompt + forced[:-1]
        expected, eagers = (eager_logits(one, ids, steps) for one in (reference, eager))
        errors = {
            "eager": logit_errors(eagers, expected),
            "load": logit_errors(generated_logits(model, cache, prompt, forced), expected),
        }
        margin = largest_margin(eagers, forced)
        rows.append({"prompt_length": length, "largest_margin": margin, **errors})
        try:
            check_choices(f"a prompt of {length} tokens", eager, prompt, forced)
        except ScriptError as error:  # raised when all is told
            wrong.append(str(error))
    slots = opened.artifact["slots"]
    return logits_document(APPROACH, target.dtype, slots, steps, rows), wrong


def generated_logits(
    model: PreTrainedModel, cache: Cache, prompt: list[int], forced: list[int]
) -> torch.Tensor:
    """Return the same of `generate`, as it decodes: (forced, vocab) float32 on the CPU."""
    cache.reset()
    ids = torch.tensor([prompt], device=model.device)  # (1, prompt) int64
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{generation.CACHE: cache},
        max_new_tokens=len(forced),
        prefix_allowed_tokens_fn=lambda _, so_far: [forced[len(so_far) - len(prompt)]],
        output_logits=True,  # as the model gave them, before that
        return_dict_in_generate=True,
    )
    return torch.cat(output.logits).float().cpu()
