"""A package of the base graph gives the tokens of eager `generate`, whatever the length."""

import json
import subprocess
import sys

import pytest
import torch
from aotinductor import base_generation, eager_generation
from aotinductor.base_generation import Prompt
from aotinductor.bounds import parse_bounds
from aotinductor.loading import load_package
from aotinductor.recipe import Target
from common.artifacts import ArtifactPair
from common.checkpoints import resolve_checkpoint
from common.console import Console
from common.manifest import parse_manifest
from common.models import load_model
from common.presets import CONFIGS, materialize
from common.prompts import load_codec
from common.trust import TrustFlags
from helpers import run_script, succeeded

QUIET = Console(quiet=True)
CPU = torch.device("cpu")
NEW_TOKENS = 16
LENGTHS = (1, 2, 7, 8, 9, 127, 128, 129, 1000, 2048 - NEW_TOKENS)
BUILD = "build_llama_aotinductor.py"
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
    """A loaded package beside the eager model of its checkpoint."""

    def __init__(self, package, model_id, presets_folder):
        pair = ArtifactPair(package, package.with_name(package.stem + "_meta.json"))
        self.manifest = parse_manifest(pair.metadata_path.read_bytes())
        self.bounds = parse_bounds(self.manifest.recipe)
        checkpoint = resolve_checkpoint(str(model_id), presets_folder, QUIET)
        target = Target(checkpoint, CPU, torch.float32)
        self.step = load_package(pair, target, self.bounds, TrustFlags(), QUIET).step
        self.model = load_model(checkpoint, CPU, torch.float32)
        self.codec = load_codec(checkpoint.folder)

    def prompt(self, length, stop_ids=(), bucket_pad=False):
        ids = self.codec.synthetic_prompt(length, seed=0)
        return Prompt(ids, NEW_TOKENS, stop_ids, 0, self.bounds, bucket_pad)

    def packaged(self, prompt):
        return base_generation.serve(self.step, prompt, CPU)[1]

    def eager(self, prompt):
        return eager_generation.serve(self.model, prompt)[1]


@pytest.fixture(scope="module")
def tiny(package, presets_folder):
    return Pairing(package, "random:tiny", presets_folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory, presets_folder):
    """Untied embeddings, 4 heads on 4 KV heads, plain rope; with a checkpoint of its own."""
    folder = tmp_path_factory.mktemp("other")
    checkpoint = materialize(OTHER, folder / "checkpoint", QUIET)
    package = folder / "other.pt2"
    flags = ["--device=cpu", "--no-max-autotune", f"--package-path={package}"]
    succeeded(run_script(BUILD, f"--model-id={checkpoint}", *flags))
    return Pairing(package, checkpoint, presets_folder)


@pytest.mark.parametrize("length", LENGTHS)
def test_greedy_tokens_equal_eager_at_every_length(tiny, length):
    tokens = tiny.packaged(tiny.prompt(length))
    assert len(tokens) == NEW_TOKENS
    assert tokens == tiny.eager(tiny.prompt(length))


@pytest.mark.parametrize("length", LENGTHS)
def test_another_llama_gives_its_eager_tokens_too(other, length):
    assert other.packaged(other.prompt(length)) == other.eager(other.prompt(length))


@pytest.mark.parametrize("length", (1, 9, 129))
def test_padding_to_buckets_changes_no_token(tiny, length):
    assert tiny.packaged(tiny.prompt(length, bucket_pad=True)) == tiny.packaged(tiny.prompt(length))


def test_generation_ends_with_the_stop_token_as_eager_does(tiny):
    tokens = tiny.packaged(tiny.prompt(9))
    stop = tokens[5]
    stopped = tiny.packaged(tiny.prompt(9, stop_ids=(stop,)))
    assert stopped == tokens[: tokens.index(stop) + 1]
    assert stopped == tiny.eager(tiny.prompt(9, stop_ids=(stop,)))


def test_a_request_leaves_nothing_behind_for_the_next(tiny):
    first = tiny.packaged(tiny.prompt(9))
    tiny.packaged(tiny.prompt(300))
    assert tiny.packaged(tiny.prompt(9)) == first


def test_metadata_tells_how_far_logits_are_from_eager(tiny):
    checks = tiny.manifest.details["verification"]
    assert checks[0]["tokens"] == 1 and checks[-1]["tokens"] == 2048
    assert any(1 < check["tokens"] < 2048 for check in checks)
    assert all(0 <= check["max_relative_difference"] < 1e-4 for check in checks)


def test_a_program_of_ones_own_gets_logits_from_the_package(tiny, package, tmp_path):
    ids = tiny.codec.synthetic_prompt(16, seed=1)
    program = f"""
import json, torch
run = torch._inductor.aoti_load_package({str(package)!r})
ids = torch.tensor([{ids}])
print(json.dumps(run(ids, torch.ones_like(ids))[0, -1].tolist()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logits = torch.tensor(json.loads(done.stdout.splitlines()[-1]))  # (vocab,)
    expected = tiny.model(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
