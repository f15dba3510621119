"""Prompts and presets: real shapes, text that depends on every token, one tokenising path."""

import pytest
import torch

from common import presets
from common.checkpoints import resolve_checkpoint
from common.console import Console
from common.models import load_model
from common.prompts import bucket_for, load_codec, pad_left

QUIET = Console(quiet=True)
PROMPT = "Write a short explanation of portable torch.compile caches."


@pytest.fixture(scope="module")
def tiny(presets_folder):
    return resolve_checkpoint("random:tiny", presets_folder, QUIET)


@pytest.fixture(scope="module")
def tiny_model(tiny):
    return load_model(tiny, torch.device("cpu"), torch.float32)


def greedy(model, token_ids, count=64):
    output = model.generate(
        torch.tensor([token_ids]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(token_ids) :].tolist()


def test_tokens_of_the_tiny_preset_depend_on_every_prompt_token(tiny, tiny_model):
    prompt = load_codec(tiny.folder).encode_prompt(PROMPT)
    tokens = greedy(tiny_model, prompt)
    assert len(set(tokens)) >= 40
    for place in (0, 1, len(prompt) // 2, len(prompt) - 1):
        changed = list(prompt)
        changed[place] = (changed[place] + 7) % 256
        other = greedy(tiny_model, changed)
        differing = sum(a != b for a, b in zip(tokens, other, strict=True))
        assert differing > 32, f"changing prompt token {place} changed {differing} of 64 tokens"


@pytest.mark.parametrize(
    ("preset", "billions"), [("random:1b", 1.236), ("random:3b", 3.213), ("random:8b", 8.030)]
)
def test_big_presets_have_the_published_parameter_count(preset, billions, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = presets.CONFIGS[preset]
    assert round(presets.parameter_count(config) / 1e9, 3) == billions
    presets._write_config(config, tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(weight.numel() for weight in model.parameters()) == presets.parameter_count(config)
    names = dict(presets.weight_shapes(config))
    for name, weight in model.named_parameters():
        assert names[name] == tuple(weight.shape)


def test_weights_depend_on_the_seed_and_the_name_alone(tiny, tmp_path):
    config = presets.CONFIGS["random:tiny"]
    again = presets.materialize(config, tmp_path / "again", QUIET)
    other = presets.materialize(config, tmp_path / "other", QUIET, seed=1)
    weights = (tiny.folder / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == weights
    assert (other / "model.safetensors").read_bytes() != weights


def test_prompt_tokens_are_those_of_transformers(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.folder)
    messages = [{"role": "user", "content": PROMPT}]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, tokenize=True
    )["input_ids"]
    codec = load_codec(tiny.folder)
    assert codec.encode_prompt(PROMPT) == list(expected)
    assert codec.decode(codec.tokenizer.encode("Grüße, 🦙").ids) == "Grüße, 🦙"


def test_padding_is_on_the_left_and_masked():
    assert pad_left([5, 6], 4, padding_id=9) == ([9, 9, 5, 6], [0, 0, 1, 1])
    assert bucket_for(100, (64, 128, 256)) == 128
    assert bucket_for(257, (64, 128, 256)) is None


def test_the_configuration_digest_is_the_architectures(tiny, tmp_path):
    import json
    import shutil

    from common.checkpoints import Checkpoint

    tuned = tmp_path / "fine-tune"
    shutil.copytree(tiny.folder, tuned)
    config = json.loads((tuned / "config.json").read_text())
    config |= {"transformers_version": "9.9", "eos_token_id": [1, 2], "torch_dtype": "float16"}
    (tuned / "config.json").write_text(json.dumps(config))
    assert Checkpoint(tuned, "tuned", None).config_digest == tiny.config_digest
    config["rope_theta"] = 10000.0
    (tuned / "config.json").write_text(json.dumps(config))
    assert Checkpoint(tuned, "tuned", None).config_digest != tiny.config_digest
