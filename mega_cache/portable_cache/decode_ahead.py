"""Compile the decode step of `generate` ahead of time, and hand it to `generate` in a new process.

A step belongs to one KV cache length, so there is one for each, side by side.
Build, after the warm-up and before the bundle is saved, for every cache:
    step = export(model, cache, capture_decode_call(model, cache), compile_mode)
    bundle.save_bundle({slots: step.content, ...})      the bytes, without the weights
Run, with `loaded` the loaded bundle and a cache of `slots`:
    decode = load(loaded.decode_steps[slots], contract, model, cache)
    install(model, decode)                              before each request with that cache

A loaded start traces nothing, builds no guards and runs no Inductor. Dynamo's guards are dropped at
export: half of them cannot be written to a file (object identities). What they stood for is the
`contract`, plain data in the artifact's metadata, compared by `load` (weights, ties, modules,
cache, versions, device, settings) and by every decode call (inputs).

Seen on torch 2.9.1 with transformers 4.57.5 and on torch 2.13.0 with transformers 5.23.0, on CPU.
The functions named `_torch_...` are the only ones that touch torch's private modules.
"""

import importlib
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.compiler._cache import CacheArtifactManager
from transformers.modeling_outputs import CausalLMOutputWithPast

from portable_cache import saved_graphs
from portable_cache.decode_contract import (
    DecodeCall,
    PrecompileMismatch,
    check_call,
    check_process,
    make_contract,
    split_call,
)

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

# how a torch that cannot do it says so: private API that moved, or a graph it cannot write
FAILURES = (RuntimeError, AttributeError, TypeError, ImportError, pickle.PickleError, EOFError)


@dataclass(frozen=True)
class ExportedStep:
    """A compiled decode step, and what has to hold wherever it is used."""

    content: bytes
    contract: dict[str, Any]


class DecodeStep(nn.Module):
    """The traced module. It owns model and cache, which makes both inputs at run, not contents."""

    def __init__(self, model: nn.Module, cache: Any, constants: dict[str, Any]):
        super().__init__()
        self.model, self.cache, self.constants = model, cache, constants
        self.train(model.training)

    def forward(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        # only the logits leave the graph: an output class would be one more thing to unpickle
        output = self.model(**tensors, past_key_values=self.cache, **self.constants)
        return output.logits  # (batch, 1, vocab)


# ---- build -------------------------------------------------------------------------------


def capture_decode_call(model: "PreTrainedModel", cache: "Cache", length: int = 2) -> DecodeCall:
    """Return the first decode call that `generate` makes, by asking `generate` itself.

    Its arguments differ by version. Leaves the cache reset; raises PrecompileMismatch when
    `generate` would not compile.
    """
    calls: list[DecodeCall] = []

    def note(**kwargs: Any) -> Any:
        calls.append(split_call(kwargs, cache))
        return model(**kwargs)

    cache.reset()
    prompt = torch.ones((1, length), dtype=torch.int64, device=model.device)
    with installed(model, note):
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=2,
            min_new_tokens=2,  # an early end of sequence would leave no decode call to note
        )
    cache.reset()
    if not calls:
        raise PrecompileMismatch("generate made no compiled decode call: is the cache static?")
    return calls[0]


def export(model: "PreTrainedModel", cache: "Cache", call: DecodeCall, mode: str) -> ExportedStep:
    """Compile the decode step and return it without weights and cache.

    Runs the step: Triton picks its configurations at the first run, not at compilation.
    """
    step = DecodeStep(model, cache, call.constants)
    options = _inductor_options(mode)
    # a CUDA graph is captured around the whole step, here and at a load alike
    cudagraphs = bool(options.pop("triton.cudagraphs", False)) and model.device.type == "cuda"
    contract = make_contract(model, cache, call, cudagraphs)
    with torch.no_grad():  # as `generate` runs it
        function = _torch_compile_ahead(step, call.tensors, options)
        run = partial(function, step)
        run(call.tensors)
        if cudagraphs:
            GraphedStep(run, call.tensors)
    cache.reset()
    return ExportedStep(_torch_function_bytes(function), contract)


# ---- run ---------------------------------------------------------------------------------


def load(
    content: bytes, contract: dict[str, Any], model: "PreTrainedModel", cache: "Cache"
) -> Callable[..., CausalLMOutputWithPast]:
    """Return a decode function for `generate`, bound to this process's model and cache.

    `content` is code: its origin must have been checked. Raises PrecompileMismatch before any of it
    is unpickled if it was built for something else. With CUDA graphs the first call captures one.
    """
    check_process(contract, model, cache)
    step = DecodeStep(model, cache, contract["constants"])
    run = partial(_torch_load_function(content), step)

    def decode(**kwargs: Any) -> CausalLMOutputWithPast:
        nonlocal run
        call = split_call(kwargs, cache)
        check_call(call, contract)
        if contract["cudagraphs"] and not isinstance(run, GraphedStep):
            run = GraphedStep(run, call.tensors)
        return CausalLMOutputWithPast(logits=run(call.tensors), past_key_values=cache)

    return decode


class GraphedStep:
    """A decode step as one CUDA graph over the addresses of the weights, the cache and its inputs.

    Inductor's own CUDA graphs do the same for steps of any shape. They import the whole code
    generator (1.3 s of a start), and check every input's address at every token.
    """

    def __init__(self, run: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor]):
        self.inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run(self.inputs)  # what libraries set up at a first call can't be captured
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = run(self.inputs)  # (batch, 1, vocab), rewritten by every replay

    def __call__(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        for name, tensor in tensors.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.logits


def install(model: "PreTrainedModel", decode: Callable[..., Any]) -> None:
    """Make `generate` use `decode` for its decode steps; prefill and all else stay as they are."""
    # an instance attribute hides the class's method, on 4.57 and 5.x
    model.get_compiled_call = lambda compile_config: decode


def uninstall(model: "PreTrainedModel") -> None:
    vars(model).pop("get_compiled_call", None)


@contextmanager
def installed(model: "PreTrainedModel", decode: Callable[..., Any]) -> Iterator[None]:
    install(model, decode)
    try:
        yield
    finally:
        uninstall(model)


# ---- torch's private modules -------------------------------------------------------------


def _inductor_options(mode: str) -> dict[str, Any]:
    return {} if mode == "default" else dict(torch._inductor.list_mode_options(mode))


def _torch_compile_ahead(
    step: DecodeStep, tensors: dict[str, torch.Tensor], options: dict[str, Any]
) -> Any:
    """Return torch's AOTCompiledFunction for the step. Static shapes; no guards."""
    from torch._dynamo import config

    backend = _torch_static_inductor()("default", options, False)
    # read when the wrapper is made: without it there is no aot_compile. The fresh cache: torch
    # would record the step among the graphs too, under a key that nobody looks up (1 MB a length)
    with config.patch(enable_aot_compile=True), CacheArtifactManager.with_fresh_cache():
        compiled = torch._dynamo.optimize(
            backend=backend,
            nopython=True,
            dynamic=False,
            guard_filter_fn=lambda guards: [False] * len(guards),
        )(step)
        return compiled.forward.aot_compile(((tensors,), {}))


def _torch_static_inductor() -> type:
    """Return the Inductor backend that keeps Dynamo's static shapes.

    torch 2.9.1's aot_compile forgets them: AOTAutograd finds no context for an input in its fresh
    TracingContext and gives every dimension a symbol, weights included. torch 2.13 hands Dynamo's
    contexts on, and nothing is left to add.
    """
    from torch._dynamo.source import ConstantSource
    from torch._guards import TracingContext
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

    # aot_compile asks isinstance of this base class
    class StaticInductor(torch._TorchCompileInductorWrapper):
        def __call__(self, graph_module: Any, inputs: list[Any]) -> Any:
            contexts = TracingContext.get().tensor_to_context
            for index, tensor in enumerate(inputs):
                if isinstance(tensor, torch.Tensor) and tensor not in contexts:
                    contexts[tensor] = StatefulSymbolicContext(
                        dynamic_sizes=[DimDynamic.STATIC] * tensor.dim(),
                        tensor_source=ConstantSource(f"decode_input_{index}"),
                    )
            return super().__call__(graph_module, inputs)

    return StaticInductor


def _torch_function_bytes(function: Any) -> bytes:
    compiled = function._artifacts.compiled_fn
    if "data" in vars(compiled):  # 2.9.1 pickles the graph when it compiles, not when it is asked
        compiled.data = saved_graphs.repickle(compiled.data)
    with saved_graphs.load_ready():
        saved = type(function).serialize(function)
    # as save_compiled_function does; 2.9.1 returns bytes, 2.13 a result that holds them
    return saved if isinstance(saved, bytes) else saved.serialized_data


def _torch_load_function(data: bytes) -> Any:
    """Return the loaded function, without the guard check of AOTCompiledFunction.__call__.

    2.9.1 keeps its GLOBAL_STATE guard whatever the filter says; `_system` has what it stood for.
    """
    import torch._inductor.debug  # a compiled graph asks it at every call, and 2.9.1 forgets to
    from torch._inductor import config

    # deserialisation reads the global setting, whatever the step was compiled with
    with config.patch({"triton.cudagraphs": False}), _without_the_compiler():
        return torch.compiler.load_compiled_function(io.BytesIO(data)).fn


@contextmanager
def _without_the_compiler() -> Iterator[None]:
    """Spare a load what it asks of the compiler and never uses.

    FxGraphCache.cache_hit_post_compile (2.9 to 2.13) imports Inductor's code generator (1 s) to
    look at one attribute, a hook of torch's own tests, and starts Triton's driver and ptxas for the
    key of a cache that only Meta has. Whoever keeps the stand-in gets the real class afterwards, so
    the process can compile whatever it wants later.
    """
    from torch._inductor.runtime import autotune_cache

    name = "torch._inductor.graph"
    stand_in = types.ModuleType(name)
    stand_in.GraphLowering = types.SimpleNamespace(save_output_code=None)
    module = sys.modules.setdefault(name, stand_in)
    has_triton, autotune_cache.has_triton = autotune_cache.has_triton, lambda: False
    try:
        yield
    finally:
        autotune_cache.has_triton = has_triton
        if module is stand_in:
            del sys.modules[name]
            _replace_everywhere("GraphLowering", stand_in.GraphLowering, name)


def _replace_everywhere(attribute: str, stand_in: Any, real_module: str) -> None:
    holders = [m for m in [*sys.modules.values()] if vars(m).get(attribute) is stand_in]
    for holder in holders:
        setattr(holder, attribute, getattr(importlib.import_module(real_module), attribute))
