"""The least that any start must do, measured: the floor that the benchmark's modes stand on.

    python common/floor.py --model-id random:tiny --device cpu

A process that starts Python, imports torch, opens the device and brings the checkpoint's bytes to
it, and nothing else. Its time to first token is the moment when the bytes are there. The same run
then measures the device's copy bandwidth, which decode is put in relation to. As a trial of the
benchmark it is the mode `floor`.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script of its own

from common.cli import FLOOR, Console, SharedFlags, config_of, parse_flags
from common.errors import run_script
from common.measures import Stages, process_start, run_metrics
from common.report import SCHEMA, environment, write_json
from common.toolchain import open_driver

if TYPE_CHECKING:
    import torch

# bytes of one buffer: a copy reads it and writes another, far beyond any cache on a GPU
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}
_COPIES = 7


def main(argv: Sequence[str]) -> None:
    (shared,) = parse_flags(__doc__, (SharedFlags,), argv)
    console = Console(shared.quiet)
    document = run(shared, console)
    write_json(document, shared.json)
    seconds = document["metrics"]["ttft_cold_start_seconds"]
    rate = document["bandwidth"]["copy_bytes_per_second"]
    console.result(f"weights on the device after {seconds:.2f} s")
    console.result(f"copy bandwidth: {rate / 1e9:.1f} GB/s (bytes read + written)")


def run(shared: SharedFlags, console: Console) -> dict:
    """Bring the bytes to the device, then measure its copy bandwidth; return the run's result."""
    stages = Stages(process_start())
    open_driver(shared.device)
    import torch

    from common.target import choose_target, synchronize

    stages.close("imports")
    target = choose_target(shared, console)
    torch.empty(1, device=target.device)  # opens the device: CUDA makes its context here
    synchronize(target.device)
    stages.close("device")
    brought_bytes = bring_weights(target.checkpoint.folder, target.device)
    stages.close("weights")
    there_seconds = stages.elapsed()
    rates = copy_rates(target.device)
    metrics = run_metrics([], there_seconds, stages.elapsed())
    return {
        "schema": SCHEMA,
        "kind": "run",
        "approach": FLOOR,
        "mode": FLOOR,
        "environment": environment(),
        "config": config_of(shared),
        "metrics": metrics | {"ttft_cold_start_seconds": there_seconds},
        "stages": stages.seconds,
        "requests": [],
        "compile": {},
        "output": None,
        "bandwidth": {
            "copy_bytes_per_second": statistics.median(rates),
            "copies_bytes_per_second": rates,
            "checkpoint_bytes": brought_bytes,
            "checkpoint_bytes_per_second": brought_bytes / stages.seconds["weights"],
        },
    }


def bring_weights(folder: Path, device: "torch.device") -> int:
    """Bring the data of all safetensors files of `folder` to `device`; return its bytes."""
    from common.weights import list_checkpoint, start_upload

    stored = list_checkpoint(folder)
    if device.type == "cuda":
        start_upload(stored, device).wait()
    else:
        for path in {tensor.path for tensor in stored.values()}:
            path.read_bytes()
    return sum(tensor.nbytes for tensor in stored.values())


def copy_rates(device: "torch.device") -> list[float]:
    """Return bytes read + written per second of several copies within the device's memory."""
    import torch

    from common.target import synchronize

    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    # one copy of 1 GiB takes a GPU half a millisecond: several between two reads of the clock
    batch = 16 if device.type == "cuda" else 1
    rates = []
    for turn in range(_COPIES + 2):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(batch):
            target.copy_(source)
        synchronize(device)
        if turn >= 2:  # the first ones warm up
            rates.append(2 * source.numel() * batch / (time.perf_counter() - began))
    return rates


if __name__ == "__main__":
    run_script(main)
