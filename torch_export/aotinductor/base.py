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
from aotinductor.package import Model


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


def export_base_graph(causal_lm, bounds: Bounds):
    """Export for every multiple within the bounds, or, static, for their one length."""
    length, length_dim = bounds.example_and_dim()
    ids = torch.zeros((1, length), dtype=torch.int64, device=causal_lm.device)
    example, shapes = (ids, torch.ones_like(ids)), (length_dim, length_dim)
    return torch.export.export(BaseGraph(causal_lm), example, dynamic_shapes=shapes)


@dataclass(frozen=True)
class BaseGenerator:
    """Greedy generation without a KV cache: each token is a pass over the whole padded sequence."""

    model: Model
    device: torch.device

    @torch.no_grad()
    def run(self, token_ids: Sequence[int], padded: int) -> torch.Tensor:
        """Return (padded, vocab) logits; the tokens stand at the left end, the rest is masked."""
        ids = torch.tensor([token_ids], device=self.device)
        pads = (0, padded - len(token_ids))
        return self.model([F.pad(ids, pads), F.pad(torch.ones_like(ids), pads)])[0][0]

    def generate(
        self,
        prompt: Sequence[int],
        padded: Callable[[int], int],
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]:
        """Return the new token ids, a stop id included. `on_token` gets each one as it arrives.

        `padded` gives the length that the graph takes for a true one; the caller has checked it.
        """
        new_ids: list[int] = []
        while len(new_ids) < max_new_tokens:
            ids = [*prompt, *new_ids]
            last = self.run(ids, padded(len(ids)))[len(ids) - 1]  # (vocab,)
            new_ids.append(int(last.argmax()))  # waits for the device
            if on_token is not None:
                on_token(new_ids[-1])
            if new_ids[-1] in stop_ids:
                break
        return new_ids
