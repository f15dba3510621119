"""A `.pt2` as a start sees it: its models opened, and bound to weights. Torch alone, no compiler.

A package holds the models `base`, or `prefill` and `decode`, code only. Their constants lie in a
checkpoint, or, where the weights are embedded, once in the package itself: stored, not deflated, so
that each is read from its offset in the file as from a checkpoint, and nothing but code is unpacked
at a start. A package of the base graph with its weights also holds PLAIN_MODEL.

Private API: `torch._C._aoti.AOTIModelPackageLoader`, the loader under `aoti_load_package`. Read in
torch 2.9.1 and 2.13.0: the same five positional arguments. It extracts the one model's files to a
folder under /tmp (or TMPDIR from 2.10 on), removed when the loader is.
"""

import platform
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from common.model.weights import Stored, target_dtype

PLAIN_MODEL = "model"  # the name that aoti_load_package looks for by itself
COMMON_LEVEL = "x86-64-v3"  # AVX2 and FMA: Intel since 2013, AMD since 2015
# a graph: the list of its inputs -> the list of its outputs
Model = Callable[[list[torch.Tensor]], list[torch.Tensor]]


@dataclass(frozen=True)
class Constant:
    """A tensor that the graphs read, as a row of the metadata has it.

    `aliases` are further names of the same tensor (tied weights): a checkpoint may use any of them.
    `values` holds the tensor where no checkpoint does (rope frequencies), and `offset` says where
    its bytes begin in a package that holds the weights.
    """

    name: str
    shape: Sequence[int]
    dtype: str
    aliases: Sequence[str] = ()
    values: Sequence[float] | None = None
    offset: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def read_constants(
    details: dict[str, Any], device: torch.device
) -> tuple[list[Constant], dict[str, torch.Tensor]]:
    """Return the constants that lie elsewhere, and, as tensors, those that the metadata holds."""
    rows = [Constant(**fields) for fields in details["constants"]]
    values = {
        row.name: torch.tensor(row.values, dtype=row.torch_dtype, device=device).view(row.shape)
        for row in rows
        if row.values is not None
    }
    return [row for row in rows if row.name not in values], values


def find_in_package(constants: Iterable[Constant], path: Path) -> dict[str, Stored]:
    """Return where a package with embedded weights holds each constant."""
    return {
        row.name: Stored(row.name, path, row.torch_dtype, tuple(row.shape), row.offset)
        for row in constants
    }


def find_in_checkpoint(
    constants: Iterable[Constant], stored: Mapping[str, Stored], dtype: torch.dtype | None
) -> dict[str, Stored]:
    """Return what to read for each constant; `dtype` is what it is cast to.

    Raises ValueError naming the tensors that are missing, left over, or of another shape or dtype.
    """
    plan, wrong, known = {}, [], set()
    for row in constants:
        names = (row.name, *row.aliases)
        known.update(names)
        found = next((stored[name] for name in names if name in stored), None)
        if found is None:
            wrong.append(f"missing {row.name}")
        elif list(found.shape) != list(row.shape):
            wrong.append(f"{row.name} has shape {list(found.shape)}, not {list(row.shape)}")
        elif target_dtype(found, dtype) != row.torch_dtype:
            is_dtype = str(found.dtype).removeprefix("torch.")
            wrong.append(f"{row.name} is {is_dtype}, not {row.dtype}")
        else:
            plan[row.name] = found
    # checkpoints of early Llamas hold every layer's rope frequencies, which are computed since
    left_over = [n for n in stored if n not in known and not n.endswith("rotary_emb.inv_freq")]
    wrong += [f"not expected: {name}" for name in left_over]
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit the package ({len(wrong)} tensors): "
            f"{'; '.join(wrong[:8])}. Rebuild the package for it"
        )
    return plan


def check_layout(package: BinaryIO, models: Iterable[str]) -> None:
    """Raise ValueError unless the file is a zip with a library for each model, and no way out.

    The loader extracts every name as it is written, `..` included, runs a compiler where a library
    is missing, and takes the first entry's folder for that of all.
    """
    try:
        with zipfile.ZipFile(package) as archive:  # reads the directory at the file's end
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"no zip file: {error}") from error
    names = [name.split("/") for name in sizes]
    climbs = any(len(parts) < 2 or {"", ".", ".."} & set(parts) for parts in names)
    if climbs or len({parts[0] for parts in names}) != 1:
        raise ValueError("a zip with names that no build writes")
    for model in models:
        folder = f"{names[0][0]}/data/aotinductor/{model}"
        files = [name for name in sizes if name.rpartition("/")[0] == folder]
        libraries = [sizes[name] for name in files if name.endswith(".so")]
        if not libraries or 0 in libraries:
            raise ValueError(f"a zip without a library for {model}")


def open_model(
    path: str | Path, name: str, device: torch.device, tensors: Mapping[str, torch.Tensor]
) -> Model:
    """Return a model that reads `tensors` where they are; they may get their bytes later.

    Raises RuntimeError if the package has no such model, or is for a device that is not there, and
    KeyError if it needs a tensor that is not given.
    """
    index = -1 if device.type == "cpu" else device.index or 0
    # Single threaded: no lock and no event per call, which a CUDA graph capture does not tolerate
    # (pytorch #148601); it demands one runner.
    model = torch._C._aoti.AOTIModelPackageLoader(str(path), name, True, 1, index)
    used = {name: tensors[name] for name in model.get_constant_fqns()}
    # (map, use_inactive, check_full_update, user_managed): user managed means bound without a copy
    model.load_constants(used, False, True, True)
    return model.run


def instruction_set(device: torch.device) -> str:
    """Return what host code built here for `device` needs of a processor, and what this one offers.

    The same word at build and at run is a match: the recipe holds it. A CUDA package's C++ only
    launches kernels, so it is compiled for the common level: compiled for exactly this processor,
    it would die of SIGILL on one without AVX-512. A CPU package computes in it.
    """
    here = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda" and platform.machine() == "x86_64" and here in ("AVX2", "AVX512"):
        return COMMON_LEVEL
    return here
