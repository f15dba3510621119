"""Before a package is published: its logits beside the eager model's, at the lengths that matter.

Each check compares the logits of the last true tokens, so that padding is verified as well. On a
GPU every decode step that is compared is a replay of the captured one, as in a run.
"""

from typing import TYPE_CHECKING

import torch

from aotinductor.base import Step, pad_right
from aotinductor.kv_generation import Generator
from aotinductor.lengths import Bounds
from common.errors import ScriptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# the largest difference of a logit from eager's, as a share of eager's largest logit
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


@torch.no_grad()
def verify_base(step: Step, model: "PreTrainedModel", bounds: Bounds) -> list[dict]:
    """Return how far the base graph is from eager; raise ScriptError beyond the tolerance."""
    checks = []
    for length in lengths_to_check(bounds):
        ids = random_ids(model, length)
        padded = bounds.padded(length)
        found = step(*pad_right(ids.tolist(), padded, 0, model.device))[0, :length]
        expected = model(ids[None], use_cache=False).logits[0]  # (length, vocab)
        checks.append(describe_check("base", length, padded, found, expected))
    check_differences(checks, model.dtype)
    return checks


@torch.no_grad()
def verify_kv(
    generator: Generator, model: "PreTrainedModel", bounds: Bounds, slots: int
) -> list[dict]:
    """Return how far prefill and a step of decode are from eager; raise beyond the tolerance."""
    if generator.on_cuda:
        generator.capture()
    checks = []
    # a longer request first: what it leaves in the cache must not reach the shorter ones
    for length in reversed(lengths_to_check(bounds)):
        ids = random_ids(model, length)
        padded = bounds.padded(length)
        generator.prefill(ids.tolist(), padded)
        found, expected = generator.logits[0], last_logits(model, ids)
        checks.append(describe_check("prefill", length, padded, found, expected))
        if length < slots:
            ids = torch.cat((ids, generator.token[0]))
            generator.decode()
            found, expected = generator.logits[0], last_logits(model, ids)
            checks.append(describe_check("decode", length + 1, length + 1, found, expected))
    check_differences(checks, model.dtype)
    return checks


def lengths_to_check(bounds: Bounds) -> list[int]:
    """Return true lengths: the lower bound, one in between that needs padding, the upper bound."""
    low, high = bounds.min_seq_len, bounds.max_seq_len
    return sorted({low, round((low * high) ** 0.5), high})


def random_ids(model: "PreTrainedModel", length: int) -> torch.Tensor:
    """Return (length,) int64 on the model's device, the same for the same length."""
    chance = torch.Generator().manual_seed(length)
    return torch.randint(model.config.vocab_size, (length,), generator=chance).to(model.device)


def last_logits(model: "PreTrainedModel", ids: torch.Tensor) -> torch.Tensor:
    """Return eager's logits (vocab,) after the last of ids (length,)."""
    return model(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]


def describe_check(
    graph: str, tokens: int, padded: int, found: torch.Tensor, expected: torch.Tensor
) -> dict:
    shape = {"graph": graph, "tokens": tokens, "padded_tokens": padded}
    return shape | describe_difference(found, expected)


def describe_difference(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Return the largest difference of two equal shapes of logits, and its share of the largest."""
    found, expected = found.float(), expected.float()
    difference = (found - expected).abs().max().item()
    return {
        "max_absolute_difference": difference,
        "max_relative_difference": difference / expected.abs().max().item(),
    }


def check_differences(checks: list[dict], dtype: torch.dtype) -> None:
    """Raise ScriptError when one of the checks is beyond the dtype's tolerance."""
    tolerance = TOLERANCES[str(dtype).removeprefix("torch.")]
    for check in checks:
        # written so that NaN fails
        if not check["max_relative_difference"] <= tolerance:
            raise ScriptError(
                f"the package's logits are not the model's: at {check['tokens']} tokens they "
                f"differ by {check['max_relative_difference']:.2g} of the largest logit, at most "
                f"{tolerance:g} was expected; nothing was replaced"
            )
