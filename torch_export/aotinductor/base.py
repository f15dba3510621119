"""The base graph, `forward(input_ids, attention_mask) -> logits`, and greedy generation with it.

It has no state. Every new token costs a pass over all tokens before it, and in return one exported
graph of two plain tensors is the whole model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from aotinductor.lengths import Bounds

# (1, padded) ids and mask -> (1, padded, vocab) logits
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class BaseGraph(nn.Module):
    """A Llama-family model whose only inputs are ids and mask, padded on the right.

    The submodules keep their names: the graph's constants are called as the checkpoint's tensors.
    """

    def __init__(self, causal_lm):
        super().__init__()
        self.model, self.lm_head = causal_lm.model, causal_lm.lm_head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, seq) int64, (batch, seq) int64 of 1 and 0 -> (batch, seq, vocab)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (seq,)
        causal = positions[:, None] >= positions  # (seq, seq), query by key
        # Made here, because transformers' own mask builder cannot be exported (its vmap stops both
        # the strict and the non-strict tracer); a mask of four dimensions it takes as it is.
        mask = causal & attention_mask.bool()[:, None, None, :]  # (batch, 1, seq, seq)
        hidden = self.model(
            input_ids, attention_mask=mask, position_ids=positions[None], use_cache=False
        )[0]  # (batch, seq, hidden)
        return self.lm_head(hidden)


def export_base_graph(causal_lm, bounds: Bounds, example_seq_len: int):
    """Export for every multiple within the bounds, or, static, for their one length."""
    length, length_dim = bounds.example_and_dim(example_seq_len)
    shapes = None if length_dim is None else (length_dim, length_dim)
    ids = torch.zeros((1, length), dtype=torch.int64, device=causal_lm.device)
    example = (ids, torch.ones_like(ids))
    return torch.export.export(BaseGraph(causal_lm), example, dynamic_shapes=shapes)


def pad_right(token_ids: Sequence[int], length: int, padding_id: int, device: torch.device):
    """Return ids and mask, each (1, length) int64, the tokens at the left end."""
    ids = torch.tensor([token_ids], device=device)
    pads = (0, length - len(token_ids))
    return F.pad(ids, pads, value=padding_id), F.pad(torch.ones_like(ids), pads)


@dataclass(frozen=True)
class BaseGenerator:
    """Greedy generation without a KV cache: each token is a pass over the whole padded sequence."""

    step: Step
    device: torch.device

    @torch.no_grad()
    def generate(
        self,
        prompt: Sequence[int],
        padded: Callable[[int], int],
        padding_id: int,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]:
        """Return the new token ids, a stop id included. `on_token` gets each one as it arrives.

        `padded` gives the length that the graph takes for a true one; the caller has checked it.
        """
        new_ids: list[int] = []
        # one row for the longest sequence of this request, of which each step passes the beginning
        longest = padded(len(prompt) + max_new_tokens - 1)
        (ids,), (mask,) = pad_right(prompt, longest, padding_id, self.device)
        for length in range(len(prompt), len(prompt) + max_new_tokens):
            passed = padded(length)
            # cut before it becomes a row: contiguous, as the graph was exported and compiled for
            logits = self.step(ids[:passed][None], mask[:passed][None])  # (1, passed, vocab)
            token = logits[0, length - 1].argmax()
            new_ids.append(int(token))  # waits for the device
            if on_token is not None:
                on_token(new_ids[-1])
            if new_ids[-1] in stop_ids:
                break
            if length < longest:  # the last new token needs no place
                ids[length], mask[length] = token, 1
        return new_ids
