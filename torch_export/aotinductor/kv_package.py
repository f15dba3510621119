"""From a model to a verified package with a KV cache: its two graphs, compiled into one file."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aotinductor import compile_package, kv_graphs
from aotinductor.bounds import Bounds
from aotinductor.kv_cache import CacheShape
from aotinductor.kv_generation import Generator
from aotinductor.kv_loading import make_generator
from aotinductor.package_loader import bind_constants, open_model
from aotinductor.verification import check_differences, describe_difference, lengths_to_check

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_kv_package(
    model: "PreTrainedModel",
    bounds: Bounds,
    slots: int,
    example_seq_len: int,
    path: Path,
    embed_weights: bool,
    max_autotune: bool,
) -> dict:
    """Write `path` with the models `prefill` and `decode`; return the metadata's `details`."""
    cache = CacheShape.of(model.config, slots)
    device = model.device.type
    splits = kv_graphs.default_splits(device, cache)
    programs = {
        "prefill": compile_package.Program(
            kv_graphs.export_prefill(model, cache, bounds, example_seq_len)
        ),
        "decode": compile_package.Program(
            kv_graphs.export_decode(model, cache, splits),
            compile_package.decode_options(device, max_autotune),
        ),
    }
    constants = compile_package.compile_package(path, programs, embed_weights, max_autotune)
    return {
        "graphs": list(programs),
        "cache": asdict(cache),
        "attention_splits": splits,
        "rope": kv_graphs.rope_recipe(model),
        "constants": [asdict(constant) for constant in constants],
    }


def verify_kv_package(
    path: Path, details: dict, model: "PreTrainedModel", bounds: Bounds, embed_weights: bool
) -> list[dict]:
    """Compare prefill's logits, and one decode step's, with eager's; raise beyond the tolerance."""
    generator = open_for_verification(path, details, model, bounds, embed_weights)
    slots = details["cache"]["slots"]
    checks = []
    # a longer request first: what it leaves in the cache must not reach the shorter ones
    for length in reversed(lengths_to_check(bounds)):
        ids = torch.randint(
            model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(length)
        ).to(model.device)
        generator.prefill(ids.tolist())
        checks.append(_compare("prefill", generator, model, ids, bounds))
        if length < slots:
            ids = torch.cat((ids, generator.token[0]))
            generator.decode()
            checks.append(_compare("decode", generator, model, ids, bounds))
    check_differences(checks, model.dtype)
    return checks


def open_for_verification(
    path: Path, details: dict, model: "PreTrainedModel", bounds: Bounds, embed_weights: bool
) -> Generator:
    """Return a generator over the fresh package, bound to the weights of the model in memory."""
    index = -1 if model.device.type == "cpu" else model.device.index or 0
    models = [open_model(path, name, index) for name in ("prefill", "decode")]
    if not embed_weights:
        tensors = model_constants(model, details["constants"])
        for loaded in models:
            bind_constants(loaded, tensors)
    return make_generator(*models, details, bounds, model.dtype, model.device)


def model_constants(model: "PreTrainedModel", constants: list[dict]) -> dict[str, torch.Tensor]:
    """Return the tensors that the graphs expect, by their names, out of a model in memory."""
    named = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    return {row["name"]: named[row["name"]].detach() for row in constants}


def _compare(
    graph: str, generator: Generator, model: "PreTrainedModel", ids: torch.Tensor, bounds: Bounds
) -> dict:
    expected = model(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1]  # (vocab,)
    length = len(ids)
    return {
        "graph": graph,
        "tokens": length,
        "padded_tokens": bounds.padded(length) if graph == "prefill" else length,
        **describe_difference(generator.logits[0], expected),
    }
