"""Steps of programs that torch compiled in this process, over the state and loop of a package's."""

import ctypes
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from aotinductor.native.compile import compile_steps
from aotinductor.start.c_interface import DTYPES, open_library, open_libtorch
from aotinductor.start.kv_engine import State
from aotinductor.start.loading import EMBEDDING
from aotinductor.start.memory import Memory
from aotinductor.start.steps import PackageSteps
from common.model.weights import Tensor

Function = Callable[..., object]


def torch_steps(
    functions: Mapping[str, Function], details: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor], state: State, memory: Memory,
) -> PackageSteps:  # fmt: skip
    """Return what a `KvEngine` steps with; `details` as the metadata of a package has them.

    A program is a function of its inputs' tensors, in order, and writes into them.
    """
    interface = open_libtorch(memory.device == "cuda")
    dtypes = {DTYPES[name]: name for name in set(details["dtypes"].values())}
    calls: Any = _Calls(list(functions.values()), dtypes, weights.values(), memory.device)
    # where a package's programs have addresses, these have numbers
    programs: Any = {
        name: SimpleNamespace(handle=ctypes.c_void_p(number), run=ctypes.c_void_p())
        for number, name in enumerate(functions)
    }
    tensors = {name: _as_c_sees_it(weight) for name, weight in weights.items()}
    libraries = (calls, interface)
    steps = PackageSteps(programs, details["programs"], tensors, state, memory, libraries)
    steps.rotate_with(**details["rope"])
    steps.embed_with(_as_c_sees_it(weights[EMBEDDING].cpu()), details["dtypes"]["hidden"])
    return steps


class _Calls:
    """libllama_steps.so, but that a step's calls are of functions of Python."""

    def __init__(
        self, functions: Sequence[Function], dtypes: Mapping[int, str],
        weights: Iterable[torch.Tensor], device: str,
    ):  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="llama-native-") as folder:
            library = open_library(str(compile_steps(Path(folder))))
        self.llama_rows, self.llama_rotations = library.llama_rows, library.llama_rotations
        self._functions, self._dtypes, self._device = functions, dtypes, device
        # the weights themselves: of parameters torch knows that their sizes never change
        self._views = {(one.data_ptr(), *one.shape): one for one in weights}

    @torch.no_grad()
    def llama_step(
        self, create, drop, device_type, device_index, calls, containers, runs, counts, inputs,
        stream,
    ) -> int:  # fmt: skip
        """As steps.cpp's."""
        operands = (pointer.contents for pointer in inputs)
        external = stream and torch.cuda.ExternalStream(stream.value)
        with torch.cuda.stream(external) if external else nullcontext():
            for number, count in zip(containers, counts, strict=True):
                tensors = [self._view(next(operands)) for _ in range(count)]
                self._functions[number or 0](*tensors)
        return 0

    def _view(self, operand) -> torch.Tensor:
        """Return the same memory as torch sees it."""
        key = (operand.data, *operand.sizes[: operand.dims])
        if key not in self._views:
            tensor = Tensor(operand.data, key[1:], self._dtypes[operand.dtype])
            self._views[key] = torch_view(tensor, self._device)
        return self._views[key]


def torch_view(tensor: Tensor, device: str) -> torch.Tensor:
    """Return the same memory as torch sees it; `tensor` must outlive it."""
    dtype = getattr(torch, tensor.dtype)
    if device == "cpu":
        raw = (ctypes.c_char * tensor.nbytes).from_address(tensor.address)
        return torch.frombuffer(raw, dtype=dtype).view(tensor.shape)

    class Bytes:
        __cuda_array_interface__ = {
            "shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.address, False),
            "version": 3,
        }  # fmt: skip

    return torch.as_tensor(Bytes(), device=device).view(dtype).view(tensor.shape)


def _as_c_sees_it(tensor: torch.Tensor) -> Tensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Tensor(tensor.data_ptr(), tuple(tensor.shape), dtype, tensor)
