"""The checkpoint's weights as torch's tensors, over the memory that `common` brings them to."""

import ctypes
from collections.abc import Callable

import torch

from common.model import weights
from common.model.target import Target


def start_upload(target: Target) -> Callable[[], dict[str, torch.Tensor]]:
    """Start to bring the weights to the device; the function returned waits for them, by name."""
    stored = target.checkpoint.stored
    if target.device != "cuda":
        host = weights.start_upload(stored, target.device, target.dtype, _convert).wait()
        return lambda: {name: _view(_memory_of(one), one) for name, one in host.items()}
    _, total = weights.device_layout(stored, target.dtype)
    # in memory of torch's own; zeros, as ordinary numbers, until the bytes are there
    pool = torch.zeros(total, dtype=torch.uint8, device=target.device)
    torch.cuda.synchronize()
    base = pool.data_ptr()
    upload = weights.start_upload(stored, target.device, target.dtype, _convert, base)

    def wait() -> dict[str, torch.Tensor]:
        placed = upload.wait()
        return {name: _view(pool[one.address - base :], one) for name, one in placed.items()}

    return wait


def _convert(source: int, dtype: str, place: int, wanted: str, count: int) -> None:
    one, other = weights.Tensor(source, (count,), dtype), weights.Tensor(place, (count,), wanted)
    _view(_memory_of(other), other).copy_(_view(_memory_of(one), one))


def _memory_of(one: weights.Tensor) -> torch.Tensor:
    raw = (ctypes.c_char * one.nbytes).from_address(one.address)
    raw.owner = one.owner  # torch keeps `raw`, which keeps what the memory belongs to
    return torch.frombuffer(raw, dtype=torch.uint8)


def _view(memory: torch.Tensor, one: weights.Tensor) -> torch.Tensor:
    return memory[: one.nbytes].view(getattr(torch, one.dtype)).view(one.shape)
