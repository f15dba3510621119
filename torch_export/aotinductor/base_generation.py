"""Greedy generation without a KV cache: each token is a pass over the whole padded sequence."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aotinductor.bounds import Bounds
from common.devices import synchronize
from common.measures import Request

# (1, padded) ids and mask -> (1, padded, vocab) logits
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Prompt:
    """A request, and how its sequence is padded on the right."""

    token_ids: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    padding_id: int
    bounds: Bounds
    bucket_pad: bool

    def padded(self, length: int) -> int:
        return self.bounds.padded(length, self.bucket_pad)


def pad_right(
    token_ids: list[int], length: int, padding_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, each (1, length) int64, the tokens at the left end."""
    ids = torch.full((1, length), padding_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    ids[0, : len(token_ids)] = torch.tensor(token_ids)
    mask[0, : len(token_ids)] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def serve(step: Step, prompt: Prompt, device: torch.device) -> tuple[Request, list[int]]:
    """Generate once; return the timing and the new token ids, a stop token included."""
    synchronize(device)
    began = time.monotonic()
    new_ids: list[int] = []
    ttft = None
    # one row for the longest sequence of this request, of which each step passes the beginning
    longest = prompt.padded(len(prompt.token_ids) + prompt.max_new_tokens - 1)
    ids, mask = (row[0] for row in pad_right(prompt.token_ids, longest, prompt.padding_id, device))
    for length in range(len(prompt.token_ids), len(prompt.token_ids) + prompt.max_new_tokens):
        padded = prompt.padded(length)
        # cut before it becomes a row: contiguous, as the graph was exported and compiled for
        logits = step(ids[:padded][None], mask[:padded][None])  # (1, padded, vocab)
        token = logits[0, length - 1].argmax()
        new_ids.append(int(token))  # waits for the device
        ttft = time.monotonic() - began if ttft is None else ttft
        if new_ids[-1] in prompt.stop_ids:
            break
        if length < longest:
            ids[length] = token
            mask[length] = 1
    return Request(time.monotonic() - began, ttft, len(new_ids)), new_ids
