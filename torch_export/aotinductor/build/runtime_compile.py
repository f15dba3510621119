"""What a start without a package serves with: transformers' model, or its graphs, compiled here."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aotinductor.build.base_package import BaseGraph, compile_base_package
from aotinductor.build.layer_graphs import make_programs
from aotinductor.build.layer_package import cache_shape, compile_layer_package, describe_package
from aotinductor.build.torch_steps import TorchSteps
from aotinductor.flags import LoadFlags
from aotinductor.lengths import Bounds, Plan
from aotinductor.start.base_engine import BaseEngine
from aotinductor.start.kv_engine import KvEngine
from aotinductor.start.loading import Opening, Source, assemble, choose_library, make_state
from common.cli import Console, SamplingFlags
from common.compiler.toolchain import prepare_toolchain, quieten
from common.model.eager import load_model
from common.model.target import Target

CloseStage = Callable[[str], None]


def compile_engine(
    opening: Opening, flags: LoadFlags, close_stage: CloseStage, console: Console
) -> KvEngine | BaseEngine:
    """Return what a package would give, made of the model here."""
    target, plan, export = opening.target, opening.plan, flags.no_preload_method == "export"
    quieten(target.device, console)
    prepare_toolchain(target.device, host_code=export, console=console)
    close_stage("imports")
    model = load_model(target)
    close_stage("weights")
    max_autotune = flags.max_autotune
    if max_autotune is None:  # as the package was built where there is one
        max_autotune = bool(plan.built.get("max_autotune", True))
    if export:
        with tempfile.TemporaryDirectory(prefix="llama-package-") as folder:
            path = Path(folder, "model.pt2")
            details = compile_package(model, plan.bounds, plan.slots, path, False, max_autotune)
            engine = open_compiled(path, details, target, plan, False, opening.capture)
    elif plan.slots is None:
        engine = _torch_compiled_base(model, plan, flags.compile_dynamic_seq_len, max_autotune)
    else:
        engine = _torch_compiled(model, opening, flags.compile_dynamic_seq_len, max_autotune)
    close_stage("compile")
    return engine


def compile_package(
    model, bounds: Bounds, slots: int | None, path: Path, embed_weights: bool, max_autotune: bool
) -> dict[str, Any]:
    """Write `path` with the base graph or, with slots, those of a KV cache; return its details."""
    if slots is None:
        return compile_base_package(model, bounds, path, embed_weights, max_autotune)
    return compile_layer_package(model, bounds, slots, path, embed_weights, max_autotune)


def open_compiled(
    path: Path, details: dict[str, Any], target: Target, plan: Plan,
    embedded: bool, capture: bool = True,
) -> KvEngine | BaseEngine:  # fmt: skip
    """Return an engine over a package that this process has just compiled."""
    with open(path, "rb") as file:
        source, library = Source(file, path, details, embedded), choose_library("auto", details)
        return assemble(source, target, plan, library, capture)


def _torch_compiled(
    model, opening: Opening, one_dynamic_graph: bool, max_autotune: bool
) -> KvEngine:
    target, plan = opening.target, opening.plan
    assert plan.slots is not None
    # without Inductor's own CUDA graphs: decode is captured here, as of a package
    mode = "max-autotune-no-cudagraphs" if max_autotune else "default"
    cache = cache_shape(model, plan.slots)
    programs = make_programs(model)
    details = describe_package(model, cache, programs)
    varies = {
        "prefill_layer": _dynamic(plan, one_dynamic_graph),
        "decode_layer": target.device == "cpu",  # there the rows in use change with the length
        "head": False,
    }
    compiled = {
        name: torch.compile(programs[name], fullgraph=True, dynamic=varies[name], mode=mode)
        for name in programs
    }
    state, memory = make_state(details, cache, target)
    weights = dict(model.named_parameters())
    engine = KvEngine(TorchSteps(compiled, details, weights, state, memory), state, cache, memory)
    if target.device == "cuda" and opening.capture:
        engine.capture()
    return engine


def _torch_compiled_base(
    model, plan: Plan, one_dynamic_graph: bool, max_autotune: bool
) -> BaseEngine:
    mode, dynamic = "max-autotune" if max_autotune else "default", _dynamic(plan, one_dynamic_graph)
    graph = torch.compile(BaseGraph(model), fullgraph=True, dynamic=dynamic, mode=mode)

    @torch.no_grad()
    def forward(ids: list[int], mask: list[int], rows: range) -> np.ndarray:
        inputs = [torch.tensor([one], device=model.device) for one in (ids, mask)]
        return graph(*inputs)[0, rows.start : rows.stop].float().cpu().numpy()

    return BaseEngine(forward, plan.padded)


def _dynamic(plan: Plan, one_dynamic_graph: bool) -> bool | None:
    # None is torch's own way: static at first, dynamic from the second length on
    return (one_dynamic_graph or None) if plan.bounds.dynamic_seq_len else False


def generate_eagerly(
    model, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int],
    sampling: SamplingFlags, seed: int, streamer: Any = None,
) -> list[int]:  # fmt: skip
    """Return the new tokens of Hugging Face `generate` as it is, without any compilation."""
    from transformers import GenerationConfig

    ids = torch.tensor([prompt], device=model.device)  # (1, prompt) int64
    # every choice is set, so that none is left to the checkpoint's own defaults
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,  # of one sequence none is padded
        do_sample=sampling.temperature > 0,
        **vars(sampling) if sampling.temperature else {},
    )
    torch.manual_seed(seed)
    # (1, prompt + new_tokens) int64
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), disable_compile=True, streamer=streamer
    )
    return output[0, ids.shape[1] :].tolist()
