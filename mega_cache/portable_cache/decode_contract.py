"""What stands in for Dynamo's guards once a decode step is compiled ahead of time.

Half of them cannot be written to a file (object identities). What they protect from can be said as
plain data: the contract. It is made at the build, kept as JSON in the artifact's metadata, and
compared at load (of_process) and at every call (of_call). torch, transformers and the GPU are
compared with the whole artifact.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from portable_cache import attention


class PrecompileMismatch(RuntimeError):
    """The precompiled step was built for something else; the message says found and expected."""


def check(built: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise PrecompileMismatch unless everything found is what the step was compiled for."""
    for name, value in found.items():
        if built.get(name) != value:
            raise PrecompileMismatch(
                f"the precompiled decode step was built with {name} {built.get(name)!r}, here it "
                f"is {value!r}"
            )


def of_call(past_key_values: Any, **rest: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors that `generate` gives its decode function, and what must hold of all."""
    tensors = {name: value for name, value in rest.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in rest.items() if name not in tensors}
    inputs = {name: _form(tensor) for name, tensor in tensors.items()}
    return tensors, {"inputs": inputs, "constants": constants}


def of_process(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return what must hold of this process, its model and its KV cache, as JSON values."""
    cuda = model.device.type == "cuda"
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        # what a checkpoint may change without changing what is computed
        if name not in ("_name_or_path", "transformers_version", "architectures")
        and not name.endswith("_token_id")
    }
    # A tensor's first name is what differs when two of them are tied in one process and not in the
    # other: the graph has one input for both, and would silently use the wrong weight.
    first_names: dict[int, str] = {}
    weights = [
        [name, *_form(tensor), first_names.setdefault(id(tensor), name)]
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    ]
    layers = {
        f"{type(layer).__qualname__} {_form(layer.keys)} {_form(layer.values)}"
        for layer in cache.layers
    }
    return {
        # Dynamo's output is bytecode of one minor version
        "python": ".".join(platform.python_version_tuple()[:2]),
        # Inductor writes both into its C++ kernels
        "cpu": None if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": None if cuda else torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "config": _digest(config),
        # private, and in neither version part of to_dict(); the step holds that file's code
        "attention": [
            model.config._attn_implementation,
            _digest(Path(attention.__file__).read_text()),
        ],
        "weights": _digest(weights),
        "cache": [type(cache).__qualname__, *sorted(layers)],
    }


def _form(tensor: torch.Tensor) -> list[Any]:
    # strides say nothing in a dimension of size 1, so contiguity is compared in their place
    return [list(tensor.shape), str(tensor.dtype), str(tensor.device), tensor.is_contiguous()]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
