"""What a script works on: the model, the device and the dtype. Nothing here imports torch."""

import sys
from typing import Any, NamedTuple

from common import cuda, machine
from common.artifact.manifest import Manifest
from common.cli import DTYPES, Console, SharedFlags
from common.errors import EnvironmentProblemError
from common.model.checkpoint import Checkpoint, resolve_checkpoint


class Target(NamedTuple):
    """The model to run, and where and in what precision: torch's names for both."""

    checkpoint: Checkpoint
    device: str  # cpu or cuda
    dtype: str

    def describe_model(self) -> dict[str, Any]:
        """Return what an artifact's metadata says of the model."""
        one = self.checkpoint
        names = {"id": one.model_id, "revision": one.revision}
        return names | {"config_digest": one.config_digest, "dtype": self.dtype}


def choose_target(
    flags: SharedFlags, console: Console, known: dict[str, Any] | None = None
) -> Target:
    """Return what the flags name; from here on the GPU, if it is one, is in use.

    `known` is what an artifact's metadata says of its checkpoint: `resolve_checkpoint`.
    """
    device = choose_device(flags.device)
    usual = "bfloat16" if device == "cuda" else "float32"
    dtype = usual if flags.dtype == "auto" else flags.dtype
    return Target(resolve_checkpoint(flags.model_id, console, known), device, dtype)


def as_built(flags: SharedFlags, built: Manifest | None) -> SharedFlags:
    """Return the flags with an artifact's device and dtype where the user left them open."""
    found, dtype = {}, built.model.get("dtype") if built else None
    # where there is no GPU, an artifact for one is refused with all that differs
    if flags.device == "auto" and built and built.recipe.get("device") == "cpu":
        found["device"] = "cpu"
    if flags.dtype == "auto" and dtype in DTYPES:
        found["dtype"] = dtype
    return flags.changed(**found)


def choose_device(wanted: str) -> str:
    """Return cpu or cuda for `--device`; auto takes a GPU when there is one."""
    if wanted == "cpu":
        return "cpu"
    torch = sys.modules.get("torch")  # which may be one for CPUs, on a machine with a GPU
    if cuda.count() and (torch is None or torch.cuda.is_available()):
        machine.use_gpu()
        return "cuda"
    if wanted == "auto":
        return "cpu"
    which = f"torch {torch.__version__} is a CUDA build" if torch else "CUDA_VISIBLE_DEVICES"
    raise EnvironmentProblemError(
        f"--device cuda: no CUDA GPU is to be seen on this machine; check nvidia-smi and {which}, "
        "or use --device cpu"
    )
