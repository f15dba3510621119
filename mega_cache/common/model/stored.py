"""What safetensors files hold, by name and place, without torch and without their bytes."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from common.errors import UsageError

# as safetensors calls them -> as torch does, and their bytes
_DTYPES = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U8": ("uint8", 1), "BOOL": ("bool", 1),
}  # fmt: skip
_ITEM_BYTES = dict(_DTYPES.values())


class Stored(NamedTuple):
    """A tensor as it lies in a file: its bytes begin at offset `begin` of `path`."""

    path: Path
    dtype: str  # as torch calls it
    shape: tuple[int, ...]
    begin: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * item_bytes(self.dtype)


def item_bytes(dtype: str) -> int:
    return _ITEM_BYTES[dtype]


def list_stored(folder: Path) -> dict[str, Stored]:
    """Return the folder's tensors, of model.safetensors or the shards of its index; {} if none.

    Raises UsageError, naming the file, for one that is damaged, and for a dtype of quantised
    weights, naming the tensor.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        shards = [whole]
    elif index.exists():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            shards = [folder / name for name in sorted(names)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(index, error) from error
    else:
        shards = []
    return {name: tensor for path in shards for name, tensor in read_header(path).items()}


def read_header(path: Path, begin: int = 0) -> dict[str, Stored]:
    """Return what a safetensors file holds, or a part of another file from offset `begin` on.

    https://huggingface.co/docs/safetensors: 8 bytes little-endian header length, a JSON header
    {name: {dtype, shape, data_offsets}}, then the tensors' bytes. The safetensors package does not
    tell the offsets, which a start maps and uploads by.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            file.seek(begin)
            length = int.from_bytes(file.read(8), "little")
            data = begin + 8 + length
            if data > size:
                raise ValueError("it is cut off, or no safetensors file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _parse_entry(path, name, entry, data, size) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise damaged(path, "its index names it, and it is not there") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error) from error


def _parse_entry(path: Path, name: str, entry: dict, data: int, size: int) -> Stored:
    first, end = (data + offset for offset in entry["data_offsets"])
    if entry["dtype"] not in _DTYPES:
        raise UsageError(
            f"{name} in {path} is {entry['dtype']}: weights are read in bfloat16, float16, "
            "float32 or float64, quantised ones are not; take the model's original checkpoint"
        )
    stored = Stored(path, _DTYPES[entry["dtype"]][0], tuple(entry["shape"]), first)
    if end > size:
        raise ValueError(f"it is cut off at {name}")
    if end - first != stored.nbytes:
        raise ValueError(f"{name} is not as long as its shape says")
    return stored


def damaged(path: Path, error: Exception | str) -> UsageError:
    """Return what to raise for a file of a checkpoint that `error` says cannot be read."""
    words = " ".join(str(error).split()) or type(error).__name__
    return UsageError(f"{path} is damaged ({words}): download it again")
