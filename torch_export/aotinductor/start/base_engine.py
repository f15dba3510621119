"""Greedy generation with the base graph, `forward(input_ids, attention_mask) -> logits`.

It has no state. Every new token costs a pass over all tokens before it, and in return one exported
graph of two plain tensors is the whole model.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from aotinductor.start.c_interface import Interface, Program, new_handle
from aotinductor.start.memory import GpuMemory, Memory, read_floats, write_integers
from common.model.weights import Tensor


class Forward(Protocol):
    """The graph, called: by a package, or compiled at runtime."""

    def __call__(self, ids: list[int], mask: list[int], rows: range) -> np.ndarray:
        """Return the logits (rows, vocab) float32 of some rows, for ids and mask (padded,)."""
        ...


class BaseProgram:
    """The graph out of a package."""

    def __init__(
        self, program: Program, interface: Interface, memory: Memory,
        longest: int, vocab_size: int, dtype: str,
    ):  # fmt: skip
        """`longest`: tokens of the longest padded sequence."""
        self._program, self._interface, self._memory = program, interface, memory
        self._vocab_size, self._dtype = vocab_size, dtype
        self._inputs = [memory.zeros((1, longest), "int64") for _ in range(2)]
        self._run = program.library.AOTInductorModelContainerRunSingleThreaded

    def __call__(self, ids: list[int], mask: list[int], rows: range) -> np.ndarray:
        memory, device = self._memory, self._memory.device
        inputs = (ctypes.c_void_p * 2)()
        for at, values in enumerate((ids, mask)):
            place = self._inputs[at]._replace(shape=(1, len(values)))
            write_integers(memory, place, values)
            inputs[at] = new_handle(self._interface, device, place).value
        outputs = (ctypes.c_void_p * 1)()
        stream = memory.stream.handle if isinstance(memory, GpuMemory) else None
        counts = (ctypes.c_size_t(2), ctypes.c_size_t(1))
        handle = self._program.handle
        if status := self._run(handle, inputs, counts[0], outputs, counts[1], stream, None):
            raise RuntimeError(f"the graph failed with code {status}; what it said stands above")
        output = ctypes.c_void_p(outputs[0])
        try:
            address = self._interface.data_pointer(output)
            logits = Tensor(address, (len(ids), self._vocab_size), self._dtype)
            return read_floats(memory, logits, rows.start, len(rows))
        finally:
            self._interface.library.aoti_torch_delete_tensor_object(output)


class BaseEngine:
    """Greedy generation without a KV cache: each token is a pass over the whole padded sequence."""

    def __init__(self, forward: Forward, padded: Callable[[int], int]):
        """`padded` gives the length that the graph takes for a true one."""
        self._forward, self._padded = forward, padded

    def logits(self, token_ids: Sequence[int], count: int = 1) -> np.ndarray:
        """Return (count, vocab) float32: those after each of the last `count` of the ids.

        The tokens stand at the left end of the padded sequence, the rest is masked.
        """
        length = len(token_ids)
        pads = [0] * (self._padded(length) - length)
        mask = [1] * length + pads
        return self._forward([*token_ids, *pads], mask, range(length - count, length))

    def tokens(
        self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int] = ()
    ) -> Iterator[int]:
        """Yield the new token ids, a stop id included; the caller has checked the lengths."""
        ids = list(prompt)
        for _ in range(max_new_tokens):
            ids.append(int(self.logits(ids).argmax()))
            yield ids[-1]
            if ids[-1] in stop_ids:
                return
