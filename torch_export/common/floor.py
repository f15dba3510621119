"""The least that any start must do, measured: the floor that the benchmark's modes stand on.

    python common/floor.py --model-id random:tiny --device cpu

A process that starts Python, imports torch, opens the device and brings the checkpoint's bytes to
it, and nothing else. Its time to first token is the moment when the bytes are there. The same run
then measures the device's copy bandwidth, which decode is put in relation to. As a trial of the
benchmark it is the mode `floor`.
"""

import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a script of its own

from common.cli import flag, parse_flags, to_argv
from common.console import Console
from common.errors import run_script
from common.flags import SharedFlags

if TYPE_CHECKING:
    import torch

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
    from common.results import config_of, run_header
    from common.stopwatch import Stages, process_start

    stages = Stages(process_start())
    import torch

    from common.checkpoints import resolve_checkpoint
    from common.devices import choose_device, choose_dtype, synchronize
    from common.measures import run_metrics

    stages.close("interpreter and imports")
    checkpoint = resolve_checkpoint(shared.model_id, flags.presets_folder, console)
    device = choose_device(shared.device)
    torch.empty(1, device=device)  # opens the device: CUDA makes its context here
    synchronize(device)
    stages.close("device")
    brought_bytes = bring_weights(checkpoint.folder, device)
    stages.close("weights")
    there_seconds = stages.elapsed()
    rates = copy_rates(device)
    metrics = run_metrics([], there_seconds, stages.elapsed())
    dtype = str(choose_dtype(shared.dtype, device)).removeprefix("torch.")
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
            "checkpoint_bytes": brought_bytes,
            "checkpoint_bytes_per_second": brought_bytes / stages.seconds["weights"],
            **bytes_per_token(checkpoint.folder, checkpoint.config, ITEM_BYTES[dtype]),
        },
    }


def bring_weights(folder: Path, device: "torch.device") -> int:
    """Bring the data of all safetensors files of `folder` to `device`; return its bytes."""
    from common.weights import list_checkpoint, upload

    stored = list_checkpoint(folder)
    if device.type == "cuda":
        upload(stored, device)
    else:
        for path in {tensor.path for tensor in stored.values()}:
            path.read_bytes()
    return sum(tensor.end - tensor.begin for tensor in stored.values())


def bytes_per_token(folder: Path, config: dict, item_bytes: int) -> dict:
    """Return the bytes that decoding one token must read at least, at batch size 1.

    weights: every one once, except the embedding table, of which one row is looked up. A tied
    table is read whole as the output layer. KV cache: per slot 2 (K and V) * layers * KV heads *
    head dimension; how many slots depends on the request.
    """
    from common.weights import list_checkpoint

    tied = config.get("tie_word_embeddings", False)
    unread = "lm_head.weight" if tied else "model.embed_tokens.weight"
    elements = sum(
        math.prod(stored.shape)
        for name, stored in list_checkpoint(folder).items()
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


if __name__ == "__main__":
    run_script(main)
