"""Generation over a static KV cache: state, prefill, decode, and a captured graph on a GPU.

Why padding and stale slots leave no trace: prefill is causal and padded on the right, so no true
token sees a pad; decode overwrites slot `position` before it looks, and sees slots <= `position`
only.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from aotinductor.cache import CacheShape, state_shapes
from aotinductor.start.memory import Memory, read_floats, read_integer, write_numbers
from common import cuda
from common.model.weights import Tensor

if TYPE_CHECKING:
    import numpy as np

    from aotinductor.start.sampling import Sampler
    from aotinductor.start.steps import PackageSteps

# On CUDA, how far the host may run ahead of the tokens it has seen: enough to hide a launch, few to
# throw away.
LAG = 2


class State(NamedTuple):
    """What the programs read and write, in place, from one step to the next."""

    row: Tensor  # (hidden,): the decode step's residual
    hidden: Tensor  # (1, slots, hidden): the prompt's rows, of which prefill takes the first
    token: Tensor  # (1, 1) int64: the newest token, not in the cache yet
    position: Tensor  # (1,) int64: how many tokens the cache holds = the slot that `token` goes to
    rope: Tensor  # (2, slots, head_dim): `rope_table`
    logits: Tensor  # (1, vocab): of the newest step
    keys: list[Tensor]  # of each layer, (rows, kv_heads * head_dim)
    values: list[Tensor]

    @classmethod
    def make(
        cls, memory: Memory, cache: CacheShape, layers: int, details: dict[str, Any]
    ) -> "State":
        """Return the state of no sequence yet, as a package's `details` have it.

        Zeros, not empty: a slot that is masked still takes part as 0 * value, and 0 * nan is nan.
        """
        widths = (details["hidden_size"], details["vocab_size"])
        shapes = state_shapes(cache, *widths, cache.slots, cache.rows)

        def make(name: str) -> Tensor:
            return memory.zeros(shapes[name], details["dtypes"][name])

        keys, values = ([make(name) for _ in range(layers)] for name in ("keys", "values"))
        single = {name: make(name) for name in shapes if name not in ("keys", "values")}
        return cls(**single, keys=keys, values=values)


class KvEngine:
    """Owns the cache and the step state of one sequence at a time, on one device."""

    def __init__(self, steps: "PackageSteps", state: State, cache: CacheShape, memory: Memory):
        self.steps, self.state, self.cache, self.memory = steps, state, cache, memory
        self.on_cuda = memory.device == "cuda"
        self._graph: cuda.Graph | None = None
        self.length = 0  # tokens in the cache: the host's copy of `position`

    # --- one step at a time --------------------------------------------------------------

    def reset(self) -> None:
        """Forget the sequence, and whatever weights that were not there yet left in the cache."""
        state = self.state
        for tensor in (state.token, state.position, state.row, *state.keys, *state.values):
            self.memory.clear(tensor)
        self.length = 0

    def capture(self) -> None:
        """Record decode as a CUDA graph, and reset. Call once.

        The weights' values may still be on their way: only their addresses are recorded.
        """
        self.reset()
        # the first loads kernels, which a capture cannot; the second shows that none is left
        for _ in range(2):
            self.steps.decode(self.cache.rows)
        stream = self.memory.stream
        stream.wait()
        graph = cuda.Graph()
        with stream.capture(graph):
            self.steps.decode(self.cache.rows)
        self._graph = graph
        self.reset()

    def warm_up(self, tokens: int, capture: bool) -> None:
        """Run on the GPU what a request will, so that kernels are there; leave no trace of it."""
        self.prefill([0] * tokens, tokens)
        if capture:
            self.capture()
        self.reset()
        self.memory.stream.wait()

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
        if not self.steps.takes_prompts:
            self.memory.clear(self.state.position)
            self.length = 0
            for token_id in prompt:
                self.steps.embed([token_id], "row")
                self.decode()
            return
        self.steps.embed(prompt, "hidden")
        self.length = len(prompt)
        self.steps.prefill(self.length, padded)

    def decode(self) -> None:
        """One step: the token after `token` takes its place, `position` advances.

        Raises ValueError when the cache is full. No graph checks that: on a CPU it ends the
        process, on CUDA it overwrites other memory.
        """
        if self.length >= self.cache.slots:
            raise ValueError(f"no slot {self.length} in a KV cache of {self.cache.slots}")
        if self._graph is not None:
            self._graph.replay(self.memory.stream)
        else:
            # a GPU's graph takes whole tables: its kernel ends at the position by itself
            in_use = self.cache.rows if self.on_cuda else self.cache.rows_in_use(self.length)
            self.steps.decode(in_use)
        self.length += 1

    def force(self, token_id: int) -> None:
        """Put a token in the place of the one that the last step chose."""
        write_numbers(self.memory, self.state.token, [token_id])
        self.steps.embed([token_id], "row")

    def read_logits(self) -> "np.ndarray":
        """Return (vocab,) float32: those of the last step."""
        return read_floats(self.memory, self.state.logits, 0, 1)[0]

    # --- a whole request -----------------------------------------------------------------

    def tokens(
        self, prompt: Sequence[int], padded: int, max_new_tokens: int,
        stop_ids: Sequence[int] = (), sampler: "Sampler | None" = None,
    ) -> Iterator[int]:  # fmt: skip
        """Yield the new token ids, a stop id included, each as it arrives.

        Greedy without a sampler: the programs choose. The last new token needs no slot; a request
        that does not fit is a ValueError, at once or when the cache is full.
        """
        if sampler is not None or not self.on_cuda:
            yield from self._step_by_step(prompt, padded, max_new_tokens, stop_ids, sampler)
        else:
            yield from self._running_ahead(prompt, padded, max_new_tokens, stop_ids)

    def _step_by_step(self, prompt, padded, max_new_tokens, stop_ids, sampler) -> Iterator[int]:
        generator = sampler and sampler.generator()
        for step in range(max_new_tokens):
            self.prefill(prompt, padded) if step == 0 else self.decode()
            if sampler is None:
                token_id = read_integer(self.memory, self.state.token)
            else:
                token_id = sampler.draw(self.read_logits(), generator)
                self.force(token_id)
            yield token_id
            if token_id in stop_ids:
                return

    def _running_ahead(self, prompt, padded, max_new_tokens, stop_ids) -> Iterator[int]:
        """Ask for the next token without waiting for this one, up to LAG steps ahead.

        The programs advance their inputs themselves, and tokens come back through page-locked
        memory. A stop that is seen late throws the tokens after it away, and a cache that is full
        before it is seen holds the rest back, so the output is the same for any LAG.
        """
        arrived = cuda.HostMemory(8 * max_new_tokens)
        token_ids = arrived.view.cast("q")
        stream, events = self.memory.stream, []
        seen = 0
        while seen < max_new_tokens:
            # the first token is waited for at once: time to first token is what a user sees
            ahead = 1 if seen == 0 else min(seen + 1 + LAG, max_new_tokens)
            while len(events) < ahead:
                if events and self.length >= self.cache.slots and len(events) > seen:
                    break  # no slot: one of the tokens on their way may be the last
                self.prefill(prompt, padded) if not events else self.decode()
                # queued before the next step overwrites it
                at = arrived.address + 8 * len(events)
                stream.copy(at, self.state.token.address, 8)
                events.append(cuda.Event())
                events[-1].record(stream)
            events[seen].wait()
            token_id = int(token_ids[seen])
            seen += 1
            yield token_id
            if token_id in stop_ids:
                return
