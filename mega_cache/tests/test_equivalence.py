"""Equivalence: errors are found, and nobody follows another continuation than the reference."""

import pytest
import torch
from check_equivalence import lead_along

from common import equivalence
from common.equivalence import (
    check_tokens_equal,
    compare_logits,
    continue_greedily,
    equivalence_table,
)
from common.errors import ScriptError

VOCABULARY = 512


def engine(error=0.0):
    """An engine whose likeliest next token is the sum of all tokens before it."""

    def logits(prompt, forced):
        found = torch.zeros(len(forced), VOCABULARY)
        for step in range(len(forced)):
            found[step, (sum(prompt) + sum(forced[:step])) % VOCABULARY] = 1.0
        return found + error

    return logits


def test_the_continuation_is_greedy():
    assert continue_greedily(engine(), [3, 4], 4) == [7, 14, 28, 56]


def test_errors_are_those_of_each_candidate_against_float32(tmp_path, monkeypatch):
    from common.checkpoints import resolve_checkpoint
    from common.console import Console

    errors = {torch.float32: 0.0, torch.bfloat16: 0.25}
    monkeypatch.setattr(equivalence, "eager_engine", lambda _, __, dtype: engine(errors[dtype]))
    checkpoint = resolve_checkpoint("random:tiny", tmp_path, Console(quiet=True))
    flags = equivalence.EquivalenceFlags(logit_prompt_lengths=(4, 9), logit_steps=3)
    device, dtype = torch.device("cpu"), torch.float32
    arguments = (checkpoint, device, dtype, flags)
    found = compare_logits(*arguments, lambda: engine(0.5), seed=0)
    modes = {row["mode"]: row for row in found["rows"]}
    assert modes["eager"]["dtype"] == "bfloat16" and modes["load"]["dtype"] == "float32"
    assert modes["eager"]["mean_abs_error"] == pytest.approx(0.25)
    assert modes["load"]["max_abs_error"] == pytest.approx(0.5)
    assert modes["load"]["same_top_token_share"] == 1.0
    found = compare_logits(*arguments, lambda: None, seed=0)  # an engine that gives no logits
    assert [row["mode"] for row in found["rows"]] == ["eager"]
    assert "eager, bfloat16" in equivalence_table({"logits": found})


def test_the_processor_leaves_the_forced_token_only():
    process = lead_along(prompt_length=3, forced=[5, 6])
    for length, token in ((3, 5), (4, 6)):
        left = process(torch.zeros(1, length, dtype=torch.int64), torch.randn(1, VOCABULARY))
        assert left.argmax() == token
        assert torch.isinf(left).sum() == VOCABULARY - 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"identical": False}, "differ at a prompt of 7"), ({"recompiles": 2}, "2 recompiles")],
)
def test_other_tokens_and_recompiles_fail(wrong, words):
    row = {"prompt_length": 7, "identical": True, "new_tokens": 64, "recompiles": 0}
    check_tokens_equal({"tokens": [row | {"cudagraph_skips": 0}]})
    with pytest.raises(ScriptError, match=words):
        check_tokens_equal({"tokens": [row | wrong]})
