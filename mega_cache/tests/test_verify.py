"""Which tokens a build takes for eager's: its own choices, and what rounding alone explains."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.errors import ScriptError
from common.model.eager import eager_logits
from portable_cache.build import verify

PROMPT, COUNT = list(range(7, 19)), 24


@pytest.fixture(scope="module")
def eager():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).bfloat16().eval()


def in_float32(model: LlamaForCausalLM) -> LlamaForCausalLM:
    return copy.deepcopy(model).float()


def continued(model, rank: int) -> list[int]:
    """Return what follows the prompt when each token is the model's choice of this rank."""
    token_ids: list[int] = []
    while len(token_ids) < COUNT:
        logits = eager_logits(model, PROMPT + token_ids, 1)[0]
        token_ids.append(int(logits.argsort(descending=True)[rank]))
    return token_ids


def test_eagers_choices_pass_without_any_tolerance(eager, monkeypatch):
    monkeypatch.setitem(verify._TOLERANCES, "bfloat16", 0.0)
    verify.check_choices("here", eager, PROMPT, continued(eager, 0))


def test_choices_of_float32_pass_where_eager_in_16_bits_chose_otherwise(eager, monkeypatch):
    monkeypatch.setitem(verify._TOLERANCES, "bfloat16", -1.0)
    verify.check_choices("here", eager, PROMPT, continued(in_float32(eager), 0))


def test_third_choices_are_no_rounding(eager):
    with pytest.raises(ScriptError, match=r"here: .* behind its own choice \(in float32 "):
        verify.check_choices("here", eager, PROMPT, continued(eager, 2))
    with pytest.raises(ScriptError, match=r"behind its own choice$"):
        exact = in_float32(eager)
        verify.check_choices("here", exact, PROMPT, continued(exact, 2))
