"""A loaded package beside the eager model of the checkpoint that it runs on."""

from pathlib import Path

import torch

from aotinductor import eager_generation
from aotinductor.base_generation import Prompt
from aotinductor.bounds import parse_bounds
from aotinductor.loading import load_package, server_of
from aotinductor.recipe import Plan
from common.artifacts import ArtifactPair
from common.checkpoints import resolve_checkpoint
from common.cli import Console
from common.manifest import parse_manifest
from common.models import load_model
from common.presets import CONFIGS
from common.prompts import load_codec
from common.stopwatch import Stages, process_start
from common.targets import Target
from common.trust import TrustFlags

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
    "vocab_size": 300,
    "tie_word_embeddings": False,
    "rope_scaling": None,
    "rope_theta": 10000.0,
}


class Pairing:
    """What the package answers, and what eager `generate` answers."""

    def __init__(self, package: Path, model_id: str, presets_folder: Path):
        pair = ArtifactPair(package, package.with_name(package.stem + "_meta.json"))
        self.manifest = parse_manifest(pair.metadata_path.read_bytes())
        self.plan = Plan(parse_bounds(self.manifest.recipe), self.manifest.recipe)
        checkpoint = resolve_checkpoint(str(model_id), presets_folder, QUIET)
        target = Target(checkpoint, CPU, torch.float32)
        stages = Stages(process_start())
        loaded = load_package(pair, target, self.plan, TrustFlags(), False, stages, QUIET)
        self._serve = server_of(loaded.engine, CPU)
        self.model = load_model(checkpoint, CPU, torch.float32)
        self.codec = load_codec(checkpoint.folder)

    def prompt(self, length, new_tokens=NEW_TOKENS, stop_ids=(), bucket_pad=False):
        ids = self.codec.synthetic_prompt(length, seed=0)
        return Prompt(ids, new_tokens, stop_ids, 0, self.plan.bounds, bucket_pad)

    def packaged(self, prompt):
        return self._serve(prompt)[1]

    def request(self, prompt):
        return self._serve(prompt)[0]

    def eager(self, prompt):
        return eager_generation.serve(self.model, prompt)[1]

    def eager_request(self, prompt):
        return eager_generation.serve(self.model, prompt)[0]
