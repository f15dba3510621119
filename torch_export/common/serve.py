"""Serving the requests of a run: timed, streamed, and told as the run's result."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from common.cli import Console
from common.measures import MEASURES, Request, Stages, decode_seconds_per_token, run_metrics
from common.prompts import Printer, TextCodec
from common.report import SCHEMA, environment, markdown_table, number
from common.target import Target, device_bandwidth, device_memory, synchronize
from common.weights import list_checkpoint

# (prompt's token ids, on_token) -> new token ids, a stop token included; `on_token` is called with
# each one as it reaches the host
Generate = Callable[[list[int], Callable[[int], None]], list[int]]


@dataclass(frozen=True)
class Served:
    """A request with what went in and what came out."""

    request: Request
    prompt_ids: list[int]
    token_ids: list[int]


def serve_requests(
    generate: Generate,
    prompts: Sequence[list[int]],
    target: Target,
    stages: Stages,
    printer: Printer,
    console: Console,
) -> list[Served]:
    """Serve one prompt after another, streaming what `printer` shows; close the stages."""

    def serve(number: int) -> Served:
        show = printer.of_request(number)
        first: list[float] = []

        def on_token(token_id: int) -> None:
            if not first:
                first.append(time.monotonic())
            show(token_id)

        synchronize(target.device)
        began = time.monotonic()
        token_ids = generate(prompts[number], on_token)
        synchronize(target.device)
        seconds = time.monotonic() - began
        show(None)  # the end
        ttft = first[0] - began if first else None
        return Served(Request(seconds, ttft, len(token_ids)), prompts[number], token_ids)

    count = len(prompts)
    shown = count if printer.shows_all else 1
    served = [serve(number) for number in range(shown)]
    # a bar for those that show nothing else
    with console.bar(range(shown, count), "generate", "request") as rest:
        served += [serve(number) for number in rest]
    stages.close("decode")
    # request 1 up to its first token is prefill; all the rest of generation stays decode
    stages.split("decode", "prefill", served[0].request.ttft_seconds or 0.0)
    return served


class TokenStreamer:
    """A `generate` streamer that hands on each new token."""

    def __init__(self, on_token: Callable[[int], None]):
        self._on_token = on_token
        self._prompt_seen = False

    def put(self, value) -> None:
        # generate hands over the prompt first, then each new token, copied to the host
        if self._prompt_seen:
            self._on_token(int(value))
        self._prompt_seen = True

    def end(self) -> None:
        pass


def run_document(
    approach: str,
    mode: str,
    config: dict,
    target: Target,
    codec: TextCodec,
    served: Sequence[Served],
    setup_seconds: float,
    stages: Stages,
    counts: dict[str, int | None],
    **more: Any,
) -> dict[str, Any]:
    """Return a run's result: what ran, how, where, what it gave and what it took."""
    first = served[0]
    requests = [one.request for one in served]
    texts = [codec.decode(one.token_ids) for one in served]
    same = [one.token_ids for one in served if one.prompt_ids == first.prompt_ids]
    return {
        "schema": SCHEMA,
        "kind": "run",
        "approach": approach,
        "mode": mode,
        "command": [sys.executable, *sys.argv],
        "environment": environment(),
        "config": config,
        "metrics": run_metrics(requests, setup_seconds, stages.elapsed()),
        "decode": _decode_rates(target, served),
        "stages": stages.seconds,
        "hidden_stages": stages.hidden,
        "requests": [asdict(request) for request in requests],
        "compile": counts,
        "device_memory": device_memory(target.device),
        "output": {
            "prompt_tokens": len(first.prompt_ids),
            "new_tokens": len(first.token_ids),
            "token_ids": first.token_ids,
            "text": texts[0],
            "requests_identical": all(token_ids == first.token_ids for token_ids in same),
        },
        "completions": texts,
        **more,
    }


def _decode_rates(target: Target, served: Sequence[Served]) -> dict[str, float | None]:
    """Return what one token of the decode took, and the bytes that it must read at least.

    That is every weight once, except the embedding table, of which one row is looked up (a tied
    one is read whole as the output layer), and K and V of the slots that are filled on average:
    the prompt's and half of the new tokens', but neither masked ones nor padding. The bytes are
    None where the folder holds the configuration only, because the artifact brings the weights.
    """
    checkpoint, needed = target.checkpoint, None
    with suppress(FileNotFoundError):
        stored = list_checkpoint(checkpoint.folder)
        tied = checkpoint.config.get("tie_word_embeddings", False)
        unread = ("lm_head.weight" if tied else "model.embed_tokens.weight", "rotary_emb.inv_freq")
        weights = sum(one.count for name, one in stored.items() if not name.endswith(unread))
        slot = checkpoint.config["num_hidden_layers"] * checkpoint.kv_heads * checkpoint.head_dim
        slots = len(served[0].prompt_ids) + served[0].request.new_tokens / 2
        needed = (weights + slots * 2 * slot) * target.dtype.itemsize
    seconds = decode_seconds_per_token([one.request for one in served])
    rate = needed / seconds if needed and seconds else None
    peak = device_bandwidth(target.device)
    return {
        "seconds_per_token": seconds,
        "tokens_per_second": 1 / seconds if seconds else None,
        "bytes_per_token": needed,
        "bytes_per_second": rate,
        "device_bytes_per_second": peak,
        "bandwidth_share": rate / peak if rate and peak else None,
    }


def print_run(document: dict, console: Console) -> None:
    """Say how the run went in at most three lines on stderr; --verbose adds every measure."""
    metrics, stages, counts = document["metrics"], document["stages"], document["compile"]
    artifact, speed = document.get("artifact"), document["decode"]
    what = f"loaded {artifact['name']}" if artifact else f"mode {document['mode']}"
    named = {
        "unique_graphs": "graphs traced",
        "kernels_compiled": "kernels compiled",
        "kernels_tuned": "kernels tuned",
    }
    done = [f"{counts[name]} {named[name]}" for name in named if counts.get(name) is not None]
    console.say(f"{what}: {', '.join(done)}")
    largest = sorted(stages.keys() - {"decode"}, key=stages.__getitem__, reverse=True)[:3]
    parts = ", ".join(f"{name} {stages[name]:.2f}" for name in largest)
    first_token = number(metrics["ttft_cold_start_seconds"], 2)
    ready = f"ready after {metrics['setup_seconds']:.2f} s"
    console.say(f"{ready}, first token after {first_token} s ({parts})")
    if speed["seconds_per_token"]:
        text = f"decode {speed['tokens_per_second']:.1f} tokens/s"
        if speed["bytes_per_second"]:
            text += f", {speed['bytes_per_second'] / 1e9:.1f} GB/s"
        if speed["bandwidth_share"]:
            text += f" ({speed['bandwidth_share']:.0%} of the GPU's bandwidth)"
        console.say(text)
    if console.verbose:
        known = [one for one in MEASURES if metrics[one.key] is not None]
        rows = [[one.label, f"{number(metrics[one.key])} {one.unit}"] for one in known]
        rows += [[f"stage: {name}", f"{seconds:.3f} s"] for name, seconds in stages.items()]
        hidden = document["hidden_stages"].items()
        rows += [[f"behind them: {name}", f"{seconds:.3f} s"] for name, seconds in hidden]
        rows += [[name, number(count)] for name, count in counts.items()]
        console.say(markdown_table(["measure", "value"], rows))
