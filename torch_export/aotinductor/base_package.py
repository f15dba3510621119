"""From a model to a verified package with the base graph."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aotinductor.base_generation import Step, pad_right
from aotinductor.bounds import Bounds
from aotinductor.verification import check_differences, describe_difference, lengths_to_check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL = "model"  # the name that aoti_load_package looks for by itself


def compile_base_package(
    exported: torch.export.ExportedProgram, path: Path, embed_weights: bool, max_autotune: bool
) -> dict:
    """Compile the exported graph into a `.pt2` at `path`; return the metadata's `details`."""
    # Private in name, documented in use (2.9 to 2.13): the public way from export to a package.
    from torch._inductor import aoti_compile_and_package

    from aotinductor import compile_package

    if embed_weights:
        settings = {"max_autotune": max_autotune}
        aoti_compile_and_package(exported, package_path=str(path), inductor_configs=settings)
        return {"graphs": [MODEL]}
    programs = {MODEL: compile_package.Program(exported)}
    constants = compile_package.compile_package(path, programs, False, max_autotune)
    return {"graphs": [MODEL], "constants": [asdict(constant) for constant in constants]}


def verify_base_package(run: Step, model: "PreTrainedModel", bounds: Bounds) -> list[dict]:
    """Compare the package's logits with eager's, at both bounds and between.

    Returns what was found for each length; raises ScriptError beyond the dtype's tolerance. Eager
    is the model's own forward over the true tokens, so the padding is verified as well.
    """
    checks = [_compare(run, model, bounds, length) for length in lengths_to_check(bounds)]
    check_differences(checks, model.dtype)
    return checks


def _compare(run: Step, model: "PreTrainedModel", bounds: Bounds, length: int) -> dict:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(model.config.vocab_size, (length,), generator=generator)
    padded = bounds.padded(length)
    inputs = pad_right(ids.tolist(), padded, 0, model.device)
    found = run(*inputs)[0, :length]  # (length, vocab)
    expected = model(ids[None].to(model.device), use_cache=False).logits[0]
    return {
        "graph": "base",
        "tokens": length,
        "padded_tokens": padded,
        **describe_difference(found, expected),
    }
