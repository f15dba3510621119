"""Compile the decode step of `generate` ahead of time, and hand it to `generate` in a new process.

A step belongs to one KV cache length, so there is one for each, side by side in the bundle, without
the weights. A loaded start traces nothing, runs no Inductor and builds no guards: they are dropped
at export, and the contract in the artifact's metadata stands in for them (decode_contract).

Seen on torch 2.9.1 with transformers 4.57.5 and on torch 2.13.0 with transformers 5.23.0, on CPU.
"""

import io
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.compiler._cache import CacheArtifactManager
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from portable_cache import saved_graphs
from portable_cache.decode_contract import PrecompileMismatch, check, of_call, of_process

# how a torch that cannot do it says so: private API that moved, or a graph it cannot write; and
# PrecompileMismatch, a RuntimeError
FAILURES = (RuntimeError, AttributeError, TypeError, ImportError, pickle.PickleError, EOFError)


class SavedStep(NamedTuple):
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


class StaticInductor(torch._TorchCompileInductorWrapper):  # aot_compile asks for this base class
    """The Inductor backend, with Dynamo's static shapes.

    torch 2.9.1's aot_compile forgets them: AOTAutograd finds no context for an input in its fresh
    TracingContext and gives every dimension a symbol, weights included. torch 2.13 hands Dynamo's
    contexts on, and nothing is left to add.
    """

    def __call__(self, graph_module: Any, inputs: list[Any]) -> Any:
        from torch._dynamo.source import ConstantSource
        from torch._guards import TracingContext
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext

        contexts = TracingContext.get().tensor_to_context
        for index, tensor in enumerate(inputs):
            if isinstance(tensor, torch.Tensor) and tensor not in contexts:
                contexts[tensor] = StatefulSymbolicContext(
                    dynamic_sizes=[DimDynamic.STATIC] * tensor.dim(),
                    tensor_source=ConstantSource(f"decode_input_{index}"),
                )
        return super().__call__(graph_module, inputs)


def install(model: PreTrainedModel, decode: Callable[..., Any]) -> None:
    """Make `generate` use `decode` for its decode steps; prefill and all else stay as they are."""
    # an instance attribute hides the class's method, on 4.57 and 5.x
    model.get_compiled_call = lambda compile_config: decode


# ---- build -------------------------------------------------------------------------------


def capture_decode_call(model: PreTrainedModel, cache: Cache) -> tuple[dict, dict]:
    """Return what `of_call` says of the first decode call that `generate` makes, by asking it.

    The arguments differ by version. Leaves the cache reset; raises PrecompileMismatch when
    `generate` would not compile.
    """
    calls = []

    def note(**kwargs: Any) -> Any:
        calls.append(of_call(**kwargs))
        return model(**kwargs)

    cache.reset()
    prompt = torch.ones((1, 2), dtype=torch.int64, device=model.device)
    install(model, note)
    try:
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=2,  # the second one is decoded
        )
    finally:
        del model.get_compiled_call
    cache.reset()
    if not calls:
        raise PrecompileMismatch("generate made no compiled decode call: is the cache static?")
    return calls[0]


def export(model: PreTrainedModel, cache: Cache, mode: str) -> SavedStep:
    """Compile the decode step and return it, without weights, cache and guards.

    Runs the step: Triton picks its configurations at the first run, not at compilation.
    """
    from torch._dynamo import config

    tensors, call = capture_decode_call(model, cache)
    step = DecodeStep(model, cache, call["constants"])
    options = torch._inductor.list_mode_options(mode)
    # a CUDA graph is captured around the whole step, here and at a load alike
    cudagraphs = options.pop("triton.cudagraphs", False) and model.device.type == "cuda"
    contract = {"process": of_process(model, cache), "call": call, "cudagraphs": cudagraphs}
    # read when the wrapper is made: without it there is no aot_compile. The fresh cache: torch
    # would record the step among the graphs too, under a key nobody looks up (1 MB a length)
    with config.patch(enable_aot_compile=True), CacheArtifactManager.with_fresh_cache():
        compiled = torch._dynamo.optimize(
            backend=StaticInductor("default", options, False),
            nopython=True,
            dynamic=False,
            guard_filter_fn=lambda guards: [False] * len(guards),
        )(step)
        function = compiled.forward.aot_compile(((tensors,), {}))
    run = partial(function, step)
    run(tensors)
    if cudagraphs:
        GraphedStep(run, tensors)
    cache.reset()
    graph = function._artifacts.compiled_fn
    if "data" in vars(graph):  # 2.9.1 pickles the graph when it compiles, not when it is asked
        graph.data = saved_graphs.repickle(graph.data)
    with saved_graphs.load_ready():
        saved = type(function).serialize(function)
    # as save_compiled_function does; 2.9.1 returns bytes, 2.13 a result that holds them
    return SavedStep(saved if isinstance(saved, bytes) else saved.serialized_data, contract)


# ---- run ---------------------------------------------------------------------------------


def load(saved: SavedStep, model: PreTrainedModel, cache: Cache) -> Callable[..., Any]:
    """Return a decode function for `generate`, bound to this process's model and cache.

    What was saved is code: its origin must have been checked. Raises PrecompileMismatch before any
    of it is unpickled if it was built for something else. With CUDA graphs the first call captures
    one.
    """
    import torch._inductor.debug  # a compiled graph asks it at every call, and 2.9.1 forgets to
    from torch._inductor import config

    contract = saved.contract
    check(contract["process"], of_process(model, cache))
    # deserialisation reads the global setting, whatever the step was compiled with
    with config.patch({"triton.cudagraphs": False}), _without_the_compiler():
        # `fn`: without the guard check of AOTCompiledFunction.__call__, in which 2.9.1 keeps
        # GLOBAL_STATE whatever the filter says; what of that can differ here is in `of_process`
        function = torch.compiler.load_compiled_function(io.BytesIO(saved.content)).fn
    run = partial(function, DecodeStep(model, cache, contract["call"]["constants"]))

    def decode(**kwargs: Any) -> CausalLMOutputWithPast:
        nonlocal run
        tensors, found = of_call(**kwargs)
        check(contract["call"], found)
        if contract["cudagraphs"] and not isinstance(run, GraphedStep):
            run = GraphedStep(run, tensors)
        return CausalLMOutputWithPast(logits=run(tensors), past_key_values=cache)

    return decode


@contextmanager
def _without_the_compiler() -> Iterator[None]:
    """Spare a load what it asks of the compiler and never uses.

    FxGraphCache.cache_hit_post_compile (2.9 to 2.13) imports Inductor's code generator (1 s) to
    look at one attribute, a hook of torch's own tests, and starts Triton's driver and ptxas for the
    key of a cache that only Meta has. Nothing keeps the stand-in, so that the process can compile
    whatever it wants later.
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
