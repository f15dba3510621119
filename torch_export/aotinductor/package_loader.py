"""Open a `.pt2` with torch alone: no Dynamo, no Inductor, no transformers in the process.

Private API: `torch._C._aoti.AOTIModelPackageLoader`, the loader under `aoti_load_package`. Read in
torch 2.9.1 and 2.13.0: the same five positional arguments. It extracts the one model's files to a
folder under /tmp (or TMPDIR from 2.10 on), removed when the loader is.
"""

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

import torch


class Model(Protocol):
    """A graph that takes the list of its inputs and returns the list of its outputs."""

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]: ...


def device_index(device: torch.device) -> int:
    """Return the index that the loader wants: -1 stands for the CPU."""
    return -1 if device.type == "cpu" else device.index or 0


def check_layout(package: BinaryIO, models: Iterable[str]) -> None:
    """Raise ValueError unless the file is a zip with a library for each model, and no way out.

    The loader extracts every name as it is written, `..` included, runs a compiler where a library
    is missing, and takes the first entry's folder for that of all.
    """
    try:
        with zipfile.ZipFile(package) as archive:  # reads the directory at the file's end
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"no zip file: {error}") from error
    names = [entry.filename.split("/") for entry in entries]
    if any(len(parts) < 2 or {"", ".", ".."} & set(parts[:-1]) for parts in names):
        raise ValueError("a zip with names that no build writes")
    if len({parts[0] for parts in names}) != 1 or any(parts[-1] == ".." for parts in names):
        raise ValueError("a zip with other folders than one package's")
    for model in models:
        folder = ["data", "aotinductor", model]
        found = [
            entry.file_size
            for entry, parts in zip(entries, names, strict=True)
            if parts[1:-1] == folder and parts[-1].endswith(".so")
        ]
        if not found or not all(found):
            raise ValueError(f"a zip without a library for {model}")


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
