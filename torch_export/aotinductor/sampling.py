"""Sampling from logits: torch alone, on the device of the logits.

The order and the meaning of the limits are those of transformers' `generate`: temperature, then
top-k, then top-p.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampler:
    """How a token is drawn. `generator` lives on the device of the logits, and makes it repeatable.

    top_k 0 or None and top_p 1 are no limit.
    """

    temperature: float
    top_k: int | None
    top_p: float
    generator: torch.Generator

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Return one token id (1, 1) for logits (1, vocab), without waiting for the device."""
        weights = self.warp(logits).softmax(-1)
        return torch.multinomial(weights, 1, generator=self.generator)

    def warp(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (1, vocab) to draw from, in float32: -inf where a limit cuts off."""
        warped = logits.float() / self.temperature
        if self.top_k:
            warped = keep_top_k(warped, self.top_k)
        return keep_top_p(warped, self.top_p) if self.top_p < 1 else warped


def make_sampler(
    temperature: float, top_k: int | None, top_p: float, seed: int, device: torch.device
) -> Sampler | None:
    """Return a sampler, or None for temperature 0: greedy, which the graphs do themselves."""
    if temperature == 0:
        return None
    return Sampler(temperature, top_k, top_p, torch.Generator(device).manual_seed(seed))


def keep_top_k(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Keep the `count` largest of logits (1, vocab), and what equals the smallest of them."""
    smallest = logits.topk(min(count, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


def keep_top_p(logits: torch.Tensor, share: float) -> torch.Tensor:
    """Keep the fewest most likely tokens of logits (1, vocab) that hold `share` together."""
    ascending, order = logits.sort(-1)
    dropped = ascending.softmax(-1).cumsum(-1) <= 1 - share
    dropped[:, -1] = False  # the likeliest stays, whatever the share
    return logits.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
