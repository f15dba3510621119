"""What an artifact was built for, and whether this run is that."""

from dataclasses import asdict, fields, replace
from typing import Any

import torch

from common.manifest import Difference, Manifest, differences
from common.report import environment
from common.target import Target
from portable_cache.flags import CACHE_IMPLEMENTATIONS, COMPILE_MODES, DYNAMIC, CompileFlags

# a cache built under another value of one of these is never hit
_ENVIRONMENT_FIELDS = ("torch", "triton", "transformers", "cuda", "gpu", "compute_capability")
_MODEL_FIELDS = ("config_digest", "dtype")


def recipe(flags: CompileFlags, device: torch.device) -> dict[str, Any]:
    """Return every setting that shapes the compiled graphs."""
    return asdict(flags) | {"batch_size": 1, "device": device.type}


def settle(told: CompileFlags, manifest: Manifest | None) -> CompileFlags:
    """Return `told` with what is None in it taken from an artifact, else from the defaults."""
    built = (_flags_of(manifest.recipe) if manifest else None) or CompileFlags()
    values = {name: value for name, value in vars(told).items() if value is not None}
    return replace(built, **values)


def shortest_that_holds(flags: CompileFlags, tokens: int) -> int | None:
    """Return the slots of the shortest warmed KV cache for so many tokens, if one is that long."""
    return min((slots for slots in flags.cache_lengths() if slots >= tokens), default=None)


def find_differences(manifest: Manifest, target: Target, flags: CompileFlags) -> list[Difference]:
    """Return every field in which this run is not what the artifact was built for."""
    found = recipe(flags, target.device)
    return (
        differences(manifest.environment, environment(), _ENVIRONMENT_FIELDS)
        + differences(manifest.model, target.describe_model(), _MODEL_FIELDS)
        + differences(manifest.recipe, found, found)
    )


def _flags_of(values: dict[str, Any]) -> CompileFlags | None:
    """Return the flags in a recipe, or None if no build of ours could have written it."""
    lengths = values.get("prefill_lengths")
    if not isinstance(lengths, list) or not lengths:
        return None
    numbers = (*lengths, values.get("decode_length"), values.get("max_cache_len"))
    sound = (
        all(type(number) is int for number in numbers)
        and min(numbers[:-1]) > 0
        and (numbers[-1] == 0 or numbers[-1] > 1)
        and values.get("cache_implementation") in CACHE_IMPLEMENTATIONS
        and values.get("compile_dynamic") in tuple(DYNAMIC)
        and values.get("compile_mode") in COMPILE_MODES
        and isinstance(values.get("fullgraph"), bool)
    )
    if not sound:
        return None
    names = [field.name for field in fields(CompileFlags)]
    return CompileFlags(
        **{name: values[name] for name in names} | {"prefill_lengths": tuple(lengths)}
    )
