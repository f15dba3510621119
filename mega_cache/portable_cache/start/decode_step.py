"""The decode step of `generate` as a library that AOTInductor compiled: one, for every KV cache.

The KV cache's tensors are inputs of the library and their slots a dynamic size; the weights are
bound to it once, the model's own. A start with it traces nothing, runs no Inductor and checks no
guards. What those protect from is said as plain data, the contract: made at the build, kept as JSON
in the artifact's metadata, and compared at load (of_process) and at every call (of_call). torch,
transformers, the GPU and the model's architecture are compared with the whole artifact.
"""

import hashlib
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from common.errors import ArtifactMismatchError
from portable_cache import torch_private
from portable_cache.start import attention, cpu_kernels
from portable_cache.start.generation import CACHE

PREFIX = "model."  # of the weights' names in the library, whose module owns the model


class SavedStep(NamedTuple):
    """A compiled decode step, and what has to hold wherever it is used."""

    package: bytes  # a .pt2 without weights
    contract: dict[str, Any]


class GraphedStep:
    """A decode step as one CUDA graph over the addresses of weights, KV cache and its inputs."""

    def __init__(self, run: Callable[[list[Tensor]], Tensor], inputs: list[Tensor], state: list):
        self.inputs = [tensor.clone() for tensor in inputs]
        counters = {tensor: tensor.clone() for tensor in state if tensor.dim() == 0}
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            run(self.inputs + state)  # what libraries set up at a first call can't be captured
            for tensor, before in counters.items():  # that call was no token
                tensor.copy_(before)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = run(self.inputs + state)  # (batch, 1, vocab), rewritten by every replay

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.logits


def load(saved: SavedStep, model: PreTrainedModel) -> Callable[..., CausalLMOutputWithPast]:
    """Return a decode function for `generate` over the model's own weights.

    What was saved is code: its origin must have been checked. Raises ArtifactMismatchError before
    any of it is loaded if it was built for something else. With CUDA graphs the first call with a
    KV cache captures one.
    """
    contract = saved.contract
    check(contract["process"], of_process(model))
    cpu_kernels.check_processor(contract["processor"])
    with tempfile.TemporaryDirectory(prefix="llama-step-") as folder:
        path = Path(folder, "step.pt2")
        path.write_bytes(saved.package)
        index = model.device.index if model.device.type == "cuda" else -1
        # of the one model in it; without locks, which no CUDA graph can capture; one instance
        loader = torch_private.PackageLoader(str(path), "model", True, 1, index)
    own = weights_of(model) | {
        name: torch.tensor(values, dtype=getattr(torch, dtype), device=model.device)
        for name, (dtype, values) in contract["constants"].items()
    }
    bound = {name: own[name] for name in loader.get_constant_fqns()}
    # at once, all of them, and not copied
    loader.load_constants(bound, False, True, True)
    graphs: weakref.WeakKeyDictionary[Cache, GraphedStep] = weakref.WeakKeyDictionary()

    def run(tensors: list[Tensor]) -> Tensor:
        return loader.run(tensors)[0]

    def decode(**kwargs: Any) -> CausalLMOutputWithPast:
        cache = kwargs.pop(CACHE)
        check(contract["call"], of_call(kwargs, cache))
        inputs, state = list(tensors_in(kwargs)), state_of(cache)
        if not contract["cudagraphs"]:
            logits = run(inputs + state)
        else:
            if cache not in graphs:
                graphs[cache] = GraphedStep(run, inputs, state)
            logits = graphs[cache](inputs)
        return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})

    decode.weights = bound  # the library holds their addresses only
    return decode


# ---- the contract --------------------------------------------------------------------------


def check(built: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ArtifactMismatchError unless everything found is what the step was compiled for."""
    for name, value in found.items():
        if built.get(name) != value:
            raise ArtifactMismatchError(
                f"the decode step was built with {name} {built.get(name)!r}, here it is {value!r}"
            )


def of_process(model: PreTrainedModel) -> dict[str, Any]:
    """Return what must hold of this process, besides what the artifact's metadata says."""
    cuda = model.device.type == "cuda"
    return {
        # Inductor writes it into C++ kernels
        "threads": None if cuda else torch.get_num_threads(),
        "attention": hashlib.sha256(Path(attention.__file__).read_bytes()).hexdigest(),
    }


def of_call(kwargs: Mapping[str, Any], cache: Cache) -> dict[str, Any]:
    """Return what must hold of a decode call: the form of each argument and of the KV cache."""
    slots = cache.layers[0].keys.shape[2]
    layers = {
        f"{type(layer).__name__} {_form(layer.keys, slots)} {_form(layer.values, slots)}"
        for layer in cache.layers
    }
    return {name: _form(value, slots) for name, value in kwargs.items()} | {CACHE: sorted(layers)}


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters and buffers under every name that the library may know them by."""
    named = {}
    for kind in (model.named_parameters, model.named_buffers):
        named |= {PREFIX + name: tensor for name, tensor in kind(remove_duplicate=False)}
    return named


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among a call's arguments; models with two kinds of layers give a dict."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)


def state_of(cache: Cache) -> list[Tensor]:
    """Return the tensors of a KV cache: keys, values, and in transformers 5 a count of tokens."""
    return [
        value
        for layer in cache.layers
        for _, value in sorted(vars(layer).items())
        if isinstance(value, Tensor)
    ]


def slot_dimension(tensor: Tensor, slots: int) -> int | None:
    """Return the dimension that counts a KV cache's slots: of keys, values and masks; else None.

    Other sizes may be equal to it: a head's, say.
    """
    sizes = tensor.shape
    if len(sizes) == 4 and sizes[2] == slots:  # (batch, heads, slots, head_dim)
        return 2
    return len(sizes) - 1 if sizes and sizes[-1] == slots else None


def _form(value: Any, slots: int) -> Any:
    """Return what the step depends on: for a tensor its kind, for anything else the value."""
    if isinstance(value, Tensor):
        shape: list[Any] = list(value.shape)
        if (at := slot_dimension(value, slots)) is not None:
            shape[at] = "slots"
        # strides say nothing in a dimension of size 1, so contiguity is compared in their place
        return [shape, str(value.dtype), str(value.device), value.is_contiguous()]
    if isinstance(value, Mapping):
        return {name: _form(inner, slots) for name, inner in value.items()}
    return value if isinstance(value, bool | int | float | str | None) else str(type(value))
