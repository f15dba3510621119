"""Where the state of a generation lies: arrays of the host, or memory of a GPU with a stream."""

import ctypes

import numpy as np

from common import cuda
from common.model.weights import Tensor, host_tensor, item_bytes, numpy_dtype


class HostMemory:
    """A CPU's: a tensor is a numpy array."""

    device = "cpu"

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return host_tensor(np.zeros(shape, numpy_dtype(dtype)), dtype)

    def write(self, tensor: Tensor, values: np.ndarray) -> None:
        """Copy the values to the tensor's beginning."""
        tensor.owner.reshape(-1)[: values.size] = values.reshape(-1)

    def read(self, tensor: Tensor) -> np.ndarray:
        return tensor.owner

    def read_rows(self, tensor: Tensor, rows: range) -> np.ndarray:
        """Return a copy of some rows of a matrix that somebody else owns."""
        at = _rows_of(tensor, rows)
        raw = ctypes.string_at(at.address, at.nbytes)
        return np.frombuffer(raw, numpy_dtype(tensor.dtype)).reshape(at.shape)

    def clear(self, tensor: Tensor) -> None:
        tensor.owner.fill(0)


class GpuMemory:
    """A GPU's: all copies go through one page-locked buffer and one stream."""

    device = "cuda"

    def __init__(self, largest_bytes: int):
        """`largest_bytes` is the most that is ever written or read at once."""
        self.stream = cuda.Stream()
        self._staged = cuda.HostMemory(largest_bytes)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        tensor = Tensor(0, shape, dtype)
        owner = cuda.DeviceMemory(tensor.nbytes)
        cuda.runtime().cudaDeviceSynchronize()  # its zeros are written on another stream
        return Tensor(owner.address, shape, dtype, owner)

    def write(self, tensor: Tensor, values: np.ndarray) -> None:
        """Copy the values to the tensor's beginning; what was queued before is waited for."""
        self.stream.wait()  # the buffer may still be on its way
        self._staged.view[: values.nbytes] = memoryview(np.ascontiguousarray(values)).cast("B")
        self.stream.upload(tensor.address, self._staged.address, values.nbytes)

    def read(self, tensor: Tensor) -> np.ndarray:
        """Return the values once all that is queued before has been done."""
        self.stream.wait()
        self.stream.download(self._staged.address, tensor.address, tensor.nbytes)
        self.stream.wait()
        values = np.frombuffer(self._staged.view[: tensor.nbytes], numpy_dtype(tensor.dtype))
        return values.reshape(tensor.shape).copy()

    def read_rows(self, tensor: Tensor, rows: range) -> np.ndarray:
        """Return some rows of a matrix, which may be somebody else's."""
        each = [self.read(_rows_of(tensor, range(row, row + 1))) for row in rows]
        return np.concatenate(each)

    def clear(self, tensor: Tensor) -> None:
        tensor.owner.fill_with_zeros(self.stream)


def _rows_of(tensor: Tensor, rows: range) -> Tensor:
    width = tensor.shape[1]
    begin = tensor.address + rows.start * width * item_bytes(tensor.dtype)
    return Tensor(begin, (len(rows), width), tensor.dtype, tensor.owner)


def make_memory(device: str, largest_bytes: int) -> HostMemory | GpuMemory:
    return GpuMemory(largest_bytes) if device == "cuda" else HostMemory()
