"""Bring tensors from files to the device: one copy there, and none besides it in host memory.

A tensor is named by where its bytes lie, `Stored`: in a checkpoint's safetensors, or in any other
file that holds them as they are. On the CPU it becomes a view of the mapped file; to a GPU threads
carry it through page-locked memory, while the caller works with tensors that have their places:

    upload = start_upload(list_checkpoint(folder), torch.device("cuda"), torch.bfloat16)
    ...                      # upload.tensors can be bound, also captured, but not yet believed
    tensors = upload.wait()  # name -> tensor
"""

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip

# Where a tensor begins on the device, as CUDA's allocator has it; generated kernels assume 16.
_ALIGNMENT_BYTES = 512
# Two buffers per reader: one is filled from the page cache while the other goes to the device.
# Page-locking costs time too, so no more than these 128 MiB are.
_READERS = 8
_STAGING_BYTES = 8 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: its bytes begin at offset `begin` of `path`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


def list_checkpoint(folder: Path) -> dict[str, Stored]:
    """Return the folder's tensors by name, from model.safetensors or the shards of its index."""
    shards, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / shards[0]).exists():
        if not index.exists():
            raise FileNotFoundError(f"no {shards[0]} or {index.name} in {folder}")
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return {stored.name: stored for name in shards for stored in read_header(folder / name)}


def read_header(path: Path) -> list[Stored]:
    """Return what a safetensors file holds. Raises ValueError if it is cut off or not one.

    https://huggingface.co/docs/safetensors: 8 bytes little-endian header length, a JSON header
    {name: {dtype, shape, data_offsets}}, then the tensors' bytes. The safetensors package does not
    tell the offsets, which staging needs.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{path} is cut off or no safetensors file: download it again")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    stored = []
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensor = Stored(name, path, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin)
        if end > size or end - begin != tensor.nbytes:
            raise ValueError(f"{path} is cut off or damaged at {name}: download it again")
        stored.append(tensor)
    return stored


@dataclass
class Upload:
    """Tensors that have their places, and the threads that still carry bytes there."""

    tensors: dict[str, torch.Tensor]
    threads: list[threading.Thread] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)

    def wait(self) -> dict[str, torch.Tensor]:
        """Return the tensors once their bytes are there. Raises the first error of a reader."""
        for thread in self.threads:
            thread.join()
        if self.failures:
            raise self.failures[0]
        return self.tensors


def start_upload(
    stored: Mapping[str, Stored], device: torch.device, dtype: torch.dtype | None = None
) -> Upload:
    """Return the tensors by the same names on `device`; `wait` for their bytes before use.

    Floating-point tensors become `dtype`, or stay as they are stored. Two names of the same
    `Stored` share a tensor. On the CPU there is nothing to wait for.
    """
    if device.type != "cuda":
        return Upload(_map_files(stored, dtype))
    dtypes = {one: target_dtype(one, dtype) for one in stored.values()}
    offsets, total = {}, 0
    for one, kind in dtypes.items():
        offsets[one] = total
        total += -(-one.count * kind.itemsize // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    # zeros, not empty: a warm-up before the bytes are there computes with ordinary numbers
    pool = torch.zeros(total, dtype=torch.uint8, device=device)
    places = {}
    for one, kind in dtypes.items():
        raw = pool[offsets[one] :][: one.count * kind.itemsize]
        places[one] = raw.view(kind).view(one.shape)
    upload = Upload({name: places[one] for name, one in stored.items()})
    # the zeros are written by work that is queued on this stream
    ready = torch.cuda.current_stream(device).record_event()
    # opened here: the caller may close or replace the files as soon as this returns
    files = {path: open(path, "rb", buffering=0) for path in {one.path for one in places}}  # noqa: SIM115
    work: SimpleQueue = SimpleQueue()
    for one, place in places.items():
        for begin, part in _cut(one, place):
            work.put((files[one.path], begin, one.dtype, part))
    arguments = (work, device, ready, upload.failures)
    upload.threads = [threading.Thread(target=_read, args=arguments) for _ in range(_READERS)]
    for thread in upload.threads:
        thread.start()
    return upload


def target_dtype(one: Stored, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and one.dtype.is_floating_point else one.dtype


def _map_files(stored: Mapping[str, Stored], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Return tensors that view the mapped files: the page cache is their only copy."""
    files = {
        # shared=False: a private mapping, through which nothing can write to the file
        path: torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        for path in {one.path for one in stored.values()}
    }
    views = {}
    for one in set(stored.values()):
        raw = torch.empty(0, dtype=torch.uint8).set_(files[one.path], one.begin, (one.nbytes,))
        if one.begin % one.dtype.itemsize:
            raw = raw.clone()  # writers align tensors, the format does not demand it
        views[one] = raw.view(one.dtype).view(one.shape).to(target_dtype(one, dtype))
    return {name: views[one] for name, one in stored.items()}


def _cut(one: Stored, place: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (file offset, where it goes: a flat part), each at most a staging buffer to read."""
    flat, items = place.view(-1), _STAGING_BYTES // one.dtype.itemsize
    for first in range(0, one.count, items):
        yield one.begin + first * one.dtype.itemsize, flat[first : first + items]


def _read(work: SimpleQueue, device: torch.device, ready, failures: list[Exception]) -> None:
    """Take pieces until none is left: page cache -> page-locked buffer -> device, two in flight."""
    try:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream), suppress(Empty):
            stream.wait_event(ready)
            buffers = torch.empty(2, _STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
            copied = [torch.cuda.Event(), torch.cuda.Event()]
            turn = 0
            while not failures:
                file, begin, dtype, part = work.get_nowait()
                copied[turn].synchronize()  # at once, if never recorded
                staged = buffers[turn][: part.numel() * dtype.itemsize]
                _read_into(file.fileno(), staged, begin)
                staged = staged.view(dtype)
                if dtype != part.dtype:  # converted over there: a copy would do it here
                    staged = staged.to(device, non_blocking=True)
                part.copy_(staged, non_blocking=True)
                copied[turn].record()
                turn = 1 - turn
        stream.synchronize()
    except (OSError, RuntimeError) as error:  # for the thread that waits; RuntimeError is CUDA's
        failures.append(error)


def _read_into(descriptor: int, buffer: torch.Tensor, begin: int) -> None:
    """Fill a host tensor of bytes from the file. preadv lets go of the GIL."""
    target, done = buffer.numpy(), 0
    while done < len(target):
        count = os.preadv(descriptor, [target[done:]], begin + done)
        if count == 0:
            raise OSError(f"the file of weights ended at byte {begin + done} while it was read")
        done += count
