"""Serving the requests of a run: timed, streamed, and told as the run's result."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from common import cuda
from common.cli import Console, config_of
from common.machine import environment
from common.measure import measures
from common.model.stored import item_bytes
from common.model.target import Target
from common.model.tokenizer import Generate, TextCodec, text_printer

if TYPE_CHECKING:
    from common.compiler.counts import Watch


def serve_requests(
    approach: str,
    mode: str,
    settings: Any,  # a folder's RunSettings
    target: Target,
    codec: TextCodec,
    prompts: Sequence[list[int]],
    generate: Generate,
    stages: measures.Stages,
    watch: "Watch | None",
    console: Console,
) -> dict[str, Any]:
    """Serve one prompt after another, streaming text to stdout; return the run's result.

    That is what ran, how, where, what it gave and what it took. Set-up ends with this call.
    """
    setup_seconds = stages.elapsed()
    # the same prompt again and again is shown once
    shows_all = settings.prompt.show_completions or settings.prompt.prompts_file is not None
    shown = len(prompts) if shows_all else 1
    served = [serve_one(prompt, generate, text_printer(codec)) for prompt in prompts[:shown]]
    if rest := prompts[shown:]:
        with console.bar(rest, "generate", "request") as bar:  # they show nothing else
            served += [serve_one(prompt, generate) for prompt in bar]
    requests, completions = zip(*served, strict=True)
    # request 1 up to its first token is prefill; all the rest of generation is decode
    stages.seconds["prefill"] = requests[0].ttft_seconds
    stages.close("decode")
    # imported here: they are no part of a start
    from common.compiler.counts import read_counts
    from common.measure.report import SCHEMA

    texts = [codec.decode(token_ids) for token_ids in completions]
    first = completions[0]
    same = [ids for prompt, ids in zip(prompts, completions, strict=True) if prompt == prompts[0]]
    return {
        "schema": SCHEMA,
        "kind": "run",
        "approach": approach,
        "mode": mode,
        "command": [sys.executable, *sys.argv],
        # asks git and a dozen files: for who keeps the result
        "environment": environment() if settings.shared.json else {},
        "config": config_of(settings),
        "metrics": measures.run_metrics(requests, setup_seconds, stages.elapsed()),
        "decode": _decode_rates(target, len(prompts[0]), requests),
        "stages": stages.seconds,
        "requests": [request._asdict() for request in requests],
        "compile": read_counts(watch),
        "device_memory": _device_memory(target),
        "output": {
            "prompt_tokens": len(prompts[0]),
            "new_tokens": len(first),
            "token_ids": first,
            "text": texts[0],
            "requests_identical": all(ids == first for ids in same),
        },
        "completions": texts,
    }


def _device_memory(target: Target) -> dict[str, int] | None:
    """Return the GPU's bytes in use, and the most that torch's tensors held; None on a CPU."""
    if target.device != "cuda":
        return None
    torch = sys.modules.get("torch")
    peak = torch.cuda.max_memory_allocated() if torch else None
    return {"used_bytes": cuda.used_bytes(), "peak_allocated_bytes": peak}


def serve_one(
    prompt: Any, generate: Callable[[Any, Callable[[int], None]], list[int]],
    show: Callable[[int | None], None] = lambda token_id: None,
) -> tuple[measures.Request, list[int]]:  # fmt: skip
    """Return what one request took and the new token ids; `show` gets each, and None at the end.

    `prompt` is what `generate` takes.
    """
    arrivals = []

    def on_token(token_id: int) -> None:
        arrivals.append(time.monotonic())
        show(token_id)

    began = time.monotonic()
    token_ids = generate(prompt, on_token)  # all of them are on the host: the device has finished
    seconds = time.monotonic() - began
    show(None)
    return measures.Request(seconds, arrivals[0] - began, len(token_ids)), token_ids


def _decode_rates(target: Target, prompt_tokens: int, requests: Sequence) -> dict:
    """Return what one token of the decode took, and the bytes that it must read at least.

    That is every weight once, except the embedding table, of which one row is looked up (a tied
    one is read whole as the output layer), and K and V of the slots that are filled on average:
    the prompt's and half of the new tokens', but neither masked ones nor padding.
    """
    checkpoint = target.checkpoint
    unread = () if checkpoint.tied else ("embed_tokens.weight",)
    read = [shape for name, shape in checkpoint.parameters.items() if not name.endswith(unread)]
    slot = math.prod(checkpoint.architecture[one] for one in ("layers", "kv_heads", "head_dim"))
    slots = prompt_tokens + requests[0].new_tokens / 2
    needed = (sum(map(math.prod, read)) + slots * 2 * slot) * item_bytes(target.dtype)
    seconds = measures.decode_seconds_per_token(requests)
    rate = measures.quotient(needed, seconds)
    peak = cuda.describe().bytes_per_second if target.device == "cuda" else None
    return {
        "seconds_per_token": seconds,
        "tokens_per_second": measures.quotient(1, seconds),
        "bytes_per_token": needed,
        "bytes_per_second": rate,
        "device_bytes_per_second": peak,
        "bandwidth_share": measures.quotient(rate, peak),
    }


def print_run(document: dict, console: Console) -> None:
    """Say how the run went in at most three lines on stderr; --verbose adds every measure."""
    from common.measure.report import markdown_table, number

    for line in run_lines(document):
        console.say(line)
    if console.verbose:
        metrics = document["metrics"]
        known = [one for one in measures.MEASURES if metrics[one.key] is not None]
        rows = [[one.label, f"{number(metrics[one.key])} {one.unit}"] for one in known]
        rows += [[f"stage: {name}", f"{took:.3f} s"] for name, took in document["stages"].items()]
        rows += [[name, number(count)] for name, count in document["compile"].items()]
        console.say(markdown_table(["measure", "value"], rows))


def run_lines(document: dict) -> list[str]:
    """Return what was loaded and whether it hit, when the first token came, and how fast."""
    metrics, stages, speed = document["metrics"], document["stages"], document["decode"]
    largest = sorted(stages.keys() - {"decode"}, key=stages.__getitem__, reverse=True)[:3]
    parts = ", ".join(f"{name} {stages[name]:.2f}" for name in largest)
    ready, first_token = metrics["setup_seconds"], metrics["ttft_cold_start_seconds"]
    lines = [
        _what_ran(document["artifact"], document["mode"], document["compile"]),
        f"ready after {ready:.2f} s, first token after {first_token:.2f} s ({parts})",
    ]
    if speed["seconds_per_token"]:
        text = f"decode {speed['tokens_per_second']:.1f} tokens/s"
        if speed["bytes_per_second"]:
            text += f", {speed['bytes_per_second'] / 1e9:.1f} GB/s"
        if speed["bandwidth_share"]:
            text += f" ({speed['bandwidth_share']:.0%} of the GPU's bandwidth)"
        lines.append(text)
    return lines


def _what_ran(artifact: dict | None, mode: str, counts: dict[str, int | None]) -> str:
    if artifact and "library" in artifact:  # what cannot compile has nothing to count
        behind = "its own runtime library" if artifact["library"] == "runtime" else "libtorch"
        return f"loaded {artifact['name']} over {behind}: no compiler in the process"
    named = {
        "unique_graphs": "graphs traced",
        "kernels_compiled": "kernels compiled",
        "kernels_tuned": "kernels tuned",
    }
    done = [f"{counts[name]} {named[name]}" for name in named if counts[name] is not None]
    what = f"loaded {artifact['name']}" if artifact else f"mode {mode}"
    return f"{what}: {', '.join(done)}"
