"""Compile the decode step of `generate` ahead of time, and hand it to `generate` in a new process.

Build, after the warm-up and before the bundle is saved:
    step = export(model, cache, capture_decode_call(model, cache, prompt), compile_mode)
    bundle.record_decode_step(step.content)     the bytes, without the weights
Run, with `loaded` the loaded bundle:
    install(model, load(loaded.decode_step, contract, model, cache))

A loaded start traces nothing, builds no guards and runs no Inductor. Dynamo's guards are dropped at
export: half of them cannot be written to a file (object identities). What they stood for is the
`contract`, plain data in the artifact's metadata, compared by `load` (weights, ties, modules,
cache, versions, device, settings) and by every decode call (inputs).

Seen on torch 2.9.1 with transformers 4.57.5 and on torch 2.13.0 with transformers 5.23.0, on CPU.
The functions named `_torch_...` are the only ones that touch torch's private modules.
"""

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

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

    Runs the step once: Triton picks its configurations at the first run, not at compilation, so the
    bundle must be saved after this.
    """
    step = DecodeStep(model, cache, call.constants)
    options = _inductor_options(mode, model.device)
    cudagraphs = bool(options.get("triton.cudagraphs", False))
    contract = make_contract(model, cache, call, cudagraphs)
    with torch.no_grad():  # as `generate` runs it
        function = _torch_compile_ahead(step, call.tensors, options)
        function(step, call.tensors)
    cache.reset()
    return ExportedStep(_torch_function_bytes(function), contract)


# ---- run ---------------------------------------------------------------------------------


def load(
    content: bytes, contract: dict[str, Any], model: "PreTrainedModel", cache: "Cache"
) -> Callable[..., CausalLMOutputWithPast]:
    """Return a decode function for `generate`, bound to this process's model and cache.

    `content` is code: its origin must have been checked. Raises PrecompileMismatch before any of it
    is unpickled if it was built for something else.
    """
    check_process(contract, model, cache)
    function = _torch_load_function(content, contract["cudagraphs"])
    step = DecodeStep(model, cache, contract["constants"])

    def decode(**kwargs: Any) -> CausalLMOutputWithPast:
        call = split_call(kwargs, cache)
        check_call(call, contract)
        if contract["cudagraphs"]:
            # torch.compile's wrapper does this at each call and a loaded function has no wrapper:
            # without it CUDA graph trees would record every token as a new graph
            torch.compiler.cudagraph_mark_step_begin()
        logits = function(step, call.tensors)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    return decode


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


def _inductor_options(mode: str, device: torch.device) -> dict[str, Any]:
    options = {} if mode == "default" else dict(torch._inductor.list_mode_options(mode))
    if device.type != "cuda" and "triton.cudagraphs" in options:
        # on CPU they only fill the log with the reasons for skipping them
        options["triton.cudagraphs"] = False
    return options


def _torch_compile_ahead(
    step: DecodeStep, tensors: dict[str, torch.Tensor], options: dict[str, Any]
) -> Any:
    """Return torch's AOTCompiledFunction for the step. Static shapes; no guards."""
    from torch._dynamo import config

    backend = _torch_static_inductor()("default", options, False)
    # read when the wrapper is made: without it there is no aot_compile
    with config.patch(enable_aot_compile=True):
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
    # as save_compiled_function does; 2.9.1 returns bytes, 2.13 a result that holds them
    saved = type(function).serialize(function)
    return saved if isinstance(saved, bytes) else saved.serialized_data


def _torch_load_function(data: bytes, cudagraphs: bool) -> Any:
    """Return the loaded function, without the guard check of AOTCompiledFunction.__call__.

    2.9.1 keeps its GLOBAL_STATE guard whatever the filter says; `_system` has what it stood for.
    The mode turned CUDA graphs on for one compilation, but deserialisation reads the global setting
    (pytorch #155703; 2.9.1: BundledAOTAutogradCacheArtifact.after_deserialization, 2.13:
    deserialize_bundled_cache_entry).
    """
    from torch._inductor import config

    with config.patch({"triton.cudagraphs": cudagraphs}):
        return torch.compiler.load_compiled_function(io.BytesIO(data)).fn
