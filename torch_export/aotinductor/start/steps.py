"""A package's programs, called in order over a state: the depth of the model is a loop."""

import ctypes
from collections.abc import Mapping, Sequence

from aotinductor.start.c_interface import Interface, Operand, Program, Shape, Step
from aotinductor.start.kv_engine import State
from aotinductor.start.memory import GpuMemory, HostMemory
from common.model.weights import Tensor

_PREFILL, _DECODE = ("prefill_layer", "prefill_head"), ("decode_layer", "decode_head")


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
        self, programs: Mapping[str, Program], inputs: Mapping[str, Sequence[str]],
        weights: Mapping[str, Tensor], state: State, memory: HostMemory | GpuMemory,
        libraries: tuple[ctypes.CDLL, Interface],
    ):  # fmt: skip
        """`inputs` as for `names_of_weights`; `libraries`: libllama_steps.so, and what it calls."""
        self._stream = memory.stream.handle if isinstance(memory, GpuMemory) else None
        self._hidden, self._tables = Shape(state.hidden.shape), Shape(state.keys[0].shape)
        self._width, self._rows = state.keys[0].shape[1], state.keys[0].shape[0]
        shapes = {id(state.hidden): self._hidden}
        operands = {name: _operand(tensor) for name, tensor in weights.items()}

        def calls(layer_program: str, head_program: str, tables: Shape) -> Step:
            order = [(layer_program, layer) for layer in range(len(state.keys))]
            steps, interface = libraries
            made = []
            for program, layer in [*order, (head_program, 0)]:
                own = []
                for name in inputs[program]:
                    if name in ("keys", "values"):
                        own.append(Operand(getattr(state, name)[layer], tables))
                    elif "." in name:
                        own.append(operands[name.format(layer=layer)])
                    else:
                        tensor = getattr(state, name)
                        own.append(Operand(tensor, shapes.get(id(tensor)) or Shape(tensor.shape)))
                made.append((programs[program], own))
            return Step(steps, interface, memory.device, made)

        self.takes_prompts = _PREFILL[0] in programs
        self._decode = calls(*_DECODE, self._tables)
        if self.takes_prompts:
            self._prefill = calls(*_PREFILL, Shape(state.keys[0].shape))

    def prefill(self, padded: int) -> None:
        self._hidden.set((1, padded, self._hidden.sizes[2]))
        self._prefill.run(self._stream)

    def decode(self, rows: int) -> None:
        if rows != self._rows:
            self._tables.set((rows, self._width))
            self._rows = rows
        self._decode.run(self._stream)


def _operand(tensor: Tensor) -> Operand:
    return Operand(tensor, Shape(tensor.shape))
