"""Are the compiled outputs those of the model? Compared with transformers' own, uncompiled.

Two correct kernels round differently, so a token is right when eager's logits have it first, or
have nothing that is better by more than rounding.
"""

import torch
from transformers import Cache, PreTrainedModel

from common.errors import ScriptError

# in standard deviations of the logits; a model whose attention is wrong is off by whole ones
_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.1}


def largest_margin(eager: PreTrainedModel, prompt: list[int], token_ids: list[int]) -> float:
    """Return by how much, at most, eager prefers another token than the given next ones.

    In standard deviations of its logits; 0 where every token is its first choice.
    """
    logits = eager_logits(eager, prompt, token_ids)
    chosen = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    return float(((logits.amax(-1) - chosen) / logits.std(-1)).max())


def check_differences(margins: dict[str, float], dtype_name: str) -> None:
    """Raise ScriptError if a margin, by the words for what was compared, is more than rounding."""
    for what, margin in margins.items():
        if not margin <= _TOLERANCES[dtype_name]:
            raise ScriptError(
                f"{what}: the compiled model chose a token that eager puts {margin:.3g} standard "
                "deviations of its logits behind its own choice"
            )


def eager_logits(eager: PreTrainedModel, prompt: list[int], forced: list[int]) -> torch.Tensor:
    """Return the logits of the tokens after `prompt` if they are `forced`: (forced, vocab)."""
    ids = torch.tensor([prompt + forced[:-1]], device=eager.device)  # (1, all but the last)
    return eager(ids, use_cache=False, logits_to_keep=len(forced)).logits[0].float().cpu()


def generated_logits(
    model: PreTrainedModel, cache: Cache, prompt: list[int], forced: list[int]
) -> torch.Tensor:
    """Return the same of `generate`, as it decodes: (forced, vocab) float32 on the CPU."""

    def only_forced(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        left = scores.new_full(scores.shape, float("-inf"))
        left[:, forced[ids.shape[1] - len(prompt)]] = 0.0
        return left

    cache.reset()
    ids = torch.tensor([prompt], device=model.device)  # (1, prompt) int64
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=len(forced),
        logits_processor=[only_forced],
        output_logits=True,  # as the model gave them, before the processor
        return_dict_in_generate=True,
    )
    return torch.cat(output.logits).float().cpu()
