"""Open a `.pt2` with torch alone: no Dynamo, no Inductor, no transformers in the process.

Private API: `torch._C._aoti.AOTIModelPackageLoader`, the loader under `aoti_load_package`. Read in
torch 2.9.1 and 2.13.0: the same five positional arguments. It extracts the one model's files to a
folder under /tmp (or TMPDIR from 2.10 on), removed when the loader is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch


class Model(Protocol):
    """A graph that takes the list of its inputs and returns the list of its outputs."""

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]: ...


def device_index(device: torch.device) -> int:
    """Return the index that the loader wants: -1 stands for the CPU."""
    return -1 if device.type == "cpu" else device.index or 0


def open_model(path: str | Path, name: str, device_index: int = -1):
    """Return a loader for model `name` of the package, on CUDA device `device_index` (-1: current).

    Raises RuntimeError if the package has no such model or is for a device that is not there.
    """
    # Single threaded: no lock and no event per call, which a CUDA graph capture does not tolerate
    # (pytorch #148601); it demands one runner.
    return torch._C._aoti.AOTIModelPackageLoader(str(path), name, True, 1, device_index)


def bind_constants(loader, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let a model that holds code only read `tensors`, in place. The caller keeps them alive."""
    names = set(loader.get_constant_fqns())
    if missing := sorted(names - set(tensors)):
        raise ValueError(f"the package needs tensors that were not loaded: {', '.join(missing)}")
    used = {name: tensors[name] for name in names}
    # (map, use_inactive, check_full_update, user_managed): user managed means bound without a copy.
    loader.load_constants(used, False, True, True)
