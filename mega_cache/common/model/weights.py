"""Bring tensors from files to the device: one copy there, and none besides it in host memory.

A tensor is named by where its bytes lie, `Stored`: in a checkpoint's safetensors, or in any other
file that holds them as they are. What comes of it is a `Tensor`, a place in memory: on a CPU within
the mapped file; on a GPU threads carry it there through page-locked memory, while the caller works
with tensors that have their places:

    upload = start_upload(list_stored(folder), "cuda", "bfloat16", convert)
    ...                      # upload.tensors can be bound, also captured, but not yet believed
    tensors = upload.wait()  # name -> tensor

Neither torch nor transformers is imported here, nor numpy: the caller says what converts.
"""

import ctypes
import functools
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from common import cuda
from common.errors import EnvironmentProblemError
from common.model.stored import Stored, item_bytes

# MAP_NORESERVE of Linux, which Python names from 3.11 on: a model in the page cache is no memory
# that the system would have to promise
_NO_RESERVE = 0x4000
_POPULATE_READ = 22  # MADV_POPULATE_READ
# of the host: (address, its dtype, another address, its dtype, how many values) -> None
Convert = Callable[[int, str, int, str, int], None]
_FLOATS = ("float64", "float32", "float16", "bfloat16")

# Where a tensor begins on the device, as CUDA's allocator has it; generated kernels assume 16.
_ALIGNMENT_BYTES = 512
# Two buffers per reader: one is filled from the page cache while the other goes to the device.
# Page-locking costs time too, so no more than these 128 MiB are.
_READERS = 8
_STAGING_BYTES = 8 << 20


class Tensor(NamedTuple):
    """A contiguous tensor at an address of the host or of the GPU; `owner` keeps it there."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * item_bytes(self.dtype)

    def at(self, element: int) -> int:
        """Return the address of an element, counted from the first."""
        return self.address + element * item_bytes(self.dtype)


def target_dtype(one: Stored, dtype: str | None) -> str:
    return dtype if dtype is not None and one.dtype in _FLOATS else one.dtype


# --- on the host -----------------------------------------------------------------------------


def map_tensor(one: Stored) -> Tensor:
    """Return the tensor within the mapped file; what is written to it never reaches the file."""
    mapping = _map_file(one.path, os.stat(one.path).st_mtime_ns)
    owner: Any = mapping
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + one.begin
    if one.begin % item_bytes(one.dtype):  # writers align tensors, the format does not demand it
        owner = ctypes.create_string_buffer(one.nbytes)
        ctypes.memmove(owner, address, one.nbytes)
        address = ctypes.addressof(owner)
    return Tensor(address, one.shape, one.dtype, owner)


def map_pages(stored: Iterable[Stored]) -> None:
    """Have threads map the pages of these tensors' files, which else the first use does one by one.

    That takes 40 ms of 540 MB in the page cache; a start has other things to do meanwhile.
    """

    def populate(mapping: mmap.mmap) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        # on failure (Linux before 5.14) they come with their first use
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(address), ctypes.c_size_t(len(mapping)), _POPULATE_READ
        )

    for path in {one.path for one in stored}:
        mapping = _map_file(path, os.stat(path).st_mtime_ns)
        threading.Thread(target=populate, args=(mapping,), daemon=True).start()


@functools.cache  # a file is mapped once, and for as long as this process lives
def _map_file(path: Path, changed: int) -> mmap.mmap:
    """Return the file's bytes, of which the page cache is the only copy until one is written."""
    private = mmap.MAP_PRIVATE | _NO_RESERVE
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return mmap.mmap(file.fileno(), size, private, mmap.PROT_READ | mmap.PROT_WRITE)


# --- to the device ---------------------------------------------------------------------------


class Upload:
    """Tensors that have their places, and the threads that still bring bytes there."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.threads: list[threading.Thread] = []
        self.failures: list[Exception] = []

    def start(self, threads: int, bring: Callable[[], None]) -> None:
        """Have so many threads bring the bytes."""

        def run() -> None:
            try:
                bring()
            except (OSError, EnvironmentProblemError) as error:  # for the thread that waits
                self.failures.append(error)

        self.threads = [threading.Thread(target=run) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def wait(self) -> dict[str, Tensor]:
        """Return the tensors once their bytes are there. Raises the first error of a reader."""
        for thread in self.threads:
            thread.join()
        if self.failures:
            raise self.failures[0]
        return self.tensors


def start_upload(
    stored: Mapping[str, Stored], device: str, dtype: str | None, convert: Convert,
    base: int | None = None,
) -> Upload:  # fmt: skip
    """Return the tensors by the same names on `device`; `wait` for their bytes before use.

    Floating-point tensors become `dtype`, or stay as they are stored. Two names of the same
    `Stored` share a tensor. On a GPU they go to the address `base`, which the caller owns, laid out
    as `device_layout` says, or else to memory made here: zeros, so that a warm-up before the bytes
    are there computes with ordinary numbers. `convert` is called in several threads.
    """
    if device != "cuda":
        return _start_on_host(stored, dtype, convert)
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
    mapped = {one: map_tensor(one) for one in places if one.dtype != places[one].dtype}
    pieces = [(one, *piece) for one in places for piece in _cut(one, places[one])]
    left = iter(pieces)  # each thread takes the next
    upload.start(_READERS, lambda: _carry(left, places, files, mapped, convert))
    return upload


def _start_on_host(stored: Mapping[str, Stored], dtype: str | None, convert: Convert) -> Upload:
    """Return the tensors within the mapped files, but converted ones in memory of their own."""
    mapped = {one: map_tensor(one) for one in stored.values()}
    others = {n: one for n, one in stored.items() if target_dtype(one, dtype) != one.dtype}
    offsets, total = device_layout(others, dtype)
    # private: shared ones, Python's default, are never of 2 MiB, of which a token reads faster
    pages = mmap.mmap(-1, max(total, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # where there are such
        pages.madvise(mmap.MADV_HUGEPAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    places = mapped | {
        one: Tensor(base + offset, one.shape, target_dtype(one, dtype), pages)
        for one, offset in offsets.items()
    }
    pieces = [(one, *piece) for one in offsets for piece in _cut(one, places[one])]
    left = iter(pieces)  # each thread takes the next

    def bring() -> None:
        for one, first, count in left:
            source, place = mapped[one].at(first), places[one].at(first)
            convert(source, one.dtype, place, places[one].dtype, count)

    upload = Upload({name: places[one] for name, one in stored.items()})
    upload.start(min(len(pieces), len(os.sched_getaffinity(0))), bring)
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


def _cut(one: Stored, place: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (first element, how many): pieces that fit into a staging buffer."""
    step = _STAGING_BYTES // item_bytes(place.dtype)
    for first in range(0, one.elements, step):
        yield first, min(step, one.elements - first)


def _carry(
    pieces: Iterator[tuple[Stored, int, int]], places: Mapping[Stored, Tensor],
    files: Mapping[Path, FileIO], mapped: Mapping[Stored, Tensor], convert: Convert,
) -> None:  # fmt: skip
    """Take pieces until none is left: page cache -> page-locked buffer -> device, two in flight."""
    cuda.runtime().cudaSetDevice(0)  # of this thread
    stream = cuda.Stream()
    buffers = [(cuda.HostMemory(_STAGING_BYTES), cuda.Event()) for _ in range(2)]
    for one, first, count in pieces:
        place, (memory, copied) = places[one], buffers[0]
        nbytes = count * item_bytes(place.dtype)
        copied.wait()  # at once, if never recorded
        if one in mapped:
            convert(mapped[one].at(first), one.dtype, memory.address, place.dtype, count)
        else:
            begin = one.begin + first * item_bytes(one.dtype)
            _read_into(files[one.path].fileno(), memory.view[:nbytes], begin)
        stream.copy(place.at(first), memory.address, nbytes)
        copied.record(stream)
        buffers.reverse()
    stream.wait()


def _read_into(descriptor: int, target: memoryview, begin: int) -> None:
    """Fill `target` from the file. preadv lets go of the GIL."""
    done = 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], begin + done)
        if count == 0:
            raise OSError(f"the file of weights ended at byte {begin + done} while it was read")
        done += count
