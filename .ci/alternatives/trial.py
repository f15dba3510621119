"""A trial of an engine that is not ours: a run script's flags in, a run's result out.

    python .ci/alternatives/trial.py --engine llama.cpp --model-id MODEL.gguf --json RESULT.json
    python .ci/alternatives/trial.py --engine torch.compile --model-id FOLDER --json RESULT.json

Both as their documentation begins, except that llama.cpp gets all cores: its Python package takes
half of them.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "mega_cache"))

from common.cli import PromptFlags, SharedFlags, flag, parse_flags
from common.errors import run_script
from common.machine import environment
from common.measure.measures import Request, Stages, process_start, run_metrics
from common.measure.report import SCHEMA, write_json

# (text, new tokens, what gets each new id) -> the ids of the text
Serve = Callable[[str, int, Callable[[int], None]], list[int]]
_SLOTS = 2048


@dataclass(frozen=True)
class EngineFlags:
    """engine"""

    engine: str = flag("llama.cpp", "what serves", choices=("llama.cpp", "torch.compile"))


def main(argv: Sequence[str]) -> None:
    shared, asked, chosen = parse_flags(__doc__, (SharedFlags, PromptFlags, EngineFlags), argv)
    stages = Stages(process_start())
    opened = {"llama.cpp": open_llama_cpp, "torch.compile": open_compiled}[chosen.engine]
    serve = opened(shared.model_id)
    setup_seconds = stages.elapsed()
    file = asked.prompts_file
    prompts = file.read_text().splitlines() if file else [asked.prompt] * asked.num_requests
    served = [timed(serve, prompt, asked.max_new_tokens) for prompt in prompts]
    requests, prompt_ids, token_ids = zip(*served, strict=True)
    document = {
        "schema": SCHEMA,
        "kind": "run",
        "approach": chosen.engine,
        "environment": environment(),
        "metrics": run_metrics(requests, setup_seconds, stages.elapsed()),
        "requests": [request._asdict() for request in requests],
        "output": {"prompt_tokens": len(prompt_ids[0]), "token_ids": token_ids[0]},
    }
    write_json(document, shared.json)


def timed(serve: Serve, prompt: str, new_tokens: int) -> tuple[Request, list[int], list[int]]:
    """Return what one request took, the ids of its prompt, and the new ones."""
    arrivals, token_ids = [], []

    def on_token(token_id: int) -> None:
        arrivals.append(time.monotonic())
        token_ids.append(token_id)

    began = time.monotonic()
    prompt_ids = serve(prompt, new_tokens, on_token)
    ended = time.monotonic()
    return Request(ended - began, arrivals[0] - began, len(token_ids)), prompt_ids, token_ids


def open_llama_cpp(path: str) -> Serve:
    from llama_cpp import Llama

    cores = len(os.sched_getaffinity(0))
    llama = Llama(path, n_ctx=_SLOTS, n_threads=cores, n_threads_batch=cores, verbose=False)

    def serve(prompt: str, new_tokens: int, on_token: Callable[[int], None]) -> list[int]:
        prompt_ids = llama.tokenize(prompt.encode(), add_bos=False)
        llama.reset()  # else the beginning that two prompts share is not computed again
        for token_id in itertools.islice(llama.generate(prompt_ids, temp=0.0), new_tokens):
            on_token(token_id)
        return prompt_ids

    return serve


def open_compiled(folder: str) -> Serve:
    """transformers with a static cache and a compiled forward, in the checkpoint's own dtype."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.model.tokenizer import TokenStreamer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.forward = torch.compile(model.forward)

    def serve(prompt: str, new_tokens: int, on_token: Callable[[int], None]) -> list[int]:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        model.generate(
            **inputs,
            do_sample=False,
            cache_implementation="static",
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            streamer=TokenStreamer(on_token),
        )
        return inputs.input_ids[0].tolist()

    return serve


if __name__ == "__main__":
    run_script(main)
