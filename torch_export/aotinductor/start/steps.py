"""A package's programs, called in order over a state: the depth of the model is a loop."""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from aotinductor.start.c_interface import DTYPES, Interface, Program, Shape, Step, operand
from aotinductor.start.kv_engine import State
from aotinductor.start.memory import GpuMemory, Memory, write_numbers
from common.model.stored import item_bytes
from common.model.weights import Tensor

PREFILL, DECODE = "prefill_layer", ("decode_layer", "head")


def names_of_weights(programs: Mapping[str, Sequence[str]], layers: int) -> list[str]:
    """Return the checkpoint's tensors that the programs read, for a model of so many layers.

    `programs`: the names of each program's inputs, in order, as the metadata has them: a tensor of
    the state, or one of the checkpoint, with {layer} in a layer's.
    """
    names: dict[str, None] = {}
    for inputs in programs.values():
        for name in inputs:
            if "." in name:
                names |= dict.fromkeys(name.format(layer=layer) for layer in range(layers))
    return list(names)


class PackageSteps:
    """What a `KvEngine` steps with: prefill and decode, each one native call."""

    def __init__(
        self, programs: Mapping[str, Program], details: Mapping[str, Any],
        weights: Mapping[str, Tensor], embedding: Tensor, dtype: str, state: State,
        memory: Memory, libraries: tuple[ctypes.CDLL, Interface],
    ):  # fmt: skip
        """`details`: the metadata's. `embedding` is a table of the host, `dtype` the model's.

        `libraries`: libllama_steps.so, and what it calls.
        """
        inputs = details["programs"]  # as for `names_of_weights`
        self._stream = memory.stream.handle if isinstance(memory, GpuMemory) else None
        self._state, self._memory, self._weights = state, memory, weights  # calls have addresses
        self._library, self._embedding, self._dtype = libraries[0], embedding, dtype
        self._hidden, self._tables = Shape(state.hidden.shape), Shape(state.keys[0].shape)
        self._width, self._rows = state.keys[0].shape[1], state.keys[0].shape[0]
        shapes = {id(state.hidden): self._hidden}
        operands = {name: operand(tensor) for name, tensor in weights.items()}

        def step(layer_program: str, head: Sequence[str], tables: Shape) -> Step:
            order = [(layer_program, layer) for layer in range(len(state.keys))]
            made = []
            for program, layer in [*order, *((name, 0) for name in head)]:
                own = []
                for name in inputs[program]:
                    if name in ("keys", "values"):
                        own.append(operand(getattr(state, name)[layer], tables))
                    elif "." in name:
                        own.append(operands[name.format(layer=layer)])
                    else:
                        tensor = getattr(state, name)
                        own.append(operand(tensor, shapes.get(id(tensor))))
                made.append((programs[program], own))
            return Step(*libraries, memory.device, made)

        decode_layer, head = DECODE
        self.takes_prompts = PREFILL in programs
        self._decode = step(decode_layer, [head], self._tables)
        if self.takes_prompts:
            self._layers = step(PREFILL, [], Shape(state.keys[0].shape))
            self._head = Step(*libraries, memory.device, [self._decode.calls[-1]])
        self._rotate_with(**details["rope"])

    def _rotate_with(self, inv_freq: Sequence[float], attention_scaling: float) -> None:
        """Write the rotations of every slot: once, and not in every layer and step."""
        half, (_, slots, _) = len(inv_freq), self._state.rope.shape
        frequencies = (ctypes.c_float * half)(*inv_freq)
        scaling = ctypes.c_float(attention_scaling)
        sizes = (ctypes.c_int64(half), scaling, ctypes.c_int64(slots))

        def write(address: int) -> None:
            self._library.llama_rotations(frequencies, *sizes, ctypes.c_void_p(address))

        self._memory.fill(self._state.rope, self._state.rope.nbytes, write)

    def embed(self, token_ids: Sequence[int], name: str) -> None:
        """Put the tokens' embeddings into `row` or the beginning of `hidden`."""
        self._copy_rows(self._embedding, self._dtype, token_ids, getattr(self._state, name))

    def _copy_rows(self, table: Tensor, dtype: str, rows: Sequence[int], place: Tensor) -> None:
        """Put rows of a table of the host to the beginning of `place`, rounded to `dtype` first."""
        dtypes = [DTYPES[d] for d in (table.dtype, dtype, place.dtype)]
        count, width = len(rows), table.shape[1]
        ids = (ctypes.c_int64 * count)(*rows)

        def write(address: int) -> None:
            self._library.llama_rows(
                ctypes.c_void_p(table.address), *dtypes, ids, ctypes.c_int64(count),
                ctypes.c_int64(width), ctypes.c_void_p(address),
            )  # fmt: skip

        self._memory.fill(place, count * width * item_bytes(place.dtype), write)

    def prefill(self, length: int, padded: int) -> None:
        hidden = self._state.hidden
        width = hidden.shape[2]
        self._hidden.set((1, padded, width))
        # the head counts the last token itself
        write_numbers(self._memory, self._state.position, [length - 1])
        self._layers.run(self._stream)
        row_bytes = width * item_bytes(hidden.dtype)
        last = Tensor(hidden.address + (length - 1) * row_bytes, (1, width), hidden.dtype)
        if self._stream is None:
            self._copy_rows(last, hidden.dtype, [0], self._state.row)
        else:  # of one dtype there
            self._memory.copy(self._state.row, last)
        self._head.run(self._stream)

    def decode(self, rows: int) -> None:
        if rows != self._rows:
            self._tables.set((rows, self._width))
            self._rows = rows
        self._decode.run(self._stream)
