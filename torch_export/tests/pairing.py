"""A loaded package beside the eager model of the checkpoint that it runs on."""

import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from helpers import Finished, run_command, run_script, succeeded

from aotinductor.flags import RunSettings
from aotinductor.lengths import Plan, parse_bounds
from aotinductor.loading import load_package
from aotinductor.serving import generate_eagerly
from common.artifact.manifest import parse_manifest
from common.cli import Console, SamplingFlags, parse_flags
from common.measure.measures import Request, Stages, process_start
from common.model.checkpoint import resolve_checkpoint
from common.model.presets import CONFIGS
from common.model.target import Target, load_model
from common.model.tokenizer import load_codec
from common.model.weights import list_checkpoint

NEW_TOKENS = 16
QUIET = Console(quiet=True)
CPU = torch.device("cpu")
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
        (settings,) = parse_flags("", (RunSettings,), [f"--package-path={package}"])
        self.manifest = parse_manifest(settings.files.pair().metadata_path.read_bytes())
        self.plan = Plan(parse_bounds(self.manifest.recipe), self.manifest.recipe)
        target = Target(resolve_checkpoint(str(model_id), QUIET), CPU, torch.float32)
        stages = Stages(process_start())
        self._engine, _ = load_package(settings, target, self.plan, False, 8, stages, QUIET)
        self.model = load_model(target)
        self.codec = load_codec(target.checkpoint)
        self.weight_bytes = sum(
            one.nbytes for one in list_checkpoint(target.checkpoint.folder).values()
        )

    def prompt(self, length, new_tokens=NEW_TOKENS, stop_ids=(), bucket_pad=False):
        ids = self.codec.synthetic_prompt(length, seed=0)
        return Prompt(ids, new_tokens, stop_ids, bucket_pad)

    def packaged(self, prompt, on_token=None):
        rest = (prompt.new_tokens, prompt.stop_ids, on_token)
        if self.plan.slots is None:
            padded = partial(self.plan.bounds.padded, bucket_pad=prompt.bucket_pad)
            return self._engine.generate(prompt.token_ids, padded, *rest)
        padded = self.plan.bounds.padded(len(prompt.token_ids), prompt.bucket_pad)
        return self._engine.generate(prompt.token_ids, padded, *rest)

    def eager(self, prompt, on_token=None):
        return generate_eagerly(
            self.model, prompt.token_ids, prompt.new_tokens, prompt.stop_ids,
            on_token or (lambda token: None), SamplingFlags(), 0,
        )  # fmt: skip


def timed(generate, prompt: Prompt) -> Request:
    """Return what one request took."""
    began, arrivals = time.monotonic(), []
    generate(prompt, lambda token: arrivals.append(time.monotonic()))
    return Request(arrivals[-1] - began, arrivals[0] - began, len(arrivals))


def run_limited(file_bytes: int, arguments: list) -> Finished:
    """Run Python in a process that cannot write a file of more bytes than that."""
    limited = ["bash", "-c", f'ulimit -f {file_bytes // 1024}; exec "$@"', "bash"]
    return run_command([*limited, sys.executable, *arguments])
