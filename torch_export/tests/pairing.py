"""A loaded package beside the eager model of the checkpoint that it runs on."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers import Finished, run_command, run_script, succeeded

from aotinductor.build.runtime_compile import generate_eagerly
from aotinductor.flags import RunSettings
from aotinductor.serving import open_run
from common.artifact.manifest import parse_manifest
from common.cli import Console, SamplingFlags, parse_flags
from common.model.eager import load_model
from common.model.presets import CONFIGS
from common.model.tokenizer import TokenStreamer

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


def shared_compiler_cache() -> dict[str, str]:
    """Return what a build is given to share the compiler's probes of this machine with others.

    Those and its precompiled headers take 15 s each.
    """
    return {"TORCHINDUCTOR_CACHE_DIR": f"{os.environ['LLAMA_PRESETS']}/compiler"}


def build(package: Path, *flags: str) -> Finished:
    """Build a package without tuning: the graph is the same."""
    own = ("--device=cpu", "--no-max-autotune", f"--package-path={package}", *flags)
    return succeeded(run_script("build_llama_aotinductor.py", *own, **shared_compiler_cache()))


@dataclass(frozen=True)
class Prompt:
    token_ids: list[int]
    new_tokens: int
    stop_ids: tuple[int, ...]
    bucket_pad: bool


class Pairing:
    """What the package answers, and what eager `generate` answers."""

    def __init__(self, package: Path, model_id: str | Path, library: str = "auto"):
        words = [f"--package-path={package}", f"--model-id={model_id}", f"--library={library}"]
        (settings,) = parse_flags("", (RunSettings,), words)
        opening = open_run(settings, QUIET)
        self.manifest = parse_manifest(settings.files.pair().metadata_path.read_bytes())
        self.engine = opening.load(QUIET)
        self.target, self.plan, self.codec = opening.target, opening.plan, opening.codec
        # the weights that the package has, in which all else is computed exactly
        self.model = load_model(self.target).float()
        self.weight_bytes = sum(one.nbytes for one in self.target.checkpoint.stored.values())

    def prompt(self, length, new_tokens=NEW_TOKENS, stop_ids=(), bucket_pad=False) -> Prompt:
        ids = self.codec.synthetic_prompt(length, seed=0)
        return Prompt(ids, new_tokens, stop_ids, bucket_pad)

    def packaged(self, prompt: Prompt, on_token=lambda token: None, **sampling) -> list[int]:
        self.engine.plan = self.plan._replace(bucket_pad=prompt.bucket_pad)
        tokens = []
        choices = {"stop_ids": prompt.stop_ids} | sampling
        for token in self.engine.tokens(prompt.token_ids, prompt.new_tokens, **choices):
            on_token(token)
            tokens.append(token)
        return tokens

    def eager(self, prompt: Prompt, on_token=lambda token: None) -> list[int]:
        """Return the model's greedy tokens, computed in float32."""
        streamer = TokenStreamer(on_token)
        sampling = (SamplingFlags(), 0)
        return generate_eagerly(
            self.model, prompt.token_ids, prompt.new_tokens, prompt.stop_ids, *sampling, streamer
        )

    def eager_logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Return (tokens, vocab) float32: the logits that each of the tokens was chosen from."""
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            return self.model(ids, logits_to_keep=len(tokens) + 1).logits[0, :-1]


def run_limited(file_bytes: int, arguments: list) -> Finished:
    """Run Python in a process that cannot write a file of more bytes than that."""
    limited = ["bash", "-c", f'ulimit -f {file_bytes // 1024}; exec "$@"', "bash"]
    return run_command([*limited, sys.executable, *arguments])
