"""The model that a script works on, and where and in what precision it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.checkpoints import Checkpoint, resolve_checkpoint
from common.console import Console
from common.devices import choose_device, choose_dtype, quiet_compiler_logs
from common.flags import SharedFlags

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Target:
    """The model to run, and where and in what precision."""

    checkpoint: Checkpoint
    device: "torch.device"
    dtype: "torch.dtype"

    def describe_model(self) -> dict[str, Any]:
        return self.checkpoint.describe() | {"dtype": str(self.dtype).removeprefix("torch.")}


def choose_target(flags: SharedFlags, presets_folder: Path, console: Console) -> Target:
    device = choose_device(flags.device)
    quiet_compiler_logs(device)
    checkpoint = resolve_checkpoint(flags.model_id, presets_folder, console)
    return Target(checkpoint, device, choose_dtype(flags.dtype, device))
