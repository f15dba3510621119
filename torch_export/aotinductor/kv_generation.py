"""The static KV cache, and generation over it with a package's `prefill` and `decode`: torch alone.

Each layer has a table for K and one for V, slot after slot: (rows, kv_heads * head_dim).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from aotinductor.cache import CacheShape
from common.cli import SamplingFlags

# On CUDA, how far the host may run ahead of the tokens it has seen: enough to hide a launch, few to
# throw away.
LAG = 2


def rope_table(
    inv_freq: list, attention_scaling: float, slots: int, device: torch.device
) -> torch.Tensor:
    """Return (2, slots, head_dim): cosines and signed sines, as Hugging Face computes them.

    Once at the start, in float32, where a generated kernel would do it in every layer and step.
    """
    positions = torch.arange(slots, dtype=torch.float32, device=device)
    angles = positions[:, None] * torch.tensor(inv_freq, dtype=torch.float32, device=device)
    cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


@dataclass(frozen=True)
class Sampler:
    """Draws tokens, limited as transformers' `generate` does it."""

    limits: SamplingFlags
    generator: torch.Generator  # on the device of the logits

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Return one token id (1, 1) for logits (1, vocab), without waiting for the device."""
        return torch.multinomial(self.warp(logits).softmax(-1), 1, generator=self.generator)

    def warp(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (1, vocab) to draw from, in float32: -inf where a limit cuts off."""
        top_k, top_p = self.limits.top_k, self.limits.top_p
        warped = logits.float() / self.limits.temperature
        if top_k:  # the largest, and what equals the smallest of them
            smallest = warped.topk(min(top_k, warped.shape[-1])).values[:, -1:]
            warped = warped.masked_fill(warped < smallest, float("-inf"))
        if top_p < 1:  # the fewest most likely ones that hold this share together
            ascending, order = warped.sort(-1)
            dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
            dropped[:, -1] = False  # the likeliest stays, whatever the share
            warped = warped.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))
        return warped


class Generator:
    """Generates one sequence at a time with whole steps over a state: `build.torch_steps`."""

    def __init__(self, steps, cache: CacheShape):
        self.steps, self.cache, self.state = steps, cache, steps.state
        self.token, self.position = self.state["token"], self.state["position"]
        self.logits = self.state["logits"]  # (1, vocab), of the newest step
        self.embedding = steps.weights["model.embed_tokens.weight"]
        self.device = self.token.device
        self.on_cuda = self.device.type == "cuda"
        self.length = 0  # tokens in the cache: the host's copy of `position`

    def reset(self) -> None:
        """Forget the sequence, and whatever weights that were not there yet left in the cache."""
        tables = [table for pair in self.steps.tables for table in pair]
        for tensor in (self.token, self.position, *tables):
            tensor.zero_()
        self.length = 0

    def prefill(self, prompt: Sequence[int], padded: int) -> None:
        """Fill the cache with the prompt's tokens, and leave the first new one in `token`.

        Raises ValueError if they do not fit into the cache. That prefill takes the length at all is
        for the caller to check (`Plan.check_request`).
        """
        if not 0 < len(prompt) <= padded <= self.cache.slots:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens, padded to {padded}, does not fit into a KV "
                f"cache of {self.cache.slots} slots"
            )
        self.length = len(prompt)
        self.position.fill_(self.length)
        ids = torch.tensor(prompt, device=self.device)
        self.state["hidden"][0, : len(prompt)] = self.embedding[ids]
        self.steps.prefill(padded)

    def force(self, token: int) -> None:
        """Take this token in place of the greedy one."""
        self.token.fill_(token)
        self.state["row"].copy_(self.embedding[token])

    def decode(self) -> None:
        """One step: the token after `token` takes its place, `position` advances.

        Raises ValueError when the cache is full. No program checks that: on a CPU it ends the
        process, on CUDA it overwrites other memory.
        """
        if self.length >= self.cache.slots:
            raise ValueError(f"no slot {self.length} in a KV cache of {self.cache.slots}")
        # a GPU's program takes whole tables: its kernel ends at the position by itself
        self.steps.decode(self.cache.rows if self.on_cuda else self.cache.rows_in_use(self.length))
        self.length += 1

    def generate(
        self,
        prompt: Sequence[int],
        padded: int,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        on_token: Callable[[int], None] | None = None,
        sampler: Sampler | None = None,
    ) -> list[int]:
        """Return the new token ids, a stop id included. `on_token` gets each one as it arrives.

        Greedy without a sampler: the graphs choose. The last new token needs no slot; a request
        that does not fit is a ValueError, at once or when the cache is full.

        On CUDA the host asks for the next token without waiting for this one: the graph advances
        its inputs itself, and tokens come back through page-locked memory, LAG steps behind. A stop
        that is seen late throws the tokens after it away, so the output is the same for any LAG.
        """
        # (max_new_tokens,); page-locked, or the copies below would wait for the device
        arrived = torch.empty(max_new_tokens, dtype=torch.int64, pin_memory=self.on_cuda)
        events: list[torch.cuda.Event] = []
        lag = LAG if self.on_cuda else 0
        tokens: list[int] = []
        for step in range(max_new_tokens + lag):
            if step < max_new_tokens:
                self.prefill(prompt, padded) if step == 0 else self.decode()
                if sampler is not None:
                    self.force(sampler.draw(self.logits)[0, 0])
                # queued before the next step overwrites it
                arrived[step : step + 1].copy_(self.token[0], non_blocking=self.on_cuda)
                if self.on_cuda:
                    events.append(torch.cuda.current_stream(self.device).record_event())
            # The first token is waited for at once: time to first token is what a user sees.
            seen = min(max(1, step + 1 - lag), max_new_tokens)
            while len(tokens) < seen:
                if self.on_cuda:
                    events[len(tokens)].synchronize()
                tokens.append(int(arrived[len(tokens)]))
                if on_token is not None:
                    on_token(tokens[-1])
                if tokens[-1] in stop_ids:
                    return tokens
        return tokens
