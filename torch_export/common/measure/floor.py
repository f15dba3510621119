"""The least that any start must do, measured: the floor that the benchmark's modes stand on.

    python common/measure/floor.py --model-id random:tiny --device cpu

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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs as a script of its own

from common import cuda
from common.cli import FLOOR, Console, SharedFlags, config_of, parse_flags
from common.errors import run_script
from common.machine import environment
from common.measure.measures import Stages, process_start, run_metrics
from common.measure.report import SCHEMA, write_json

# Bytes of one buffer: a copy reads it and writes another, far beyond any cache on a GPU. And copies
# between two reads of the clock: one of 1 GiB takes a GPU half a millisecond.
_COPIED = {"cuda": (1 << 30, 16), "cpu": (256 << 20, 1)}


def main(argv: Sequence[str]) -> None:
    (shared,) = parse_flags(__doc__, (SharedFlags,), argv)
    console = Console(shared.quiet)
    stages = Stages(process_start())
    cuda.open_early(shared.device != "cpu")
    import torch

    from common.model.target import choose_target
    from common.model.weights import start_upload

    stages.close("imports")
    target = choose_target(shared, console)
    torch.empty(1, device=target.device)  # opens the device: CUDA makes its context here
    _synchronize(target.device)
    stages.close("device")
    stored = target.checkpoint.stored
    if target.device == "cuda":
        start_upload(stored, target.device).wait()
    else:
        for path in {tensor.path for tensor in stored.values()}:
            path.read_bytes()
    stages.close("weights")
    there_seconds = stages.elapsed()
    rates = copy_rates(target.device)
    rate = statistics.median(rates)
    checkpoint_bytes = sum(tensor.nbytes for tensor in stored.values())
    metrics = run_metrics([], there_seconds, stages.elapsed())
    document = {
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
            "copy_bytes_per_second": rate,
            "copies_bytes_per_second": rates,
            "checkpoint_bytes": checkpoint_bytes,
            "checkpoint_bytes_per_second": checkpoint_bytes / stages.seconds["weights"],
        },
    }
    write_json(document, shared.json)
    console.result(f"weights on the device after {there_seconds:.2f} s")
    console.result(f"copy bandwidth: {rate / 1e9:.1f} GB/s (bytes read + written)")


def copy_rates(device: str) -> list[float]:
    """Return bytes read + written per second of several copies within the device's memory."""
    import torch

    size, copies = _COPIED[device]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, rates = torch.zeros_like(source), []
    for _ in range(9):
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        _synchronize(device)
        rates.append(2 * size * copies / (time.perf_counter() - began))
    return rates[2:]  # the first ones warm up


def _synchronize(device: str) -> None:
    if device == "cuda":
        cuda.runtime().cudaDeviceSynchronize()


if __name__ == "__main__":
    run_script(main)
