"""What stands in for Dynamo's guards once a decode step is compiled ahead of time.

Guards cannot be written to a file. What they protect from can be said as plain data: the contract.
It is made at the build, kept in the artifact's metadata, and compared at load and at every call.
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from portable_cache import attention

# what a checkpoint's config.json may change without changing what is computed
VOLATILE_CONFIG = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


class PrecompileMismatch(ValueError):
    """The precompiled step was built for something else; the message says found and expected."""


@dataclass(frozen=True)
class DecodeCall:
    """What `generate` passes to its decode function, less the cache: tensors, plain values."""

    tensors: dict[str, torch.Tensor]
    constants: dict[str, Any]


def make_contract(model: nn.Module, cache: Any, call: DecodeCall, cudagraphs: bool) -> dict:
    """Return everything that must hold wherever the step is used, as JSON values."""
    return {
        "system": _system(model.device),
        "model": _model_contract(model),
        "cache": _cache_contract(cache),
        "inputs": {name: _tensor_contract(tensor) for name, tensor in call.tensors.items()},
        "constants": call.constants,
        "cudagraphs": cudagraphs,
    }


def check_process(contract: dict[str, Any], model: nn.Module, cache: Any) -> None:
    """Raise PrecompileMismatch unless this process is what the step was compiled for."""
    _check_equal(contract["system"], _system(model.device))
    _check_equal(contract["model"], _model_contract(model))
    _check_equal(contract["cache"], _cache_contract(cache))
    _check_unhooked(model)


def split_call(kwargs: dict[str, Any], cache: Any) -> DecodeCall:
    if kwargs.get("past_key_values") is not cache:
        raise PrecompileMismatch("generate was given another cache than the step was bound to")
    rest = {name: value for name, value in kwargs.items() if name != "past_key_values"}
    tensors = {name: value for name, value in rest.items() if isinstance(value, torch.Tensor)}
    return DecodeCall(tensors, {name: rest[name] for name in rest if name not in tensors})


def check_call(call: DecodeCall, contract: dict[str, Any]) -> None:
    """Raise PrecompileMismatch unless call and modes are those the step was compiled for."""
    if torch.is_grad_enabled():
        raise PrecompileMismatch("the decode step was compiled for inference: use no_grad()")
    if call.constants != contract["constants"]:
        raise PrecompileMismatch(
            f"decode step built for {contract['constants']}, generate passed {call.constants}"
        )
    found = {name: _tensor_contract(tensor) for name, tensor in call.tensors.items()}
    if found != contract["inputs"]:
        raise PrecompileMismatch(
            f"decode step built for inputs {contract['inputs']}, generate passed {found}"
        )
    if torch.is_autocast_enabled(next(iter(call.tensors.values())).device.type):
        raise PrecompileMismatch("the decode step was compiled without autocast")


def _tensor_contract(tensor: torch.Tensor) -> list[Any]:
    # strides say nothing in a dimension of size 1, so contiguity is compared in their place
    return [list(tensor.shape), str(tensor.dtype), str(tensor.device), tensor.is_contiguous()]


def _system(device: torch.device) -> dict[str, Any]:
    """Return what the bytes depend on besides the model: bytecode, traced sources, settings."""
    cuda = device.type == "cuda"
    return {
        # Dynamo's output is bytecode of one minor version
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device)
        if cuda
        else torch.backends.cpu.get_cpu_capability(),
        # Inductor writes the thread count into its C++ kernels
        "threads": None if cuda else torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()),
    }


def _model_contract(model: nn.Module) -> dict[str, Any]:
    config = {
        key: value for key, value in model.config.to_dict().items() if key not in VOLATILE_CONFIG
    }
    modules = [[name, type(module).__qualname__] for name, module in model.named_modules()]
    return {
        "config": _digest(config),
        # private, and in neither version part of to_dict(); the step holds this file's code
        "attention": [model.config._attn_implementation, attention.source_digest()],
        "training": model.training,
        "modules": _digest(modules),
        "weights": _digest(_weights(model)),
    }


def _weights(model: nn.Module) -> list[list[Any]]:
    """Return name, form and first name of each parameter and buffer.

    The first name is what differs when two of them are tied in one process and not in the other:
    the graph has one input for both, and would silently use the wrong weight.
    """
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    first_names: dict[int, str] = {}
    return [
        [name, *_tensor_contract(tensor), first_names.setdefault(id(tensor), name)]
        for name, tensor in named
    ]


def _cache_contract(cache: Any) -> dict[str, Any]:
    uninitialised = [index for index, layer in enumerate(cache.layers) if layer.keys is None]
    if uninitialised:
        raise PrecompileMismatch(
            "the cache has no tensors yet: call cache.early_initialization(...) first"
        )
    keys = [_tensor_contract(layer.keys) for layer in cache.layers]
    values = [_tensor_contract(layer.values) for layer in cache.layers]
    kinds = sorted({type(layer).__qualname__ for layer in cache.layers})
    return {"kind": type(cache).__qualname__, "layers": kinds, "keys": keys, "values": values}


def _check_unhooked(model: nn.Module) -> None:
    """Raise PrecompileMismatch if a module would run code that the step does not know."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise PrecompileMismatch(
                f"module {name or 'model'!r} has a hook that the precompiled step would not run"
            )


def _check_equal(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise PrecompileMismatch(
                f"the precompiled decode step was built with {name} {expected.get(name)!r}, "
                f"here it is {found.get(name)!r}"
            )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
