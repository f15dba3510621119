"""The base graph's weights, which are its constants: where each one lies, and how it is bound."""

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aotinductor.start.c_interface import Interface, Program, address_of, new_handle
from aotinductor.start.memory import Memory
from common.model.stored import Stored
from common.model.weights import Tensor, convert, target_dtype


class Constant(NamedTuple):
    """A tensor that the graph reads, as a row of the metadata has it.

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


def read_constants(
    details: dict[str, Any], memory: Memory
) -> tuple[list[Constant], dict[str, Tensor]]:
    """Return the constants that lie elsewhere, and, as tensors, those that the metadata holds."""
    rows = [Constant(**fields) for fields in details["constants"]]
    values = {}
    for row in rows:
        if row.values is not None:
            array = np.array(row.values, np.float64).reshape(row.shape)
            held = np.ascontiguousarray(convert(array, "float64", row.dtype))
            place = values[row.name] = memory.zeros(array.shape, row.dtype)
            memory.fill(place, held.nbytes, lambda at, held=held: _copy(at, held))
    return [row for row in rows if row.name not in values], values


def find_in_package(constants: Iterable[Constant], path: Path) -> dict[str, Stored]:
    """Return where a package with embedded weights holds each constant."""
    return {row.name: Stored(path, row.dtype, tuple(row.shape), row.offset) for row in constants}


def find_in_checkpoint(
    constants: Iterable[Constant], stored: Mapping[str, Stored], dtype: str | None
) -> dict[str, Stored]:
    """Return what to read for each constant; `dtype` is what it is cast to.

    Raises ValueError naming the tensors that are missing, or of another shape or dtype.
    """
    plan, wrong = {}, []
    for row in constants:
        found = next((stored[name] for name in (row.name, *row.aliases) if name in stored), None)
        if found is None:
            wrong.append(f"missing {row.name}")
        elif list(found.shape) != list(row.shape):
            wrong.append(f"{row.name} has shape {list(found.shape)}, not {list(row.shape)}")
        elif target_dtype(found, dtype) != row.dtype:
            wrong.append(f"{row.name} is {found.dtype}, not {row.dtype}")
        else:
            plan[row.name] = found
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit the package ({len(wrong)} tensors): "
            f"{'; '.join(wrong[:8])}. Rebuild the package for it"
        )
    return plan


def bind(
    program: Program, steps: ctypes.CDLL, interface: Interface, device: str,
    tensors: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Have the program read `tensors`, by the checkpoint's names, where they are.

    They may get their bytes later. Raises KeyError if it needs one that is not given.
    """
    names, handles = [], []
    for own_name, name in program.constants():
        names.append(own_name)
        handles.append(new_handle(interface, device, tensors[name]).value)
    update = address_of(program.library, "AOTInductorModelContainerUpdateUserManagedConstantBuffer")
    count = len(names)
    status = steps.llama_bind(
        update, program.handle, (ctypes.c_char_p * count)(*names),
        (ctypes.c_void_p * count)(*handles), ctypes.c_int64(count),
    )  # fmt: skip
    if status:
        raise ValueError(f"its weights cannot be bound: code {status}")


def _copy(address: int, array: np.ndarray) -> None:
    ctypes.memmove(address, array.ctypes.data, array.nbytes)
