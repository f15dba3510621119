"""The static KV cache, and generation over it with a package's `prefill` and `decode`: torch alone.

Each layer has a table for K and one for V, slot after slot: (rows, kv_heads * head_dim). A graph
that takes every table as an input of its own writes to it in place; through a view of one larger
tensor Inductor copies the tensor first (torch 2.9.1 to 2.13). And the first slots of a table are
contiguous: a graph can be given those in use alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from aotinductor.package import Model
from common.cli import SamplingFlags

# Tables are cut at multiples of this. More would read slots that hold nothing, fewer save little:
# 64 slots are less than a tenth of a step (random:tiny on a CPU).
BLOCK_ROWS = 64
# On CUDA, how far the host may run ahead of the tokens it has seen: enough to hide a launch, few to
# throw away.
LAG = 2


@dataclass(frozen=True)
class CacheShape:
    """The shape of a KV cache for `slots` tokens of one sequence."""

    layers: int
    kv_heads: int
    slots: int
    head_dim: int

    @classmethod
    def of(cls, config, slots: int) -> "CacheShape":
        """Read the shape from a Llama-family transformers configuration."""
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_key_value_heads, slots, head_dim)

    @property
    def rows(self) -> int:
        """Rows of a table: the slots, and what fills the last block."""
        return -(-self.slots // BLOCK_ROWS) * BLOCK_ROWS

    def make_tables(self, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """Return the tables in the graphs' order, K and V of layer 0 first.

        Zeros, not empty: a slot that is masked still takes part as 0 * value, and 0 * nan is nan.
        """
        size = (self.rows, self.kv_heads * self.head_dim)
        return [torch.zeros(size, dtype=dtype, device=device) for _ in range(2 * self.layers)]


def rope_table(
    inv_freq: list, attention_scaling: float, slots: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return (2, slots, head_dim): cosines and signed sines, as Hugging Face computes them.

    Once at the start, in float32, where a generated kernel would do it in every layer and step.
    """
    positions = torch.arange(slots, dtype=torch.float32, device=device)
    angles = positions[:, None] * torch.tensor(inv_freq, dtype=torch.float32, device=device)
    cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(dtype)


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
    """Owns the cache and the step state of one sequence at a time, on one device.

    rope is (2, slots, head_dim); the tables get its dtype and device.
    """

    def __init__(self, prefill: Model, decode: Model, cache: CacheShape, rope: torch.Tensor):
        self.prefill_model, self.decode_model = prefill, decode
        self.cache, self.rope = cache, rope
        self.device, self.on_cuda = rope.device, rope.device.type == "cuda"
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.tables = cache.make_tables(rope.dtype, self.device)
        self.tables_in_use = self.tables  # what decode is given
        self.length = 0  # tokens in the cache: the host's copy of `position`
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_logits: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None  # (1, vocab), of the newest step

    def reset(self) -> None:
        """Forget the sequence, and whatever weights that were not there yet left in the cache."""
        for tensor in (self.token, self.position, *self.tables):
            tensor.zero_()
        self.length = 0

    def capture(self) -> None:
        """Record decode as a CUDA graph, and reset. Call once, after the constants are bound.

        The weights' values may still be on their way: only their addresses are recorded.
        """
        warm_up = torch.cuda.Stream(self.device)
        warm_up.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(warm_up):
            self.reset()
            # the first loads kernels, which a capture cannot; the second shows that none is left
            for _ in range(2):
                self._run_decode()
        torch.cuda.current_stream(self.device).wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may allocate memory meanwhile, for the weights
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run_decode()  # recorded, not run
        # Every replay writes the same memory of the graph's own pool.
        self.graph, self.graph_logits = graph, self.logits
        self.reset()

    def _run_decode(self) -> None:
        state = [self.token, self.position, self.rope, *self.tables_in_use]
        (self.logits,) = self.decode_model(state)

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
        ids = torch.zeros(1, padded, dtype=torch.int64)
        ids[0, : len(prompt)] = torch.tensor(prompt)
        self.length = len(prompt)
        self.position.fill_(self.length)
        state = [ids.to(self.device), self.token, self.position, self.rope, *self.tables]
        (self.logits,) = self.prefill_model(state)

    def decode(self) -> None:
        """One step: the token after `token` takes its place, `position` advances.

        Raises ValueError when the cache is full. No graph checks that: on a CPU it ends the
        process, on CUDA it overwrites other memory.
        """
        if self.length >= self.cache.slots:
            raise ValueError(f"no slot {self.length} in a KV cache of {self.cache.slots}")
        if self.graph is not None:
            self.graph.replay()
            self.logits = self.graph_logits
        else:
            # a GPU's graph takes whole tables: its kernel ends at the position by itself
            rows = (self.length // BLOCK_ROWS + 1) * BLOCK_ROWS
            if not self.on_cuda and len(self.tables_in_use[0]) != rows:
                self.tables_in_use = [table[:rows] for table in self.tables]
            self._run_decode()
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
                    self.token.copy_(sampler.draw(self.logits))
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
