"""From the package on disk into this process: torch alone, no compiler and no transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.artifacts import ArtifactPair, open_verified
from common.console import Console
from common.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    EnvironmentProblemError,
)
from common.manifest import Manifest, describe
from common.trust import TrustFlags

from aotinductor.bounds import Bounds, parse_bounds
from aotinductor.flags import APPROACH
from aotinductor.recipe import Target, find_differences

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Loaded:
    """A package ready to be called."""

    manifest: Manifest
    verify_seconds: float
    step: "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"

    def as_json(self) -> dict:
        return {
            "sha256": self.manifest.file["sha256"],
            "bytes": self.manifest.file["bytes"],
            "verify_seconds": self.verify_seconds,
        }


def load_package(
    pair: ArtifactPair, target: Target, bounds: Bounds, trust: TrustFlags, console: Console
) -> Loaded:
    """Check the package against this run, then load it; any doubt is an error of its own kind."""
    with open_verified(pair, APPROACH, trust, console) as verified:
        manifest = verified.manifest
        if found := find_differences(manifest, target):
            raise ArtifactMismatchError(
                f"{pair.path} was built for something else: {describe(found)}; "
                "rebuild it with ./build.sh and the same flags, or run with the build's"
            )
        if parse_bounds(manifest.recipe) != bounds:
            raise ArtifactMismatchError(f"{pair.path} was replaced since this start: try again")
        try:
            # unpacked and opened here: afterwards the file is not needed any more
            step = open_model(verified.path_for_loader, target.device)
        except RuntimeError as error:
            raise _describe_failure(pair, error) from error
    return Loaded(manifest, verified.verify_seconds, step)


def open_model(
    path: str, device: "torch.device"
) -> "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]":
    """Return the function of the package at `path`: ids and mask -> logits."""
    import torch

    # Private: what `torch._inductor.aoti_load_package` calls, without the import of the compiler.
    # The same five arguments on 2.9 to 2.13: path, model, single threaded, runners, device index.
    index = -1 if device.type == "cpu" else device.index or 0
    loader = torch._C._aoti.AOTIModelPackageLoader(path, "model", True, 1, index)

    def run(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return loader.run([input_ids, attention_mask])[0]

    return run


def _describe_failure(pair: ArtifactPair, error: RuntimeError) -> Exception:
    text = next((line for line in str(error).splitlines() if line.strip()), "no message")
    if "out of memory" in text:
        return EnvironmentProblemError(f"out of device memory while loading {pair.path}: {text}")
    return ArtifactDamagedError(f"{pair.path} cannot be loaded ({text}): build it with ./build.sh")
