"""Compile the decode step of `generate` ahead of time, as one library for every KV cache length.

By two documented functions: torch.export.export and torch._inductor.aoti_compile_and_package. The
step is asked of `generate` itself, since its arguments differ by version and by model.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from common.compiler.host_code import portable_host_code
from common.errors import ScriptError, first_line
from common.machine import LEVEL_FEATURES, cpu_features, host_code_is_portable
from portable_cache import torch_private
from portable_cache.flags import CompileFlags
from portable_cache.start import decode_step
from portable_cache.start.decode_step import SavedStep, state_of, tensors_in
from portable_cache.start.generation import CACHE, configure_generation, make_cache

# elements of a constant that a model makes while it runs, and that the metadata can hold
_LARGEST_CONSTANT = 4096

# how torch says that it can't export or compile a model: most are a RuntimeError
_FAILURES = (RuntimeError, AttributeError, TypeError, LookupError, ValueError, AssertionError)


class DecodeCall(NamedTuple):
    """One call that `generate` made, and the KV cache that it was made with."""

    arguments: dict[str, Any]
    cache: Cache


class DecodeStep(nn.Module):
    """What is exported: `tensors` are those of a call, then those of its KV cache."""

    def __init__(self, model: nn.Module, call: DecodeCall):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, tensors: list[Tensor]) -> Tensor:
        remaining = iter(tensors)
        arguments = {name: _filled(v, remaining) for name, v in self.call.arguments.items()}
        for layer in self.call.cache.layers:
            for name, value in sorted(vars(layer).items()):
                if isinstance(value, Tensor):
                    setattr(layer, name, next(remaining))
        output = self.model(**arguments, **{CACHE: self.call.cache})
        return output.logits  # (batch, 1, vocab)


def export_step(model: PreTrainedModel, flags: CompileFlags, folder: Path) -> SavedStep:
    """Return the decode step, compiled for KV caches of any length; `folder` is for files.

    Sizes are tried out for the longest. Raises ScriptError with the reason where it can't be made.
    """
    slots = max(flags.cache_lengths())
    try:
        call = capture_call(model, flags, slots)
        return _compile(model, call, slots, flags.compile_mode, folder)
    except _FAILURES as error:
        if isinstance(error, ScriptError):
            raise
        raise ScriptError(f"{type(error).__name__}: {first_line(error).strip()}") from error


def capture_call(model: PreTrainedModel, flags: CompileFlags, slots: int) -> DecodeCall:
    """Return the first decode call that `generate` makes with a KV cache of `slots`."""
    calls = []

    def note(**kwargs: Any) -> Any:
        calls.append({name: value for name, value in kwargs.items() if name != CACHE})
        return model(**kwargs)

    cache = make_cache(model, slots)
    prompt = torch.ones((1, 2), dtype=torch.int64, device=model.device)
    configure_generation(model, flags, max_new_tokens=2)  # the second one is decoded
    torch_private.use_decode_step(model, note)
    try:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **{CACHE: cache})
    finally:
        torch_private.forget_compiled_state(model)
    if not calls:
        raise ScriptError("generate made no compiled decode call")
    return DecodeCall(calls[0], cache)


def _compile(
    model: PreTrainedModel, call: DecodeCall, slots: int, mode: str, folder: Path
) -> SavedStep:
    options = dict(torch_private.list_mode_options(mode))
    # a CUDA graph is captured around the whole step, at the start
    device = model.device.type
    cudagraphs = options.pop("triton.cudagraphs", False) and device == "cuda"
    needed = LEVEL_FEATURES if host_code_is_portable(device) else cpu_features()
    contract = {
        "process": decode_step.of_process(model),
        "call": decode_step.of_call(call.arguments, call.cache),
        "cudagraphs": cudagraphs,
        "processor": sorted(needed),
    }
    program, known = export(model, call, slots), decode_step.weights_of(model)
    constants = {n: t for n, t in program.constants.items() if n not in known}
    if large := [name for name, t in constants.items() if t.numel() > _LARGEST_CONSTANT]:
        raise ScriptError(f"the model makes a large constant while it runs: {large[0]}")
    contract["constants"] = {
        name: [str(tensor.dtype).removeprefix("torch."), tensor.tolist()]
        for name, tensor in constants.items()
    }
    options["aot_inductor.package_constants_in_so"] = False
    # for two C++ files, each with headers of its own, that is twice the work
    options["aot_inductor.precompile_headers"] = False
    # AOTInductor writes into this setting and leaves it so, and it is in the key of each graph that
    # is compiled later
    clean = torch_private.config.patch({"aot_inductor.metadata": {}})
    with clean, portable_host_code(device):
        path = torch_private.compile_package(
            program, package_path=str(folder / "step.pt2"), inductor_configs=options
        )
    return SavedStep(Path(path).read_bytes(), contract)


def export(model: PreTrainedModel, call: DecodeCall, slots: int) -> torch.export.ExportedProgram:
    """Return the program of a decode call, its inputs a list; KV caches may have any length.

    The call's KV cache can't be used afterwards.
    """
    inputs, state = list(tensors_in(call.arguments)), state_of(call.cache)
    length = torch.export.Dim("slots", min=2, max=2**20)
    places = [decode_step.slot_dimension(one, slots) for one in inputs]
    shapes = [{} if at is None else {at: length} for at in places]
    shapes += [{2: length} if one.dim() == 4 else {} for one in state]  # K or V, or a count
    # non-strict: the step's Python runs as it is, and Dynamo is not asked
    return torch.export.export(
        DecodeStep(model, call), (inputs + state,), dynamic_shapes=[shapes], strict=False
    )


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return an argument with the next tensors in the places of its own."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {name: _filled(inner, tensors) for name, inner in value.items()}
    return value
