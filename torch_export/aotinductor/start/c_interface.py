"""The C interface that compiled programs are called through, and nothing else.

Generated code (AOTInductor's) asks torch's C interface for memory and handles. Behind it is either
libtorch, or the runtime library that a package carries, which has those functions without torch.

    interface = Interface("runtime", open_library(path))     or open_libtorch(with_cuda=False)
    program = Program(path_of_a_library, interface, "cpu")
    step = Step(steps_library, interface, "cpu", [(program, [operand(tensor), ...]), ...])
    step.run()

The names are those of torch/csrc/inductor/aoti_torch/c/shim.h and aoti_runtime/interface.h, read in
torch 2.9.1 and 2.14.1.
"""

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import machine
from common.errors import EnvironmentProblemError
from common.model.weights import Convert, Tensor

_LOCAL_NOW = os.RTLD_LOCAL | os.RTLD_NOW
# what a library was linked with comes before what the process has made global: another package may
# have opened libtorch, whose functions must not meet the runtime library's handles
_OWN_FIRST = _LOCAL_NOW | os.RTLD_DEEPBIND
# torch's codes (c10/core/ScalarType.h, DeviceType.h), which the runtime library has too
DTYPES = {"int64": 4, "float16": 5, "float32": 6, "float64": 7, "bool": 11, "bfloat16": 15}
DEVICES = {"cpu": 0, "cuda": 1}
_LIBTORCH = ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so")
_LIBTORCH_CUDA = ("libc10_cuda.so", "libtorch_cuda.so")


class Shape:
    """Sizes of one or more contiguous operands, which can be changed for all of them at once."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes, self.strides = ((ctypes.c_int64 * len(sizes))() for _ in range(2))
        self.set(sizes)

    def set(self, sizes: Sequence[int]) -> None:
        for at, size in enumerate(sizes):
            self.sizes[at] = size
            self.strides[at] = math.prod(sizes[at + 1 :])


class Operand(ctypes.Structure):
    """One tensor of a call, as libllama_steps.so reads it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dims", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("dtype", ctypes.c_int32),
    )


def operand(tensor: Tensor, shape: Shape | None = None) -> Operand:
    """Return the tensor in a call; `shape` may be shared, and less than the whole tensor's."""
    shape = shape or Shape(tensor.shape)
    return Operand(
        tensor.address, len(shape.sizes), shape.sizes, shape.strides, DTYPES[tensor.dtype]
    )


class Interface(NamedTuple):
    """The library behind the calls: `name` is runtime or libtorch."""

    name: str
    library: ctypes.CDLL


def address_of(library: ctypes.CDLL, name: str) -> ctypes.c_void_p:
    """Return a function's address, to be handed to C."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p)


def check(code: int, what: str) -> None:
    """Raise EnvironmentProblemError if a native call returned a code: it tells why."""
    if code:
        raise EnvironmentProblemError(f"{what} failed with code {code}; what it said stands above")


def find_torch() -> Path:
    """Return torch's folder. Raises EnvironmentProblemError where it isn't installed."""
    folder = machine.package_folder("torch")
    if folder is None:
        raise EnvironmentProblemError(
            "this start is over libtorch, and no torch is installed: install the one that built "
            "the package; one with a KV cache starts without (./build.sh --kv-cache)"
        )
    return folder


def open_libtorch(with_cuda: bool, whole: bool = False) -> Interface:
    """Return libtorch's interface, its functions being there for every library opened from now on.

    `whole`: with libtorch.so, which programs name that are linked for torch's plain loader.
    """
    folder = find_torch()
    cuda = _LIBTORCH_CUDA if with_cuda else ()
    for name in (*_LIBTORCH, *cuda, *["libtorch.so"] * whole):
        path = folder / "lib" / name
        if not path.exists():
            raise EnvironmentProblemError(
                f"the torch in {folder} has no {name}: is it a CUDA build?"
            )
        open_library(str(path), ctypes.RTLD_GLOBAL)
    return Interface("libtorch", ctypes.CDLL(str(folder / "lib" / "libtorch_cpu.so")))


def open_library(path: str, mode: int = _LOCAL_NOW) -> ctypes.CDLL:
    """Open a shared library; EnvironmentProblemError if the system lacks what it needs."""
    try:
        return ctypes.CDLL(path, mode)
    except OSError as error:
        raise EnvironmentProblemError(f"cannot open a library: {error}") from error


def converter(steps: ctypes.CDLL) -> Convert:
    """Return what converts weights with a package's own code; it lets go of the GIL."""

    def convert(source: int, dtype: str, place: int, wanted: str, count: int) -> None:
        steps.llama_convert(
            ctypes.c_void_p(source), DTYPES[dtype], ctypes.c_void_p(place), DTYPES[wanted],
            ctypes.c_int64(count),
        )  # fmt: skip

    return convert


class Program:
    """One compiled program, opened. Its weights are inputs, unless it has constants."""

    def __init__(self, path: str, interface: Interface, device: str, cubins: Path | None = None):
        own_first = interface.name == "runtime"
        self.library = open_library(path, _OWN_FIRST if own_first else _LOCAL_NOW)
        self.handle = ctypes.c_void_p()
        self.kept: Any = None  # what it reads, and has no copy of
        create = self.library.AOTInductorModelContainerCreateWithDevice
        folder = str(cubins).encode() if cubins else None
        status = create(ctypes.byref(self.handle), ctypes.c_size_t(1), device.encode(), folder)
        check(status, "opening a program of the package")
        self.run = address_of(self.library, "AOTInductorModelContainerRunSingleThreaded")

    def constants(self) -> list[tuple[bytes, str]]:
        """Return (the program's own name, the checkpoint's name) of each constant."""
        library, count = self.library, ctypes.c_size_t()
        library.AOTInductorModelContainerGetNumConstants(self.handle, ctypes.byref(count))

        def name_by(function: Callable[..., int], index: int) -> bytes:
            name = ctypes.c_char_p()
            function(self.handle, ctypes.c_size_t(index), ctypes.byref(name))
            return name.value or b""

        own = library.AOTInductorModelContainerGetConstantName
        checkpoints = library.AOTInductorModelContainerGetConstantOriginalFQN
        indices = range(count.value)
        return [(name_by(own, at), name_by(checkpoints, at).decode()) for at in indices]


class Step:
    """Calls of programs in their order, made as one native call; the tensors stay the caller's."""

    def __init__(
        self, steps: ctypes.CDLL, interface: Interface, device: str,
        calls: Sequence[tuple[Program, Sequence[Operand]]],
    ):  # fmt: skip
        count, self.calls = len(calls), calls
        pointers = [ctypes.pointer(one) for _, inputs in calls for one in inputs]
        self._arguments: tuple[Any, ...] = (
            address_of(interface.library, "aoti_torch_create_tensor_from_blob_v2"),
            address_of(interface.library, "aoti_torch_delete_tensor_object"),
            ctypes.c_int32(DEVICES[device]),
            ctypes.c_int32(0),
            ctypes.c_int64(count),
            (ctypes.c_void_p * count)(*[program.handle.value for program, _ in calls]),
            (ctypes.c_void_p * count)(*[program.run.value for program, _ in calls]),
            (ctypes.c_int64 * count)(*[len(inputs) for _, inputs in calls]),
            (ctypes.POINTER(Operand) * len(pointers))(*pointers),
        )
        self._run: Callable[..., int] = steps.llama_step

    def run(self, stream: ctypes.c_void_p | None = None) -> None:
        """Make the calls on a stream of the GPU, or here; raise when one of them fails."""
        call, code = divmod(self._run(*self._arguments, stream), 1000)
        check(code, f"call {call} of a step")


def new_handle(interface: Interface, device: str, tensor: Tensor) -> ctypes.c_void_p:
    """Return a handle over the tensor's memory; a run steals it, and a binding keeps it."""
    shape, handle = Shape(tensor.shape), ctypes.c_void_p()
    interface.library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(tensor.address), ctypes.c_int64(len(tensor.shape)), shape.sizes,
        shape.strides, ctypes.c_int64(0), ctypes.c_int32(DTYPES[tensor.dtype]),
        ctypes.c_int32(DEVICES[device]), ctypes.c_int32(0), ctypes.byref(handle),
        ctypes.c_int32(interface.library.aoti_torch_layout_strided()), None, ctypes.c_int64(0),
    )  # fmt: skip
    return handle
