"""What an artifact was built for, and whether this run is that."""

from typing import Any

from common.artifact.manifest import Difference, Manifest, differences, model_differences
from common.machine import environment
from common.model.target import Target
from portable_cache.flags import APPROACH, CompileFlags

# a cache built under another value of one of these is never hit
_ENVIRONMENT_FIELDS = ("torch", "triton", "transformers", "cuda", "gpu", "compute_capability")


def recipe(flags: CompileFlags, device: str) -> dict[str, Any]:
    """Return every setting that shapes the compiled graphs."""
    return vars(flags) | {"batch_size": 1, "device": device}


def settle(told: CompileFlags, manifest: Manifest | None) -> CompileFlags:
    """Return `told` with what is None in it taken from an artifact, else from the defaults."""
    built = manifest.recipe if manifest and manifest.approach == APPROACH else {}
    values = vars(CompileFlags()) | {name: built[name] for name in vars(told) if name in built}
    values |= {name: value for name, value in vars(told).items() if value is not None}
    return CompileFlags(**values)


def find_differences(manifest: Manifest, target: Target, flags: CompileFlags) -> list[Difference]:
    """Return every field in which an artifact differs from this run, as far as that is told."""
    found = recipe(flags, target.device)
    told = {name: value for name, value in found.items() if value is not None}
    words = model_differences(manifest, target.checkpoint.architecture)
    # the digest of words that differ tells nobody more
    fields = ("dtype",) if words else ("config_digest", "dtype")
    return (
        differences(manifest.environment, environment(), _ENVIRONMENT_FIELDS)
        + differences(manifest.model, target.describe_model(), fields)
        + words
        + differences(manifest.recipe, told, told)
    )
