"""How close a compiled graph must be to the eager model, and at which lengths that is checked."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aotinductor.bounds import Bounds
from aotinductor.package_loader import Model, bind_constants, device_index, open_model
from common.errors import ScriptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# the largest difference of a logit from eager's, as a share of eager's largest logit
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def lengths_to_check(bounds: Bounds) -> list[int]:
    """Return true lengths: the lower bound, one in between that needs padding, the upper bound."""
    low, high = bounds.min_seq_len, bounds.max_seq_len
    return sorted({low, round((low * high) ** 0.5), high})


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


def open_fresh_model(
    path: Path, name: str, details: dict, model: "PreTrainedModel", embed_weights: bool
) -> Model:
    """Return a graph of a package just built; one of code only runs on the model in memory."""
    graph = open_model(path, name, device_index(model.device))
    if not embed_weights:
        named = dict(model.named_parameters(remove_duplicate=False))
        named |= dict(model.named_buffers(remove_duplicate=False))
        bind_constants(graph, {row["name"]: named[row["name"]] for row in details["constants"]})
    return graph
