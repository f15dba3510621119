"""The base graph: `forward(input_ids, attention_mask) -> logits` over the whole sequence.

It has no state. Every new token costs a pass over all tokens before it, and in return one exported
graph of two plain tensors is the whole model.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from aotinductor.bounds import Bounds

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BaseGraph(nn.Module):
    """A Llama-family model whose only inputs are ids and mask, padded on the right.

    The submodules keep their own names, so that the graph's constants are called as the
    checkpoint's tensors are.
    """

    def __init__(self, causal_lm: "PreTrainedModel"):
        super().__init__()
        self.model = causal_lm.model
        self.lm_head = causal_lm.lm_head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, seq) int64, (batch, seq) int64 of 1 and 0 -> (batch, seq, vocab)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (seq,)
        causal = positions[:, None] >= positions  # (seq, seq), query by key
        # Made here, because transformers' own mask builder cannot be exported (its vmap stops both
        # the strict and the non-strict tracer); a mask of four dimensions it takes as it is.
        mask = causal & attention_mask.bool()[:, None, None, :]  # (batch, 1, seq, seq)
        hidden = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions[None],
            use_cache=False,
        )[0]  # (batch, seq, hidden)
        return self.lm_head(hidden)


def export_base_graph(
    causal_lm: "PreTrainedModel", bounds: Bounds, example_seq_len: int
) -> torch.export.ExportedProgram:
    """Export for every multiple within the bounds, or, static, for their one length."""
    length, length_dim = bounds.example_and_dim(example_seq_len)
    shapes = None if length_dim is None else (length_dim, length_dim)
    ids = torch.zeros((1, length), dtype=torch.int64, device=causal_lm.device)
    graph = BaseGraph(causal_lm)
    return torch.export.export(graph, (ids, torch.ones_like(ids)), dynamic_shapes=shapes)
