"""What a script works on: the model, the device and the dtype; and how the model is loaded.

Differences between the supported stacks that both folders meet are settled here. Reference: torch
2.9.1 + transformers 4.57.5; also torch 2.11 + transformers 5.17, and torch 2.13 + the newest.
"""

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.checkpoints import Checkpoint, resolve_checkpoint
from common.cli import Console, SharedFlags
from common.errors import EnvironmentProblemError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Target:
    """The model to run, and where and in what precision."""

    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def describe_model(self) -> dict[str, Any]:
        """Return what an artifact's metadata says of the model."""
        return self.checkpoint.describe() | {"dtype": self.dtype_name}


def choose_target(flags: SharedFlags, console: Console) -> Target:
    device = choose_device(flags.device)
    quiet_compiler_logs(device, console.quiet)
    return Target(
        resolve_checkpoint(flags.model_id, console), device, choose_dtype(flags.dtype, device)
    )


def choose_device(name: str) -> torch.device:
    """Return the device for `--device`: auto is CUDA when there is one."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EnvironmentProblemError(
            "--device cuda: torch sees no CUDA GPU on this machine; check nvidia-smi and that "
            f"torch {torch.__version__} is a CUDA build, or use --device cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for `--dtype`: auto is bfloat16 on CUDA and float32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished, so that a clock read next counts its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_memory(device: torch.device) -> dict[str, int] | None:
    """Return the most bytes that this process's tensors held on the GPU at once; None on a CPU."""
    if device.type != "cuda":
        return None
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def device_bandwidth(device: torch.device) -> float | None:
    """Return the memory's bytes per second by the GPU's own word; None where it says nothing."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    kilohertz = getattr(properties, "memory_clock_rate", 0)
    bits = getattr(properties, "memory_bus_width", 0)
    # two transfers a clock; a driver that no longer tells the clock says 0
    return 2 * kilohertz * 1e3 * bits / 8 or None


def quiet_compiler_logs(device: torch.device, quiet: bool) -> None:
    """Keep off stderr what the compiler says that is no news: advice, and skipped CUDA graphs.

    On a GPU a skipped CUDA graph is news, but for a user who wants none (--quiet).
    """
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    if quiet:
        warnings.filterwarnings("ignore", module=r"(torch|triton)\.")
    if quiet or device.type != "cuda":
        for name in ("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension"):
            logging.getLogger(name).setLevel(logging.ERROR)


def load_model(target: Target) -> "PreTrainedModel":
    """Return the model in eval mode on its device; gradients are off for the whole process."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    # its progress bar would mix with ours, and its advice is about flags we pass on purpose
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(
        target.checkpoint.folder,
        dtype=target.dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        # straight to the GPU: no second copy of the weights in host memory
        device_map=str(target.device) if target.device.type == "cuda" else None,
    )
    return model.eval()
