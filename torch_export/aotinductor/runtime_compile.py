"""What a start without a package does instead: eager, or the same graphs compiled right here."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aotinductor import kv_graphs
from aotinductor.base import BaseGraph
from aotinductor.compile_package import compile_base_package, compile_kv_package
from aotinductor.flags import ShapeFlags
from aotinductor.kv_generation import CacheShape
from aotinductor.lengths import Plan
from aotinductor.loading import Engine, make_engine
from aotinductor.package import Constant, find_in_package, make_values, open_model
from common.cli import SamplingFlags
from common.serve import TokenStreamer
from common.weights import start_upload

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

    def compile(self, model: "PreTrainedModel", plan: Plan) -> Engine:
        """Return what a package would hold; with torch.compile its first call compiles."""
        if self.export:
            engine = self._export(model, plan)
        elif plan.slots is None:
            mode = "max-autotune" if self.max_autotune else "default"
            compiled = self._compiled(BaseGraph(model), self._dynamic(plan), mode)
            engine = make_engine([compiled], {}, model.dtype, model.device)
        else:
            engine = self._compile_kv(model, plan)
        if self.cuda_graph:
            engine.capture()
        return engine

    def _compile_kv(self, model: "PreTrainedModel", plan: Plan) -> Engine:
        details = {
            "cache": asdict(CacheShape.of(model.config, plan.slots)),
            "rope": kv_graphs.rope_recipe(model),
        }
        # without Inductor's own CUDA graphs: the generator captures decode, as of a package
        mode = "max-autotune-no-cudagraphs" if self.max_autotune else "default"
        on_cpu = model.device.type == "cpu"  # there the length in use changes decode's shapes
        models = [
            self._compiled(kv_graphs.PrefillGraph(model), self._dynamic(plan), mode),
            self._compiled(kv_graphs.DecodeGraph(model), on_cpu, mode),
        ]
        return make_engine(models, details, model.dtype, model.device)

    def _compiled(self, module: torch.nn.Module, dynamic: bool | None, mode: str) -> "_AsModel":
        return _AsModel(torch.compile(module, fullgraph=True, dynamic=dynamic, mode=mode))

    def _dynamic(self, plan: Plan) -> bool | None:
        if not plan.bounds.dynamic_seq_len:
            return False
        # None is torch's own way: static at first, dynamic from the second length on
        return True if self.one_dynamic_graph else None

    def _export(self, model: "PreTrainedModel", plan: Plan) -> Engine:
        example = plan.built.get("example_seq_len", ShapeFlags.example_seq_len)
        with tempfile.TemporaryDirectory(prefix="llama-package-") as folder:
            path = Path(folder, "model.pt2")
            if plan.slots is None:
                details = compile_base_package(
                    model, plan.bounds, example, path, False, self.max_autotune
                )
            else:
                details = compile_kv_package(
                    model, plan.bounds, plan.slots, example, path, False, self.max_autotune
                )
            return open_fresh_package(path, details, model)


def open_fresh_package(path: Path, details: dict, model: "PreTrainedModel") -> Engine:
    """Return an engine over a package just built: on its own weights, or else on the model's."""
    constants = [Constant(**row) for row in details["constants"]]
    if any(constant.offset is not None for constant in constants):
        upload = start_upload(find_in_package(constants, path), model.device)
        tensors = upload.wait() | make_values(constants, model.device)
    else:
        tensors = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
    models = [open_model(path, name, model.device, tensors) for name in details["graphs"]]
    return make_engine(models, details, model.dtype, model.device)


@dataclass(frozen=True)
class EagerGenerator:
    """Hugging Face `generate` as it is, without any compilation."""

    model: "PreTrainedModel"
    padding_id: int
    sampling: SamplingFlags
    seed: int

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        on_token: Callable[[int], None] | None = None,
    ) -> list[int]:
        """Return the new token ids, a stop id included. `on_token` gets each one as it arrives."""
        from transformers import GenerationConfig

        ids = torch.tensor([prompt], device=self.model.device)  # (1, prompt) int64
        flags = self.sampling
        limits = {"temperature": flags.temperature, "top_k": flags.top_k, "top_p": flags.top_p}
        # every choice is set, so that none is left to the checkpoint's own defaults
        self.model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=self.padding_id,
            do_sample=flags.temperature > 0,
            **limits if flags.temperature else {},
        )
        torch.manual_seed(self.seed)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            disable_compile=True,
            streamer=TokenStreamer(on_token) if on_token else None,
        )  # (1, prompt + new_tokens) int64
        return output[0, ids.shape[1] :].tolist()


@dataclass(frozen=True)
class _AsModel:
    """A module called as a package's model is."""

    module: torch.nn.Module

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.module(*inputs)]
