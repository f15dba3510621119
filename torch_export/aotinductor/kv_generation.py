"""Generation with a package's `prefill` and `decode` over one static KV cache.

On CUDA the host does not wait for a token before it asks for the next: decode's inputs live on the
device and the graph advances them itself. Tokens come back through page-locked memory, LAG steps
behind; a stop that is seen late throws the tokens after it away, so the output is the same for any
LAG.
"""

from collections.abc import Callable, Sequence

import torch

from aotinductor.kv_cache import CacheShape
from aotinductor.package import Model
from aotinductor.sampling import Sampler

# How far the host may run ahead of the tokens it has seen: enough to hide a launch, few to throw
# away.
LAG = 2
# The first run loads kernels, which a capture cannot; the second shows that nothing is left to
# load.
WARM_UP_RUNS = 2


class Generator:
    """Owns the cache and the step state of one sequence at a time, on one device.

    rope is (2, slots, head_dim); the tables get its dtype and device.
    """

    def __init__(self, prefill: Model, decode: Model, cache: CacheShape, rope: torch.Tensor):
        self.prefill_model, self.decode_model = prefill, decode
        self.cache, self.rope = cache, rope
        self.device = device = rope.device
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.tables = cache.make_tables(rope.dtype, device)
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
            for _ in range(WARM_UP_RUNS):
                self.run_decode()
        torch.cuda.current_stream(self.device).wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may allocate memory meanwhile, for the weights
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.run_decode()  # recorded, not run
        # Every replay writes the same memory of the graph's own pool.
        self.graph, self.graph_logits = graph, self.logits
        self.reset()

    def run_decode(self) -> None:
        state = [self.token, self.position, self.rope, *self.tables_in_use]
        (self.logits,) = self.decode_model.run(state)

    def prefill(self, prompt: Sequence[int], padded: int) -> None:
        """Fill the cache with the prompt's tokens, and leave the first new one in `token`.

        Raises ValueError if prompt or padding do not fit into the cache. That prefill takes the
        length at all is for the caller to check (`lengths.Plan.check_request`).
        """
        if not 0 < len(prompt) <= padded <= self.cache.slots:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens, padded to {padded}, does not fit into a KV "
                f"cache of {self.cache.slots} slots"
            )
        ids = torch.zeros(1, padded, dtype=torch.int64)
        ids[0, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        self.position.fill_(len(prompt))
        self.length = len(prompt)
        state = [ids.to(self.device), self.token, self.position, self.rope, *self.tables]
        (self.logits,) = self.prefill_model.run(state)

    def decode(self) -> None:
        """One step: the token after `token` takes its place, `position` advances.

        Raises ValueError when the cache is full.
        """
        rows = self.cache.rows_in_use(self.length)
        if self.graph is not None:
            self.graph.replay()
            self.logits = self.graph_logits
        else:
            # a GPU's graph takes whole tables: its kernel ends at the position by itself
            if not self.on_cuda and len(self.tables_in_use[0]) != rows:
                self.tables_in_use = [table[:rows] for table in self.tables]
            self.run_decode()
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
        """
        # (max_new_tokens,); page-locked, or the copies below would wait for the device
        arrived = torch.empty(max_new_tokens, dtype=torch.int64, pin_memory=self.on_cuda)
        events: list[torch.cuda.Event | None] = []
        lag = LAG if self.on_cuda else 0
        tokens: list[int] = []
        for step in range(max_new_tokens + lag):
            if step < max_new_tokens:
                self.prefill(prompt, padded) if step == 0 else self.decode()
                if sampler is not None:
                    self.token.copy_(sampler.draw(self.logits))
                events.append(self.send_token(arrived, step))
            # The first token is waited for at once: time to first token is what a user sees.
            while len(tokens) < len(events) and (len(tokens) == 0 or len(tokens) <= step - lag):
                token = receive_token(arrived, events[len(tokens)], len(tokens))
                tokens.append(token)
                if on_token is not None:
                    on_token(token)
                if token in stop_ids:
                    return tokens
        return tokens

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def send_token(self, arrived: torch.Tensor, step: int) -> torch.cuda.Event | None:
        """Queue the copy of `token` to the host, before the next step overwrites it."""
        arrived[step : step + 1].copy_(self.token.view(1), non_blocking=self.on_cuda)
        return torch.cuda.current_stream(self.device).record_event() if self.on_cuda else None


def receive_token(arrived: torch.Tensor, event, step: int) -> int:
    if event is not None:
        event.synchronize()
    return int(arrived[step])
