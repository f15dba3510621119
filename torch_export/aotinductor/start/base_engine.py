"""The base graph, `forward(input_ids, attention_mask) -> logits`: bound to its weights, and greedy.

It has no state. Every new token costs a pass over all tokens before it, and in return one exported
graph of two plain tensors is the whole model.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aotinductor.start.c_interface import Interface, Program, address_of, check, new_handle
from aotinductor.start.memory import GpuMemory, Memory, read_floats, write_numbers
from common.model.checkpoint import Checkpoint
from common.model.stored import Stored
from common.model.weights import Tensor

# The graph, called: (ids, mask, rows) -> the logits (rows, vocab) float32 of some rows, for ids and
# mask (padded,). By a package, or compiled at runtime.
Forward = Callable[[list[int], list[int], range], np.ndarray]


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
            write_numbers(memory, place, values)
            inputs[at] = new_handle(self._interface, device, place).value
        outputs = (ctypes.c_void_p * 1)()
        stream = memory.stream.handle if isinstance(memory, GpuMemory) else None
        two, one = ctypes.c_size_t(2), ctypes.c_size_t(1)
        check(self._run(self._program.handle, inputs, two, outputs, one, stream, None), "the graph")
        output = ctypes.c_void_p(outputs[0])
        try:
            address, library = ctypes.c_void_p(), self._interface.library
            library.aoti_torch_get_data_ptr(output, ctypes.byref(address))
            logits = Tensor(address.value or 0, (len(ids), self._vocab_size), self._dtype)
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

    def warm_up(self, tokens: int, capture: bool) -> None:
        """Run what a request will, so that a GPU's kernels are there; nothing is captured."""
        self.logits([0] * tokens)

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


# --- its weights, which are its constants: where each one lies, and how it is bound ---------------


class Constant(NamedTuple):
    """A tensor that the graph reads, as a row of the metadata has it.

    `aliases` are further names of the same tensor (tied weights): a checkpoint may use any of them.
    `values` holds the tensor where no checkpoint does (rope frequencies), and `offset` says where
    its bytes begin in a package that holds the weights.
    """

    name: str
    shape: Sequence[int]
    dtype: str
    aliases: Sequence[str] = ()
    values: Sequence[float] | None = None
    offset: int | None = None


def find_constants(
    rows: Iterable[Mapping[str, Any]], package: Path, checkpoint: Checkpoint, memory: Memory
) -> tuple[dict[str, Stored], dict[str, Tensor]]:  # fmt: skip
    """Return where each constant lies, and, as tensors, those that the metadata's rows hold.

    It lies in the package, if its row says where, or in a checkpoint of the same architecture.
    """
    stored, held = {}, {}
    for row in (Constant(**fields) for fields in rows):
        shape = tuple(row.shape)
        if row.values is not None:  # float32, as rope frequencies are
            held[row.name] = memory.zeros(shape, "float32")
            write_numbers(memory, held[row.name], row.values, ctypes.c_float)
        elif row.offset is not None:
            stored[row.name] = Stored(package, row.dtype, shape, row.offset)
        else:
            checkpoint.require_weights()
            own = next(one for one in (row.name, *row.aliases) if one in checkpoint.stored)
            stored[row.name] = checkpoint.stored[own]
    return stored, held


def bind(
    program: Program, steps: ctypes.CDLL, interface: Interface, device: str,
    tensors: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Have the program read `tensors`, by the checkpoint's names, where they are.

    They may get their bytes later. Raises KeyError if it needs one that is not given.
    """
    names, handles = [], []
    for own_name, name in program.constants():
        names.append(own_name)
        handles.append(new_handle(interface, device, tensors[name]).value)
    update = address_of(program.library, "AOTInductorModelContainerUpdateUserManagedConstantBuffer")
    count = len(names)
    status = steps.llama_bind(
        update, program.handle, (ctypes.c_char_p * count)(*names),
        (ctypes.c_void_p * count)(*handles), ctypes.c_int64(count),
    )  # fmt: skip
    check(status, "binding the weights")
