"""Where the state of a generation lies: memory of the host, or of a GPU with a stream."""

import ctypes
import mmap
from collections.abc import Callable, Sequence

from common import cuda
from common.model.stored import item_bytes
from common.model.weights import Tensor


class HostMemory:
    """A CPU's. What is written or read is there at once."""

    device = "cpu"

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        nbytes = max(Tensor(0, shape, dtype).nbytes, 1)
        # zeros, and memory only where they are touched
        pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        return Tensor(address, shape, dtype, pages)

    def fill(self, tensor: Tensor, nbytes: int, write: Callable[[int], None]) -> None:
        """Have `write` put so many bytes at the address that it is given: the tensor's own."""
        write(tensor.address)

    def read(self, address: int, nbytes: int) -> bytes:
        return ctypes.string_at(address, nbytes)

    def clear(self, tensor: Tensor) -> None:
        ctypes.memset(tensor.address, 0, tensor.nbytes)


class GpuMemory:
    """A GPU's. All copies go through one page-locked buffer and one stream, in order."""

    device = "cuda"

    def __init__(self, largest_bytes: int):
        """`largest_bytes` is the most that is ever written or read at once."""
        self.stream = cuda.Stream()
        self._staged = cuda.HostMemory(largest_bytes)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        owner = cuda.DeviceMemory(Tensor(0, shape, dtype).nbytes)
        cuda.runtime().cudaDeviceSynchronize()  # its zeros are written on another stream
        return Tensor(owner.address, shape, dtype, owner)

    def fill(self, tensor: Tensor, nbytes: int, write: Callable[[int], None]) -> None:
        """Have `write` put so many bytes at the address that it is given; they go to the tensor."""
        self.stream.wait()  # the buffer may still be on its way
        write(self._staged.address)
        self.stream.copy(tensor.address, self._staged.address, nbytes)

    def read(self, address: int, nbytes: int) -> bytes:
        """Return bytes of the GPU once all that is queued before has been done."""
        self.stream.wait()
        self.stream.copy(self._staged.address, address, nbytes)
        self.stream.wait()
        return ctypes.string_at(self._staged.address, nbytes)

    def copy(self, tensor: Tensor, source: Tensor) -> None:
        """Copy on the GPU, after all that is queued."""
        self.stream.copy(tensor.address, source.address, source.nbytes)

    def clear(self, tensor: Tensor) -> None:
        tensor.owner.fill_with_zeros(self.stream)


Memory = HostMemory | GpuMemory


def make_memory(device: str, largest_bytes: int) -> Memory:
    return GpuMemory(largest_bytes) if device == "cuda" else HostMemory()


def write_numbers(memory: Memory, tensor: Tensor, values: Sequence, kind=ctypes.c_int64) -> None:
    """Write values to the beginning of a tensor, whose dtype is that of `kind`."""
    array = (kind * len(values))(*values)
    nbytes = ctypes.sizeof(array)
    memory.fill(tensor, nbytes, lambda address: ctypes.memmove(address, array, nbytes))


def read_integer(memory: Memory, tensor: Tensor) -> int:
    """Return the first int64 of a tensor."""
    return int.from_bytes(memory.read(tensor.address, 8), "little", signed=True)


def read_floats(memory: Memory, tensor: Tensor, first: int, rows: int):
    """Return some rows of a matrix, which may be somebody else's: numpy, (rows, width) float32."""
    # imported here: a greedy start, which reads no logits, goes without it
    import numpy as np

    width = tensor.shape[-1]
    row_bytes = width * item_bytes(tensor.dtype)
    raw = b"".join(
        memory.read(tensor.address + row * row_bytes, row_bytes)
        for row in range(first, first + rows)
    )
    if tensor.dtype == "bfloat16":  # which numpy lacks: the upper half of a float32
        values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, tensor.dtype).astype(np.float32, copy=False)
    return values.reshape(rows, width)
