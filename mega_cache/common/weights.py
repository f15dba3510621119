"""Bring a checkpoint's safetensors to the device: one copy there, none besides it in host memory.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, then the tensors' bytes. Read here and not through the
safetensors package because staging needs the offsets.
"""

import ctypes
import json
import os
import struct
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip

# Generated kernels assume pointers aligned to 16 bytes; a file aligns them to 2. CUDA's allocator:
# 512.
DEVICE_ALIGNMENT_BYTES = 512
# Two buffers per reader: one is filled from the page cache while the other goes to the device.
# Page-locking costs time too, so no more than these 128 MiB are.
READERS = 8
STAGING_BYTES = 8 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: bytes [begin, end) of `path`."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Expected:
    """A tensor that a package needs: a row of the `constants` in its metadata."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()
    values: tuple[float, ...] | None = None

    @classmethod
    def from_json(cls, row: Mapping) -> "Expected":
        values = row.get("values")
        return cls(
            row["name"],
            tuple(row["shape"]),
            row["dtype"],
            tuple(row.get("aliases", ())),
            None if values is None else tuple(values),
        )


def load_weights(
    folder: str | Path, expected: Iterable[Expected], device: str | torch.device, cast: bool = False
) -> dict[str, torch.Tensor]:
    """Return the expected tensors by the package's names, on `device`.

    On the CPU they are views of the mapped files. `cast` allows another dtype in the checkpoint,
    and converts it. Raises ValueError naming the tensors that are missing, left over, or of another
    shape or dtype, before a byte of them is read.
    """
    expected = list(expected)
    stored = list_checkpoint(Path(folder))
    plan = match(expected, stored, cast)
    device = torch.device(device)
    tensors = upload(plan, device) if device.type == "cuda" else map_files(plan)
    for row in expected:
        dtype = getattr(torch, row.dtype)
        if row.values is not None:
            tensors[row.name] = torch.tensor(row.values, dtype=dtype, device=device).view(row.shape)
        elif tensors[row.name].dtype != dtype:
            tensors[row.name] = tensors[row.name].to(dtype)
    return tensors


def list_checkpoint(folder: Path) -> dict[str, Stored]:
    """Return the folder's tensors by name, from model.safetensors or the shards of its index."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        paths = [single]
    elif index.exists():
        paths = [
            folder / name
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    else:
        raise FileNotFoundError(f"no model.safetensors or model.safetensors.index.json in {folder}")
    return {stored.name: stored for path in paths for stored in read_header(path)}


def read_header(path: Path) -> list[Stored]:
    """Return what a safetensors file holds. Raises ValueError if it is cut off or not one."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length + 8 > size:
            raise ValueError(
                f"{path} is not a whole safetensors file ({size} bytes): download it again"
            )
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    stored = []
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        tensor = Stored(name, path, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin, end)
        check_extent(tensor, size)
        stored.append(tensor)
    return stored


def check_extent(stored: Stored, file_bytes: int) -> None:
    count = 1
    for length in stored.shape:
        count *= length
    if stored.end > file_bytes or stored.end - stored.begin != count * stored.dtype.itemsize:
        raise ValueError(f"{stored.path} is cut off or damaged at {stored.name}: download it again")


def match(expected: list[Expected], stored: Mapping[str, Stored], cast: bool) -> dict[str, Stored]:
    """Return what to read for each expected name. Raises one ValueError naming all misfits."""
    plan, wrong, known = {}, [], set()
    for row in expected:
        names = (row.name, *row.aliases)
        known.update(names)
        if row.values is not None:
            continue
        found = next((stored[name] for name in names if name in stored), None)
        if found is None:
            wrong.append(f"missing {row.name}")
        elif found.shape != row.shape:
            wrong.append(f"{row.name} has shape {list(found.shape)}, not {list(row.shape)}")
        elif found.dtype != getattr(torch, row.dtype) and not cast:
            wrong.append(
                f"{row.name} is {str(found.dtype).removeprefix('torch.')}, not {row.dtype}"
            )
        else:
            plan[row.name] = found
    # Checkpoints of early Llamas hold the rope frequencies of every layer, which are computed
    # since.
    left = (
        name for name in stored if name not in known and not name.endswith("rotary_emb.inv_freq")
    )
    wrong += [f"not expected: {name}" for name in left]
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise ValueError(
            f"the checkpoint does not fit the package: {shown}. Rebuild the package for it"
        )
    return plan


def map_files(plan: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
    """Return tensors that view the mapped files: the page cache is their only copy."""
    files, tensors = {}, {}
    for name, stored in plan.items():
        if stored.path not in files:
            # shared=False: a private mapping, through which nothing can write to the file
            files[stored.path] = torch.UntypedStorage.from_file(
                str(stored.path), False, stored.path.stat().st_size
            )
        tensors[name] = view_bytes(files[stored.path], stored)
    return tensors


def view_bytes(storage: torch.UntypedStorage, stored: Stored) -> torch.Tensor:
    raw = torch.empty(0, dtype=torch.uint8).set_(
        storage, stored.begin, (stored.end - stored.begin,)
    )
    if stored.begin % stored.dtype.itemsize:
        raw = raw.clone()  # writers align tensors, the format does not demand it
    return raw.view(stored.dtype).view(stored.shape)


def upload(plan: Mapping[str, Stored], device: torch.device) -> dict[str, torch.Tensor]:
    """Return tensors on the CUDA device, cut from one allocation, once their bytes are there."""
    offsets, total = {}, 0
    for stored in plan.values():
        if stored not in offsets:
            offsets[stored] = total
            length = stored.end - stored.begin
            total += -(-length // DEVICE_ALIGNMENT_BYTES) * DEVICE_ALIGNMENT_BYTES
    pool = torch.empty(total, dtype=torch.uint8, device=device)
    # The allocation may reuse memory that work queued on this stream still writes.
    ready = torch.cuda.current_stream(device).record_event()
    run_readers(cut(offsets), pool, ready)
    tensors = {}
    for name, stored in plan.items():
        raw = pool[offsets[stored] : offsets[stored] + stored.end - stored.begin]
        tensors[name] = raw.view(stored.dtype).view(stored.shape)
    return tensors


def cut(offsets: Mapping[Stored, int]) -> Iterable[tuple[Path, int, int, int]]:
    """Yield (path, file offset, pool offset, bytes), at most a staging buffer each."""
    for stored, target in offsets.items():
        for begin in range(stored.begin, stored.end, STAGING_BYTES):
            length = min(STAGING_BYTES, stored.end - begin)
            yield stored.path, begin, target + begin - stored.begin, length


def run_readers(pieces: Iterable, pool: torch.Tensor, ready: torch.cuda.Event) -> None:
    """Copy all pieces into `pool` with READERS threads. Raises the first error that one met."""
    work, failures = SimpleQueue(), []
    files: dict[Path, int] = {}
    try:
        for piece in pieces:
            if piece[0] not in files:
                files[piece[0]] = os.open(piece[0], os.O_RDONLY)
            work.put(piece)
        readers = [
            threading.Thread(target=read_pieces, args=(work, files, pool, ready, failures))
            for _ in range(READERS)
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    if failures:
        raise failures[0]


def read_pieces(work, files, pool, ready, failures) -> None:
    """Take pieces until none is left: page cache -> page-locked buffer -> device, two in flight."""
    try:
        stream = torch.cuda.Stream(pool.device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            buffers = [
                torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)
            ]
            copied = [torch.cuda.Event(), torch.cuda.Event()]
            turn = 0
            while (piece := take(work)) is not None and not failures:
                path, begin, target, length = piece
                copied[turn].synchronize()  # at once, if never recorded
                read_into(files[path], buffers[turn], begin, length)
                pool[target : target + length].copy_(buffers[turn][:length], non_blocking=True)
                copied[turn].record()
                turn = 1 - turn
            stream.synchronize()
    except (OSError, RuntimeError) as error:  # for the thread that waits; RuntimeError is CUDA's
        failures.append(error)


def take(work: SimpleQueue):
    try:
        return work.get_nowait()
    except Empty:
        return None


def read_into(descriptor: int, buffer: torch.Tensor, begin: int, length: int) -> None:
    """Fill the first `length` bytes of a host tensor from the file. preadv lets go of the GIL."""
    target = memoryview((ctypes.c_char * length).from_address(buffer.data_ptr())).cast("B")
    done = 0
    while done < length:
        count = os.preadv(descriptor, [target[done:]], begin + done)
        if count == 0:
            raise OSError(f"the checkpoint file ended at byte {begin + done} while it was read")
        done += count
