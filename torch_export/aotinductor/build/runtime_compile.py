"""What a start without a package serves with: transformers' model, or its graphs, compiled here."""

import ctypes
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aotinductor.build.base_package import BaseGraph, compile_base_package
from aotinductor.build.layer_graphs import make_programs
from aotinductor.build.layer_package import cache_shape, compile_layer_package, describe_package
from aotinductor.flags import LoadFlags
from aotinductor.lengths import Bounds, Plan
from aotinductor.start.base_engine import BaseEngine
from aotinductor.start.kv_engine import KvEngine, State
from aotinductor.start.loading import EMBEDDING, Opening, assemble, choose_library, make_state
from aotinductor.start.memory import GpuMemory, Memory
from aotinductor.start.package import Package
from aotinductor.start.steps import DECODE, PREFILL
from common.cli import Console, SamplingFlags
from common.compiler.toolchain import prepare_toolchain, quieten
from common.model.eager import load_model
from common.model.target import Target
from common.model.weights import Tensor

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
            engine = open_compiled(path, details, target, plan, opening.capture)
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
    path: Path, details: dict[str, Any], target: Target, plan: Plan, capture: bool = True
) -> KvEngine | BaseEngine:
    """Return an engine over a package that this process has just compiled."""
    with open(path, "rb") as file:
        library = choose_library("auto", details)
        return assemble(Package(file, path, details), target, plan, library, capture)


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


# --- programs that torch compiled in this process, over the state of a package's engine ----------


class TorchSteps:
    """What a `KvEngine` steps with, as `PackageSteps`; each program is a function of tensors."""

    takes_prompts = True

    def __init__(
        self, functions: Mapping[str, Callable[..., object]], details: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor], state: State, memory: Memory,
    ):  # fmt: skip
        """`details` as the metadata of a package has them. A function writes into its inputs."""
        self._functions, self._inputs = functions, details["programs"]
        self._embedding, self._stream = weights[EMBEDDING].detach(), None
        if isinstance(memory, GpuMemory):
            self._stream = torch.cuda.ExternalStream(memory.stream.handle.value)
        views: dict[str, Any] = {
            name: torch_view(one, memory.device) if isinstance(one, Tensor)
            else [torch_view(table, memory.device) for table in one]
            for name, one in state._asdict().items()
        }  # fmt: skip
        names = {name for inputs in self._inputs.values() for name in inputs if "." in name}
        # what the programs of each layer are given, by the names of their inputs
        self._given: list[dict[str, torch.Tensor]] = [
            views
            | {name: weights[name.format(layer=layer)] for name in names}
            | {"keys": views["keys"][layer], "values": views["values"][layer]}
            for layer in range(len(state.keys))
        ]
        self._rotate_with(**details["rope"])

    def _rotate_with(self, inv_freq: Sequence[float], attention_scaling: float) -> None:
        rope = self._given[0]["rope"]  # (2, slots, head_dim): cosines, and signed sines
        angles = torch.outer(torch.arange(rope.shape[1]), torch.tensor(inv_freq))
        cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
        with self._on_stream():
            rope.copy_(torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]))

    def embed(self, token_ids: Sequence[int], name: str) -> None:
        """Put the tokens' embeddings into `row` or the beginning of `hidden`."""
        place = self._given[0][name].view(-1, self._embedding.shape[1])
        with self._on_stream():
            ids = torch.tensor(token_ids, device=place.device)
            place[: len(ids)] = self._embedding[ids]

    def prefill(self, length: int, padded: int) -> None:
        state = self._given[0]
        hidden = state["hidden"][0]  # (slots, hidden)
        with self._on_stream():
            state["position"].fill_(length - 1)  # the head counts the last token itself
            for given in self._given:
                self._call(PREFILL, given | {"hidden": hidden[:padded][None]})
            state["row"].copy_(hidden[length - 1])
            self._call(DECODE[1], state)

    def decode(self, rows: int) -> None:
        with self._on_stream():
            for given in self._given:
                in_use = {name: given[name][:rows] for name in ("keys", "values")}
                self._call(DECODE[0], given | in_use)
            self._call(DECODE[1], self._given[0])

    @torch.no_grad()
    def _call(self, program: str, given: Mapping[str, torch.Tensor]) -> None:
        self._functions[program](*[given[name] for name in self._inputs[program]])

    def _on_stream(self) -> AbstractContextManager:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()


def torch_view(tensor: Tensor, device: str) -> torch.Tensor:
    """Return the same memory as torch sees it; `tensor` must outlive it."""
    dtype = getattr(torch, tensor.dtype)
    if device == "cpu":
        raw = (ctypes.c_char * tensor.nbytes).from_address(tensor.address)
        return torch.frombuffer(raw, dtype=dtype).view(tensor.shape)

    class Bytes:
        __cuda_array_interface__ = {
            "shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.address, False),
            "version": 3,
        }  # fmt: skip

    return torch.as_tensor(Bytes(), device=device).view(dtype).view(tensor.shape)


# --- transformers' own model --------------------------------------------------------------------


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
