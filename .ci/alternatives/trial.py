"""A trial of an engine that is not ours: a run script's flags in, a run's result out.

    python .ci/alternatives/trial.py --engine llama.cpp --model-id MODEL.gguf --json RESULT.json
    python .ci/alternatives/trial.py --engine torch.compile --model-id FOLDER --json RESULT.json

Both as their documentation begins, except that llama.cpp gets all cores: its Python package takes
half of them.
"""

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "mega_cache"))

from common.cli import Flags, PromptFlags, SharedFlags, flag, parse_flags
from common.errors import run_script
from common.machine import environment
from common.measure.measures import Stages, process_start, run_metrics
from common.measure.report import SCHEMA, write_json
from common.measure.requests import serve_one

# (text, what gets each new id) -> the new ids
Generate = Callable[[str, Callable[[int], None]], list[int]]
_SLOTS = 2048


class EngineFlags(Flags):
    """engine"""

    engine: str = flag("llama.cpp", "what serves", choices=("llama.cpp", "torch.compile"))
    bos: bool = flag(False, "begin each prompt for llama.cpp with BOS")


def main(argv: Sequence[str]) -> None:
    shared, asked, chosen = parse_flags(__doc__, (SharedFlags, PromptFlags, EngineFlags), argv)
    stages = Stages(process_start())
    if chosen.engine == "llama.cpp":
        generate = open_llama_cpp(shared.model_id, asked.max_new_tokens, chosen.bos)
    else:
        generate = open_compiled(shared.model_id, asked.max_new_tokens)
    setup_seconds = stages.elapsed()
    file = asked.prompts_file
    prompts = file.read_text().splitlines() if file else [asked.prompt] * asked.num_requests
    requests, token_ids = zip(*(serve_one(text, generate) for text in prompts), strict=True)
    document = {
        "schema": SCHEMA,
        "kind": "run",
        "approach": chosen.engine,
        "environment": environment(),
        "metrics": run_metrics(requests, setup_seconds, stages.elapsed()),
        "requests": [request._asdict() for request in requests],
        "output": {"token_ids": token_ids[0]},
    }
    write_json(document, shared.json)


def open_llama_cpp(path: str, new_tokens: int, bos: bool) -> Generate:
    from llama_cpp import Llama

    cores = len(os.sched_getaffinity(0))
    llama = Llama(path, n_ctx=_SLOTS, n_threads=cores, n_threads_batch=cores, verbose=False)

    def generate(prompt: str, on_token: Callable[[int], None]) -> list[int]:
        prompt_ids, token_ids = llama.tokenize(prompt.encode(), add_bos=False), []
        prompt_ids = [llama.token_bos()] * bos + prompt_ids
        llama.reset()  # else the beginning that two prompts share is not computed again
        for token_id in itertools.islice(llama.generate(prompt_ids, temp=0.0), new_tokens):
            on_token(token_id)
            token_ids.append(token_id)
        return token_ids

    return generate


def open_compiled(folder: str, new_tokens: int) -> Generate:
    """transformers with a static cache and a compiled forward, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.model.tokenizer import TokenStreamer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    model.forward = torch.compile(model.forward)

    def generate(prompt: str, on_token: Callable[[int], None]) -> list[int]:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(
            **inputs,
            do_sample=False,
            cache_implementation="static",
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            streamer=TokenStreamer(on_token),
        )
        return output[0, inputs.input_ids.shape[1] :].tolist()

    return generate


if __name__ == "__main__":
    run_script(main)
