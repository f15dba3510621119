"""Presets: real shapes, the same weights everywhere, and text that depends on every token."""

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.cli import Console
from common.model import presets
from common.model.checkpoint import resolve_checkpoint
from common.model.tokenizer import load_codec

QUIET = Console(quiet=True)
PROMPT = "Write a short explanation of portable torch.compile caches."


@pytest.fixture(scope="module")
def tiny(shared_folders):
    return resolve_checkpoint("random:tiny", QUIET)


def greedy(model, token_ids, count=64):
    output = model.generate(
        torch.tensor([token_ids]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(token_ids) :].tolist()


def test_tokens_of_the_tiny_preset_depend_on_every_prompt_token(tiny):
    model = LlamaForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    prompt = load_codec(tiny).encode(PROMPT)
    tokens = greedy(model, prompt)
    assert len(set(tokens)) >= 40
    for place in (0, 1, len(prompt) // 2, len(prompt) - 1):
        changed = list(prompt)
        changed[place] = (changed[place] + 7) % 256
        other = greedy(model, changed)
        differing = sum(a != b for a, b in zip(tokens, other, strict=True))
        assert differing > 32, f"changing prompt token {place} changed {differing} of 64 tokens"


@pytest.mark.parametrize(
    ("preset", "billions"), [("random:1b", 1.236), ("random:3b", 3.213), ("random:8b", 8.030)]
)
def test_big_presets_have_the_published_parameter_count(preset, billions):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**presets.CONFIGS[preset]))
    assert round(model.num_parameters() / 1e9, 3) == billions


def test_what_its_tokenizer_returns_is_what_generate_takes(tiny):
    inputs = AutoTokenizer.from_pretrained(tiny.folder)(PROMPT)
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_making_a_preset_leaves_its_folders_name(tmp_path):
    before = presets.preset_folder("random:tiny")
    presets.materialize(presets.CONFIGS["random:tiny"], tmp_path / "again", QUIET)
    assert presets.preset_folder("random:tiny") == before


def test_weights_depend_on_the_seed_and_the_name_alone(tiny, tmp_path):
    config = presets.CONFIGS["random:tiny"]
    again = presets.materialize(config, tmp_path / "again", QUIET)
    other = presets.materialize(config, tmp_path / "other", QUIET, seed=1)
    weights = (tiny.folder / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == weights
    assert (other / "model.safetensors").read_bytes() != weights
