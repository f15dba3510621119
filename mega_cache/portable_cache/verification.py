"""Are the compiled outputs those of the model? Compared with transformers' own, uncompiled.

Two correct kernels round differently, so a token is right when eager's logits have it first, or
have nothing that is better by more than rounding.
"""

import torch
from transformers import PreTrainedModel

from common.errors import ScriptError

# in standard deviations of the logits; a model whose attention is wrong is off by whole ones
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}


def largest_margin(model: PreTrainedModel, prompt: list[int], token_ids: list[int]) -> float:
    """Return by how much, at most, eager prefers another token than the given next ones.

    In standard deviations of its logits; 0 where every token is its first choice.
    """
    ids = torch.tensor([prompt + token_ids[:-1]], device=model.device)  # (1, all but the last)
    logits = model(ids, use_cache=False, logits_to_keep=len(token_ids)).logits[0].float()
    chosen = logits.gather(1, torch.tensor(token_ids, device=model.device)[:, None])[:, 0]
    return float(((logits.amax(-1) - chosen) / logits.std(-1)).max())


def check_differences(margins: dict[int, float], dtype: torch.dtype) -> None:
    """Raise ScriptError if a margin, by slots of its KV cache, is more than rounding."""
    for slots, margin in margins.items():
        if not margin <= _TOLERANCES[dtype]:
            raise ScriptError(
                f"with a KV cache of {slots} slots the compiled model chose a token that eager "
                f"puts {margin:.3g} standard deviations behind its own: nothing is published"
            )
