"""A loaded package beside the eager model of the checkpoint that it runs on."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from helpers import Finished, run_command, run_script, succeeded

from aotinductor import load
from aotinductor.build.runtime_compile import generate_eagerly
from common.cli import Console, SamplingFlags
from common.measure.measures import Request
from common.measure.requests import TokenStreamer
from common.model.eager import load_model
from common.model.presets import CONFIGS

NEW_TOKENS = 16
QUIET = Console(quiet=True)
# nothing in common with the tiny preset but the family
OTHER = CONFIGS["random:tiny"] | {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 12000,  # weights that are larger than any code
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
}


def build(package: Path, *flags: str) -> Finished:
    """Build a package without tuning: the graph is the same.

    The compiler's probes of this machine and its precompiled headers are shared by all such builds:
    15 s of each.
    """
    cache = {"TORCHINDUCTOR_CACHE_DIR": f"{os.environ['LLAMA_PRESETS']}/compiler"}
    own = ("--device=cpu", "--no-max-autotune", f"--package-path={package}", *flags)
    return succeeded(run_script("build_llama_aotinductor.py", *own, **cache))


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    new_tokens: int
    stop_ids: tuple[int, ...]
    bucket_pad: bool


class Pairing:
    """What the package answers, and what eager `generate` answers."""

    def __init__(self, package: Path, model_id: str):
        self.engine = load(package, model=str(model_id), device="cpu")
        self.plan, self.codec = self.engine.plan, self.engine.codec
        self.manifest = self.plan.manifest
        self.model = load_model(self.engine.target)
        stored = self.engine.target.checkpoint.stored
        self.weight_bytes = sum(one.nbytes for one in stored.values())

    def prompt(self, length, new_tokens=NEW_TOKENS, stop_ids=(), bucket_pad=False):
        ids = self.codec.synthetic_prompt(length, seed=0)
        return Prompt(ids, new_tokens, stop_ids, bucket_pad)

    def packaged(self, prompt: Prompt, on_token: Callable[[int], None] | None = None) -> list[int]:
        token_ids = []
        self.engine.plan = replace(self.plan, bucket_pad=prompt.bucket_pad)
        for token_id in self.engine.tokens(prompt.token_ids, prompt.new_tokens, prompt.stop_ids):
            token_ids.append(token_id)
            if on_token is not None:
                on_token(token_id)
        return token_ids

    def eager(self, prompt: Prompt, on_token: Callable[[int], None] | None = None) -> list[int]:
        streamer = TokenStreamer(on_token or (lambda token_id: None))
        limits = (prompt.new_tokens, prompt.stop_ids, SamplingFlags(), 0)
        return generate_eagerly(self.model, prompt.token_ids, *limits, streamer)


def timed(generate, prompt: Prompt) -> Request:
    """Return what one request took."""
    began, arrivals = time.monotonic(), []
    generate(prompt, lambda token: arrivals.append(time.monotonic()))
    return Request(arrivals[-1] - began, arrivals[0] - began, len(arrivals))


def run_limited(file_bytes: int, arguments: list) -> Finished:
    """Run Python in a process that cannot write a file of more bytes than that."""
    limited = ["bash", "-c", f'ulimit -f {file_bytes // 1024}; exec "$@"', "bash"]
    return run_command([*limited, sys.executable, *arguments])
