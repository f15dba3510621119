"""What a script works on: the model, the device and the dtype; and how the model is loaded.

Differences between the supported stacks that both folders meet are settled here. Reference: torch
2.9.1 + transformers 4.57.5; also torch 2.11 + transformers 5.17, and torch 2.13 + the newest.
"""

import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from common.cli import Console, SharedFlags
from common.errors import EnvironmentProblemError
from common.model.checkpoint import Checkpoint, resolve_checkpoint
from common.model.resolve import read_config


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
        one = self.checkpoint
        names = {"id": one.model_id, "revision": one.revision}
        return names | {"config_digest": one.config_digest, "dtype": self.dtype_name}


def choose_target(
    flags: SharedFlags, console: Console, known: dict[str, Any] | None = None
) -> Target:
    """Return what the flags name, and keep off stderr what the compiler says that is no news.

    `known` is what an artifact's metadata says of its checkpoint: `resolve_checkpoint`.
    """
    device = torch.device("cpu")
    if flags.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    elif flags.device == "cuda":
        raise EnvironmentProblemError(
            "--device cuda: torch sees no CUDA GPU on this machine; check nvidia-smi and that "
            f"torch {torch.__version__} is a CUDA build, or use --device cpu"
        )
    usual = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, usual if flags.dtype == "auto" else flags.dtype)
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    if console.quiet:
        warnings.filterwarnings("ignore", module=r"(torch|triton)\.")
    if console.quiet or device.type != "cuda":  # a skipped CUDA graph is news where there is a GPU
        for name in ("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension"):
            logging.getLogger(name).setLevel(logging.ERROR)
    return Target(resolve_checkpoint(flags.model_id, console, known), device, dtype)


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


def load_model(target: Target):
    """Return transformers' model in eval mode on its device; gradients are off from here on."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    target.checkpoint.require_weights()
    # its progress bar would mix with ours, and its advice is about flags we pass on purpose
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(
        target.checkpoint.folder,
        config=read_config(target.checkpoint.folder),
        dtype=target.dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        # straight to the GPU: no second copy of the weights in host memory
        device_map=str(target.device) if target.device.type == "cuda" else None,
    )
    return model.eval()
