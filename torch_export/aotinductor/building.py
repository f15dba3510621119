"""From a model to a verified package file."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common.errors import ScriptError

from aotinductor.base_generation import pad_right
from aotinductor.bounds import Bounds
from aotinductor.loading import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# the largest difference of a logit from eager's, as a share of eager's largest logit
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}


def compile_base_package(
    exported: torch.export.ExportedProgram, path: Path, max_autotune: bool
) -> None:
    """Compile the exported graph and write it, weights included, as a `.pt2` at `path`."""
    # Private in name, documented in use (2.9 to 2.13): the public way from export to a package.
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(
        exported, package_path=str(path), inductor_configs={"max_autotune": max_autotune}
    )


def verify_package(path: Path, model: "PreTrainedModel", bounds: Bounds) -> list[dict]:
    """Load the package once and compare its logits with eager's, at both bounds and between.

    Returns what was found for each length; raises ScriptError beyond the dtype's tolerance. Eager
    is the model's own forward over the true tokens, so the padding is verified as well.
    """
    run = open_model(str(path), model.device)
    checks = [_compare(run, model, bounds, length) for length in _lengths(bounds)]
    tolerance = TOLERANCES[str(model.dtype).removeprefix("torch.")]
    for check in checks:
        # written so that NaN fails
        if not check["max_relative_difference"] <= tolerance:
            raise ScriptError(
                f"the package's logits are not the model's: at {check['tokens']} tokens they "
                f"differ by {check['max_relative_difference']:.2g} of the largest logit, at most "
                f"{tolerance:g} was expected; nothing was replaced"
            )
    return checks


def _lengths(bounds: Bounds) -> list[int]:
    """Return true lengths: the lower bound, one in between that needs padding, the upper bound."""
    low, high = bounds.min_seq_len, bounds.max_seq_len
    return sorted({low, round((low * high) ** 0.5), high})


def _compare(run, model: "PreTrainedModel", bounds: Bounds, length: int) -> dict:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(model.config.vocab_size, (length,), generator=generator)
    padded = bounds.padded(length)
    inputs = pad_right(ids.tolist(), padded, 0, model.device)
    found = run(*inputs)[0, :length].float()  # (length, vocab)
    expected = model(ids[None].to(model.device), use_cache=False).logits[0].float()
    scale = expected.abs().max().item()
    difference = (found - expected).abs().max().item()
    return {
        "tokens": length,
        "padded_tokens": padded,
        "max_absolute_difference": difference,
        "max_relative_difference": difference / scale,
    }
