"""What a start without a package compiles right here: the same graphs. `model` is transformers'."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from aotinductor import kv_graphs, package
from aotinductor.base import BaseGraph
from aotinductor.compile_package import compile_base_package, compile_kv_package
from aotinductor.flags import LoadFlags, ShapeFlags
from aotinductor.kv_generation import CacheShape
from aotinductor.lengths import Bounds, Plan
from aotinductor.loading import Engine, make_engine
from common.weights import start_upload


def compile_at_runtime(model, plan: Plan, flags: LoadFlags, cuda_graph: bool) -> Engine:
    """Return what a package would hold; with torch.compile its first call compiles."""
    max_autotune = flags.max_autotune
    if max_autotune is None:  # as the package was built where there is one
        max_autotune = bool(plan.built.get("max_autotune", True))
    if flags.no_preload_method == "export":
        example = plan.built.get("example_seq_len", ShapeFlags.example_seq_len)
        with tempfile.TemporaryDirectory(prefix="llama-package-") as folder:
            rest = (example, Path(folder, "model.pt2"), False, max_autotune)
            engine, _ = make_package(model, plan.bounds, plan.slots, *rest)
    else:
        engine = _torch_compile(model, plan, flags.compile_dynamic_seq_len, max_autotune)
    if cuda_graph:
        engine.capture()
    return engine


def make_package(
    model, bounds: Bounds, slots: int | None, example_seq_len: int, path: Path,
    embed_weights: bool, max_autotune: bool,
) -> tuple[Engine, dict]:  # fmt: skip
    """Write `path` with the base graph, or, with slots, those of a KV cache.

    Return an engine over it, on its own weights or else on the model's, and the metadata's details.
    """
    rest = (example_seq_len, path, embed_weights, max_autotune)
    if slots is None:
        details = compile_base_package(model, bounds, *rest)
    else:
        details = compile_kv_package(model, bounds, slots, *rest)
    constants = [package.Constant(**row) for row in details["constants"]]
    if embed_weights:
        upload = start_upload(package.find_in_package(constants, path), model.device)
        tensors = upload.wait() | package.make_values(constants, model.device)
    else:
        tensors = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
    models = [package.open_model(path, name, model.device, tensors) for name in details["graphs"]]
    return make_engine(models, details, model.dtype, model.device), details


def _torch_compile(model, plan: Plan, one_dynamic_graph: bool, max_autotune: bool) -> Engine:
    # None is torch's own way: static at first, dynamic from the second length on
    dynamic = (one_dynamic_graph or None) if plan.bounds.dynamic_seq_len else False
    if plan.slots is None:
        details, mode = {}, "max-autotune"
        graphs = [(BaseGraph(model), dynamic)]
    else:
        cache = CacheShape.of(model.config, plan.slots)
        details = {"cache": asdict(cache), "rope": kv_graphs.rope_recipe(model)}
        # without Inductor's own CUDA graphs: the generator captures decode, as of a package
        mode = "max-autotune-no-cudagraphs"
        on_cpu = model.device.type == "cpu"  # there the length in use changes decode's shapes
        graphs = [(kv_graphs.PrefillGraph(model), dynamic), (kv_graphs.DecodeGraph(model), on_cpu)]
    mode = mode if max_autotune else "default"
    models = [
        _AsModel(torch.compile(graph, fullgraph=True, dynamic=dynamic, mode=mode))
        for graph, dynamic in graphs
    ]
    return make_engine(models, details, model.dtype, model.device)


@dataclass(frozen=True)
class _AsModel:
    """A module called as a package's model is."""

    module: torch.nn.Module

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.module(*inputs)]
