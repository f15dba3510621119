"""The least that any start must do, measured: the floor that the benchmark's modes stand on.

    python common/measure/floor.py --model-id random:tiny --device cpu

A process that starts Python, imports torch, opens the device and brings the checkpoint's bytes to
it, and nothing else. Its time to first token is the moment when the bytes are there. The same run
then measures the bandwidth at which the device reads its memory, which decode is put in relation
to. As a trial of the benchmark it is the mode `floor`.
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

# Bytes read at once, far beyond any cache of the device. And how often between two reads of the
# clock: 2 GiB take a GPU half a millisecond.
_READ = {"cuda": (2 << 30, 16), "cpu": (512 << 20, 1)}


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
        start_upload(stored, target.device, None, lambda *place: None).wait()
    else:
        for path in {tensor.path for tensor in stored.values()}:
            path.read_bytes()
    stages.close("weights")
    there_seconds = stages.elapsed()
    rates = read_rates(target.device)
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
            "read_bytes_per_second": rate,
            "reads_bytes_per_second": rates,
            "checkpoint_bytes": checkpoint_bytes,
            "checkpoint_bytes_per_second": checkpoint_bytes / stages.seconds["weights"],
        },
    }
    write_json(document, shared.json)
    console.result(f"weights on the device after {there_seconds:.2f} s")
    console.result(f"read bandwidth: {rate / 1e9:.1f} GB/s")


def read_rates(device: str) -> list[float]:
    """Return bytes per second at which a sum reads the device's memory, several times."""
    import torch

    size, times = _READ[device]
    source, rates = torch.ones(size // 4, dtype=torch.float32, device=device), []
    for _ in range(9):
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(times):
            source.sum()
        _synchronize(device)
        rates.append(size * times / (time.perf_counter() - began))
    return rates[2:]  # the first ones warm up


def _synchronize(device: str) -> None:
    if device == "cuda":
        cuda.runtime().cudaDeviceSynchronize()


if __name__ == "__main__":
    run_script(main)
