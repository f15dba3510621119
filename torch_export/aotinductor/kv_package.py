"""From a model to a verified package with a KV cache: its two graphs, compiled into one file."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aotinductor import compile_package, kv_graphs
from aotinductor.bounds import Bounds
from aotinductor.kv_cache import CacheShape
from aotinductor.kv_generation import Generator
from aotinductor.kv_loading import GRAPHS, make_generator
from aotinductor.verification import (
    check_differences,
    describe_difference,
    lengths_to_check,
    open_fresh_model,
)

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
    programs = {
        "prefill": compile_package.Program(
            kv_graphs.export_prefill(model, cache, bounds, example_seq_len)
        ),
        "decode": compile_package.Program(
            kv_graphs.export_decode(model, cache), kv_graphs.decode_options(model.device.type)
        ),
    }
    constants = compile_package.compile_package(path, programs, embed_weights, max_autotune)
    return {
        "graphs": list(programs),
        "cache": asdict(cache),
        "rope": kv_graphs.rope_recipe(model),
        "constants": [asdict(constant) for constant in constants],
    }


def verify_kv_package(
    generator: Generator, model: "PreTrainedModel", bounds: Bounds, slots: int
) -> list[dict]:
    """Compare prefill's logits, and one decode step's, with eager's; raise beyond the tolerance."""
    checks = []
    # a longer request first: what it leaves in the cache must not reach the shorter ones
    for length in reversed(lengths_to_check(bounds)):
        ids = torch.randint(
            model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(length)
        ).to(model.device)
        generator.prefill(ids.tolist(), bounds.padded(length))
        checks.append(_compare("prefill", generator, model, ids, bounds))
        if length < slots:
            ids = torch.cat((ids, generator.token[0]))
            generator.decode()
            checks.append(_compare("decode", generator, model, ids, bounds))
    check_differences(checks, model.dtype)
    return checks


def open_fresh_package(
    path: Path, details: dict, model: "PreTrainedModel", embed_weights: bool
) -> Generator:
    """Return a generator over a package just built, on the weights of the model in memory."""
    graphs = [open_fresh_model(path, name, details, model, embed_weights) for name in GRAPHS]
    return make_generator(*graphs, details, model.dtype, model.device)


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
