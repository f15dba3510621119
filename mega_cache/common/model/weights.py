"""Bring tensors from files to the device: one copy there, and none besides it in host memory.

A tensor is named by where its bytes lie, `Stored`: in a checkpoint's safetensors, or in any other
file that holds them as they are. What comes of it is a `Tensor`, a place in memory: on a CPU within
the mapped file; on a GPU threads carry it there through page-locked memory, while the caller works
with tensors that have their places:

    upload = start_upload(list_stored(folder), "cuda", "bfloat16")
    ...                      # upload.tensors can be bound, also captured, but not yet believed
    tensors = upload.wait()  # name -> tensor

Neither torch nor transformers is imported here, and numpy where a tensor is converted alone.
"""

import ctypes
import functools
import math
import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from common import cuda
from common.errors import EnvironmentProblemError
from common.model.stored import Stored, item_bytes

if TYPE_CHECKING:
    import numpy as np

# MAP_NORESERVE of Linux, which Python names from 3.11 on: a model in the page cache is no memory
# that the system would have to promise
_NO_RESERVE = 0x4000
_FLOATS = ("float64", "float32", "float16", "bfloat16")

# Where a tensor begins on the device, as CUDA's allocator has it; generated kernels assume 16.
_ALIGNMENT_BYTES = 512
# Two buffers per reader: one is filled from the page cache while the other goes to the device.
# Page-locking costs time too, so no more than these 128 MiB are.
_READERS = 8
_STAGING_BYTES = 8 << 20


def numpy_dtype(dtype: str) -> "np.dtype":
    """Return how numpy holds values of this dtype: bfloat16, which it lacks, as their 16 bits."""
    import numpy as np

    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


class Tensor(NamedTuple):
    """A contiguous tensor at an address of the host or of the GPU; `owner` keeps it there."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * item_bytes(self.dtype)


def target_dtype(one: Stored, dtype: str | None) -> str:
    return dtype if dtype is not None and one.dtype in _FLOATS else one.dtype


# --- on the host -----------------------------------------------------------------------------


def map_tensor(one: Stored) -> Tensor:
    """Return the tensor within the mapped file; what is written to it never reaches the file."""
    mapping = _map_file(one.path, os.stat(one.path).st_mtime_ns)
    if one.begin + one.nbytes > len(mapping):
        raise EnvironmentProblemError(f"{one.path} was cut off while it was opened: try again")
    owner: Any = mapping
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + one.begin
    if one.begin % item_bytes(one.dtype):  # writers align tensors, the format does not demand it
        owner = ctypes.create_string_buffer(one.nbytes)
        ctypes.memmove(owner, address, one.nbytes)
        address = ctypes.addressof(owner)
    return Tensor(address, one.shape, one.dtype, owner)


@functools.cache  # a file is mapped once, and for as long as this process lives
def _map_file(path: Path, changed: int) -> mmap.mmap:
    """Return the file's bytes, of which the page cache is the only copy until one is written."""
    private = mmap.MAP_PRIVATE | _NO_RESERVE
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return mmap.mmap(file.fileno(), size, private, mmap.PROT_READ | mmap.PROT_WRITE)


def convert(values: "np.ndarray", dtype: str, target: str) -> "np.ndarray":
    """Return values, held as `numpy_dtype(dtype)`, in another dtype; rounded to nearest even."""
    import numpy as np

    if dtype == target:
        return values
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if target != "bfloat16":
        return values.astype(numpy_dtype(target))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000  # whose rounding could make it infinite
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def converted(tensor: Tensor, dtype: str) -> Tensor:
    """Return the tensor of the host in another dtype: a copy, unless it has that dtype."""
    if tensor.dtype == dtype:
        return tensor
    import numpy as np

    raw = (ctypes.c_char * tensor.nbytes).from_address(tensor.address)
    values = convert(np.frombuffer(raw, numpy_dtype(tensor.dtype)), tensor.dtype, dtype)
    return Tensor(values.ctypes.data, tensor.shape, dtype, values)


# --- to the device ---------------------------------------------------------------------------


class Upload:
    """Tensors that have their places, and the threads that still carry bytes there."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.threads: list[threading.Thread] = []
        self.failures: list[Exception] = []

    def wait(self) -> dict[str, Tensor]:
        """Return the tensors once their bytes are there. Raises the first error of a reader."""
        for thread in self.threads:
            thread.join()
        if self.failures:
            raise self.failures[0]
        return self.tensors


def start_upload(
    stored: Mapping[str, Stored], device: str, dtype: str | None = None, base: int | None = None
) -> Upload:
    """Return the tensors by the same names on `device`; `wait` for their bytes before use.

    Floating-point tensors become `dtype`, or stay as they are stored. Two names of the same
    `Stored` share a tensor. On a GPU they go to the address `base`, which the caller owns, laid out
    as `device_layout` says, or else to memory made here: zeros, so that a warm-up before the bytes
    are there computes with ordinary numbers. On a CPU there is nothing to wait for.
    """
    if device != "cuda":
        return Upload(_on_host(stored, dtype))
    offsets, total = device_layout(stored, dtype)
    memory = None if base is not None else cuda.DeviceMemory(total)
    if memory:
        base = memory.address
        cuda.runtime().cudaDeviceSynchronize()  # the zeros come before the bytes
    places = {
        one: Tensor(base + offset, one.shape, target_dtype(one, dtype), memory)
        for one, offset in offsets.items()
    }
    upload = Upload({name: places[one] for name, one in stored.items()})
    # opened here: the caller may close or replace the files as soon as this returns
    files = {path: open(path, "rb", buffering=0) for path in {one.path for one in places}}  # noqa: SIM115
    work: SimpleQueue = SimpleQueue()
    for one, place in places.items():
        for piece in _cut(one, place):
            work.put((files[one.path], *piece))
    arguments = (work, upload.failures)
    upload.threads = [threading.Thread(target=_carry, args=arguments) for _ in range(_READERS)]
    for thread in upload.threads:
        thread.start()
    return upload


def device_layout(
    stored: Mapping[str, Stored], dtype: str | None = None
) -> tuple[dict[Stored, int], int]:
    """Return where each tensor begins in one block of device memory, and the block's bytes."""
    offsets, total = {}, 0
    for one in dict.fromkeys(stored.values()):
        offsets[one] = total
        nbytes = one.elements * item_bytes(target_dtype(one, dtype))
        total += -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return offsets, total


def _on_host(stored: Mapping[str, Stored], dtype: str | None) -> dict[str, Tensor]:
    tensors = {}
    for one in set(stored.values()):
        tensors[one] = converted(map_tensor(one), target_dtype(one, dtype))
    return {name: tensors[one] for name, one in stored.items()}


def _cut(one: Stored, place: Tensor) -> Iterator[tuple[int, str, int, str, int]]:
    """Yield (file offset, its dtype, address, dtype there, values), at most a staging buffer."""
    read, written = item_bytes(one.dtype), item_bytes(place.dtype)
    step = _STAGING_BYTES // max(read, written)
    for first in range(0, one.elements, step):
        count = min(step, one.elements - first)
        yield (
            one.begin + first * read, one.dtype, place.address + first * written, place.dtype, count
        )  # fmt: skip


def _carry(work: SimpleQueue, failures: list[Exception]) -> None:
    """Take pieces until none is left: page cache -> page-locked buffer -> device, two in flight."""
    try:
        cuda.runtime().cudaSetDevice(0)  # of this thread
        stream = cuda.Stream()
        buffers = [(cuda.HostMemory(_STAGING_BYTES), cuda.Event()) for _ in range(2)]
        turn = 0
        with suppress(Empty):
            while not failures:
                file, begin, dtype, address, target, count = work.get_nowait()
                memory, copied = buffers[turn]
                copied.wait()  # at once, if never recorded
                nbytes = count * item_bytes(target)
                _read_into(file.fileno(), memory.view[:nbytes], begin, dtype, target)
                stream.upload(address, memory.address, nbytes)
                copied.record(stream)
                turn = 1 - turn
        stream.wait()
    except (OSError, EnvironmentProblemError) as error:  # for the thread that waits
        failures.append(error)


def _read_into(descriptor: int, target: memoryview, begin: int, dtype: str, wanted: str) -> None:
    """Fill `target` from the file, converted to `wanted`. preadv lets go of the GIL."""
    if dtype != wanted:
        count = len(target) // item_bytes(wanted)
        import numpy as np

        values = np.empty(count, numpy_dtype(dtype))
        _read_into(descriptor, memoryview(values).cast("B"), begin, dtype, dtype)
        target[:] = memoryview(convert(values, dtype, wanted)).cast("B")
        return
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], begin + done)
        if count == 0:
            raise OSError(f"the file of weights ended at byte {begin + done} while it was read")
        done += count
