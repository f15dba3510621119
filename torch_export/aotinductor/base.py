"""Greedy generation with the base graph, `forward(input_ids, attention_mask) -> logits`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from aotinductor.package import Model


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
