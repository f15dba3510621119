"""What a start without a package does instead: compile the same graphs in this process."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aotinductor import kv_graphs
from aotinductor.base_generation import Step
from aotinductor.base_graph import BaseGraph, export_base_graph
from aotinductor.base_package import MODEL, compile_base_package
from aotinductor.flags import ShapeFlags
from aotinductor.kv_cache import CacheShape
from aotinductor.kv_generation import Generator
from aotinductor.kv_loading import make_generator
from aotinductor.kv_package import compile_kv_package, open_fresh_package
from aotinductor.loading import base_step
from aotinductor.recipe import Plan
from aotinductor.verification import open_fresh_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RuntimeCompiler:
    """How to compile: `export` makes a package as a build does, else torch.compile.

    `one_dynamic_graph` is for torch.compile: one graph for every length from the start.
    """

    export: bool
    one_dynamic_graph: bool
    max_autotune: bool
    cuda_graph: bool

    def compile(self, model: "PreTrainedModel", plan: Plan) -> Step | Generator:
        """Return what a package would hold; with torch.compile its first call compiles."""
        if plan.slots is None:
            return (
                self._export_base(model, plan) if self.export else self._compile_base(model, plan)
            )
        generator = self._export_kv(model, plan) if self.export else self._compile_kv(model, plan)
        if self.cuda_graph:
            generator.capture()
        return generator

    def _compile_base(self, model: "PreTrainedModel", plan: Plan) -> Step:
        return torch.compile(
            BaseGraph(model),
            fullgraph=True,
            dynamic=self._dynamic(plan),
            mode="max-autotune" if self.max_autotune else "default",
        )

    def _dynamic(self, plan: Plan) -> bool | None:
        if not plan.bounds.dynamic_seq_len:
            return False
        # None is torch's own way: static at first, dynamic from the second length on
        return True if self.one_dynamic_graph else None

    def _compile_kv(self, model: "PreTrainedModel", plan: Plan) -> Generator:
        cache = CacheShape.of(model.config, plan.slots)
        # without Inductor's own CUDA graphs: the generator captures decode, as of a package
        mode = "max-autotune-no-cudagraphs" if self.max_autotune else "default"
        prefill = torch.compile(
            kv_graphs.PrefillGraph(model), fullgraph=True, dynamic=self._dynamic(plan), mode=mode
        )
        decode = torch.compile(
            kv_graphs.DecodeGraph(model),
            fullgraph=True,
            dynamic=model.device.type == "cpu",  # there the length in use changes its shapes
            mode=mode,
        )
        details = {"cache": asdict(cache), "rope": kv_graphs.rope_recipe(model)}
        graphs = [_AsModel(prefill), _AsModel(decode)]
        return make_generator(*graphs, details, model.dtype, model.device)

    def _export_base(self, model: "PreTrainedModel", plan: Plan) -> Step:
        exported = export_base_graph(model, plan.bounds, _example(plan))
        with tempfile.TemporaryDirectory(prefix="llama-package-") as folder:
            path = Path(folder, "model.pt2")
            details = compile_base_package(exported, path, True, self.max_autotune)
            return base_step(open_fresh_model(path, MODEL, details, model, True))

    def _export_kv(self, model: "PreTrainedModel", plan: Plan) -> Generator:
        with tempfile.TemporaryDirectory(prefix="llama-package-") as folder:
            path = Path(folder, "model.pt2")
            details = compile_kv_package(
                model, plan.bounds, plan.slots, _example(plan), path, False, self.max_autotune
            )
            return open_fresh_package(path, details, model, False)


@dataclass(frozen=True)
class _AsModel:
    """A module called as a package's model is."""

    module: torch.nn.Module

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.module(*inputs)]


def _example(plan: Plan) -> int:
    return plan.built.get("example_seq_len", ShapeFlags.example_seq_len)
