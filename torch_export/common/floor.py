"""The least that any start must do, measured: the floor that the benchmark's modes stand on.

    python common/floor.py --model-id random:tiny --device cpu

A process that starts Python, imports torch, opens the device and brings the checkpoint's bytes to
it, and nothing else. Its time to first token is the moment when the bytes are there. The same run
then measures the device's copy bandwidth, which decode is put in relation to. As a trial of the
benchmark it is the mode `floor`.
"""

import ctypes
import json
import os
import statistics
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script of its own

from common.cli import flag, parse_flags, to_argv
from common.console import Console
from common.errors import UsageError, run_script
from common.flags import SharedFlags

if TYPE_CHECKING:
    import torch

PIECE_BYTES = 8 << 20
READERS = 8
# bytes of one buffer: a copy reads it and writes another, far beyond any cache on a GPU
COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
COPIES = 7

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class FloorFlags:
    """floor"""

    presets_folder: Path = flag(
        Path(__file__).resolve().parent.parent / "artifacts/checkpoints", "where presets lie"
    )


def floor_command(shared: SharedFlags, presets_folder: Path, console: Console) -> list[str]:
    """Return the command of one floor trial.

    The model is looked up here, in the parent: a trial must not pay for asking the Hub.
    """
    from common.checkpoints import resolve_checkpoint

    checkpoint = resolve_checkpoint(shared.model_id, presets_folder, console)
    trial = replace(shared, model_id=str(checkpoint.folder), json=None, quiet=False)
    return [__file__, *to_argv(trial, FloorFlags(presets_folder))]


def main(argv: Sequence[str]) -> None:
    shared, flags = parse_flags(__doc__, (SharedFlags, FloorFlags), argv)
    console = Console(shared.quiet)
    document = run(shared, flags, console)
    from common.results import write_json
    from common.tables import run_table

    write_json(document, shared.json)
    console.result(run_table(document))
    rate = document["bandwidth"]["copy_bytes_per_second"]
    console.result(f"copy bandwidth: {rate / 1e9:.1f} GB/s (bytes read + written)")


def run(shared: SharedFlags, flags: FloorFlags, console: Console) -> dict:
    """Bring the bytes to the device, then measure its copy bandwidth; return the run's result."""
    from common.stopwatch import Stages, process_start

    stages = Stages(process_start())
    import torch

    from common.checkpoints import resolve_checkpoint
    from common.devices import choose_device, choose_dtype, synchronize

    stages.close("interpreter and imports")
    checkpoint = resolve_checkpoint(shared.model_id, flags.presets_folder, console)
    device = choose_device(shared.device)
    torch.empty(1, device=device)  # opens the device: CUDA makes its context here
    synchronize(device)
    stages.close("device")
    weights = bring_weights(checkpoint.folder, device)
    synchronize(device)
    stages.close("weights")
    there_seconds = stages.elapsed()
    weight_bytes = weights.numel()
    del weights  # the copies want its room
    rates = copy_rates(device)
    from common.measures import run_metrics
    from common.results import config_of, run_header

    metrics = run_metrics([], there_seconds, stages.elapsed())
    item_bytes = ITEM_BYTES[str(choose_dtype(shared.dtype, device)).removeprefix("torch.")]
    return {
        **run_header("floor", "floor", config_of(shared, flags)),
        "metrics": metrics | {"ttft_cold_start_seconds": there_seconds},
        "stages": stages.seconds,
        "requests": [],
        "compile": {},
        "output": None,
        "bandwidth": {
            "copy_bytes_per_second": statistics.median(rates),
            "copies_bytes_per_second": rates,
            "buffer_bytes": COPY_BYTES[device.type],
            "checkpoint_bytes": weight_bytes,
            "checkpoint_bytes_per_second": weight_bytes / stages.seconds["weights"],
            **bytes_per_token(checkpoint.folder, checkpoint.config, item_bytes),
        },
    }


def bring_weights(folder: Path, device: "torch.device") -> "torch.Tensor":
    """Return the data of all safetensors files of `folder` as (bytes,) uint8 on `device`.

    Several threads: one alone cannot keep the bus busy. Whoever has a faster way swaps it in here.
    """
    import torch

    pieces, total = SimpleQueue(), 0
    for path in weight_files(folder):
        begin, end = data_extent(path)
        for position in range(begin, end, PIECE_BYTES):
            pieces.put((path, position, total + position - begin, min(PIECE_BYTES, end - position)))
        total += end - begin
    pool = torch.empty(total, dtype=torch.uint8, device=device)
    failures: list[Exception] = []

    def read() -> None:
        try:
            _read_pieces(pieces, pool)
        except (OSError, RuntimeError) as error:  # for the thread that waits; RuntimeError: CUDA
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(READERS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    if failures:
        raise failures[0]
    return pool


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the checkpoint's weights: one, or the shards of its index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        shards = json.loads(index.read_bytes())["weight_map"].values()
        return [folder / name for name in sorted(set(shards))]
    if not single.is_file():
        raise UsageError(f"{folder} has no model.safetensors: only safetensors can be read")
    return [single]


def data_extent(path: Path) -> tuple[int, int]:
    """Return where the tensors' bytes begin and end in a safetensors file."""
    with path.open("rb") as file:
        prefix = file.read(8)
        size = path.stat().st_size
        begin = 8 + struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size + 1
    if begin > size:
        raise UsageError(f"{path} is not a whole safetensors file: download it again")
    return begin, size


def tensor_sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield name and number of elements of every tensor in the checkpoint."""
    for path in weight_files(folder):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for length in entry["shape"]:
                    count *= length
                yield name, count


def bytes_per_token(folder: Path, config: dict, item_bytes: int) -> dict:
    """Return the bytes that decoding one token must read at least, at batch size 1.

    weights: every one once, except the embedding table, of which one row is looked up. A tied
    table is read whole as the output layer. KV cache: per slot 2 (K and V) * layers * KV heads *
    head dimension; how many slots depends on the request.
    """
    sizes = dict(tensor_sizes(folder))
    tied = config.get("tie_word_embeddings", False)
    unread = "lm_head.weight" if tied else "model.embed_tokens.weight"
    elements = sum(
        count
        for name, count in sizes.items()
        if name != unread and not name.endswith("rotary_emb.inv_freq")
    )
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "weight_bytes_per_token": elements * item_bytes,
        "kv_bytes_per_slot": 2 * config["num_hidden_layers"] * kv_heads * head_dim * item_bytes,
    }


def copy_rates(device: "torch.device") -> list[float]:
    """Return bytes read + written per second of several copies within the device's memory."""
    import torch

    from common.devices import synchronize

    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    # one copy of 1 GiB takes a GPU half a millisecond: several between two reads of the clock
    batch = 16 if device.type == "cuda" else 1
    rates = []
    for turn in range(COPIES + 2):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(batch):
            target.copy_(source)
        synchronize(device)
        if turn >= 2:  # the first ones warm up
            rates.append(2 * source.numel() * batch / (time.perf_counter() - began))
    return rates


def _read_pieces(pieces: SimpleQueue, pool: "torch.Tensor") -> None:
    """Take pieces until none is left: page cache -> page-locked buffer -> device."""
    import torch

    files: dict[Path, int] = {}
    on_gpu = pool.device.type == "cuda"
    buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True) if on_gpu else None
    stream = torch.cuda.Stream(pool.device) if on_gpu else None
    try:
        while True:
            try:
                path, position, place, length = pieces.get_nowait()
            except Empty:
                return
            if path not in files:
                files[path] = os.open(path, os.O_RDONLY)
            target = pool[place : place + length]
            if not on_gpu:
                _read_into(files[path], target, position)
                continue
            _read_into(files[path], buffer[:length], position)
            with torch.cuda.stream(stream):
                target.copy_(buffer[:length], non_blocking=True)
            stream.synchronize()  # while this thread waits, the others fill their buffers
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def _read_into(descriptor: int, target: "torch.Tensor", position: int) -> None:
    """Fill a host tensor of bytes from the file. preadv lets go of the interpreter's lock."""
    memory = memoryview((ctypes.c_char * target.numel()).from_address(target.data_ptr()))
    memory, done = memory.cast("B"), 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], position + done)
        if count == 0:
            raise OSError(f"the checkpoint ended at byte {position + done} while it was read")
        done += count


if __name__ == "__main__":
    run_script(main)
