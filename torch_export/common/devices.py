"""Choice of device and dtype, and the device's own clock barrier."""

import logging
from typing import TYPE_CHECKING

from common.errors import EnvironmentProblemError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cuda", "cpu")
DTYPES = ("auto", "bfloat16", "float16", "float32")


def choose_device(name: str) -> "torch.device":
    """Return the device for `--device`: auto is CUDA when there is one."""
    import torch

    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EnvironmentProblemError(
            "--device cuda: torch sees no CUDA GPU on this machine; check nvidia-smi and that "
            f"torch {torch.__version__} is a CUDA build, or use --device cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(name: str, device: "torch.device") -> "torch.dtype":
    """Return the dtype for `--dtype`: auto is bfloat16 on CUDA and float32 on CPU."""
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def synchronize(device: "torch.device") -> None:
    """Wait until the device has finished, so that a clock read next counts its work."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def device_memory(device: "torch.device") -> dict[str, int] | None:
    """Return the most bytes that this process's tensors held on the GPU at once; None on a CPU."""
    if device.type != "cuda":
        return None
    import torch

    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def quiet_compiler_logs(device: "torch.device") -> None:
    """Keep Inductor's notes about missing CUDA graphs off stderr where there is no CUDA.

    On a GPU they stay: there a skipped CUDA graph is news.
    """
    if device.type != "cuda":
        logging.getLogger("torch._inductor").setLevel(logging.ERROR)
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
