"""What a checkpoint's safetensors files hold, by name, without torch and without their bytes."""

import json
from dataclasses import dataclass
from pathlib import Path

from common.errors import UsageError

_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
    "BOOL": 1,
}  # fmt: skip
_AGAIN = "download it again"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file: `nbytes` bytes from offset `begin` of `path`."""

    path: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def list_stored(folder: Path) -> dict[str, StoredTensor]:
    """Return the folder's tensors, of model.safetensors or the shards of its index; {} if none.

    Raises UsageError, naming the file, for one that is damaged, and for a dtype of quantised
    weights, naming the tensor.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        shards = [whole]
    elif index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{index} is damaged ({_words(error)}): {_AGAIN}") from error
        shards = [folder / name for name in names]
    else:
        shards = []
    return {name: tensor for path in shards for name, tensor in _read_header(path).items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """https://huggingface.co/docs/safetensors: header length, JSON header, the tensors' bytes."""
    stored = {}
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > size:
                raise ValueError("it is cut off, or no safetensors file")
            header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape, dtype = tuple(entry["shape"]), entry["dtype"]
            if start + end > size:
                raise ValueError(f"it is cut off at {name}")
            stored[name] = StoredTensor(path, dtype, shape, start + begin, end - begin)
            items = 1
            for length in shape:
                items *= length
            if dtype in _BYTES and items * _BYTES[dtype] != end - begin:
                raise ValueError(f"{name} is not as long as its shape says")
    except FileNotFoundError as error:
        raise UsageError(f"{path} is named in its index and not there: {_AGAIN}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({_words(error)}): {_AGAIN}") from error
    for name, tensor in stored.items():
        if tensor.dtype not in _BYTES:
            raise UsageError(
                f"{name} in {path} is {tensor.dtype}: weights are read in bfloat16, float16, "
                "float32 or float64, quantised ones are not; take the model's original checkpoint"
            )
    return stored


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
