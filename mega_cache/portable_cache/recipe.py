"""What an artifact was built for, and whether this run is that."""

from typing import TYPE_CHECKING, Any

from common.manifest import Difference, Manifest, differences
from portable_cache.flags import CompileFlags

if TYPE_CHECKING:
    import torch

# a cache built under another value of one of these is never hit
_ENVIRONMENT_FIELDS = ("torch", "triton", "transformers", "cuda", "gpu", "compute_capability")
_MODEL_FIELDS = ("config_digest", "dtype")


def recipe(flags: CompileFlags, lengths: tuple[int, ...], device: "torch.device") -> dict[str, Any]:
    """Return every setting that shapes the compiled graphs."""
    return {
        "max_cache_len": flags.max_cache_len,
        "prefill_lengths": list(lengths),
        "decode_length": flags.decode_length,
        "cache_implementation": flags.cache_implementation,
        "compile_dynamic": flags.compile_dynamic,
        "compile_mode": flags.compile_mode,
        "fullgraph": flags.fullgraph,
        "batch_size": 1,
        "device": device.type,
    }


def find_differences(
    manifest: Manifest,
    environment: dict[str, Any],
    model: dict[str, Any],
    found_recipe: dict[str, Any],
    padded_length: int,
) -> list[Difference]:
    """Return every field in which this run is not what the artifact was built for."""
    recipe_fields = [name for name in found_recipe if name != "prefill_lengths"]
    if manifest.recipe.get("max_cache_len"):
        # one cache serves every length: how it was warmed up does not matter
        recipe_fields.remove("decode_length")
    found = (
        differences(manifest.environment, environment, _ENVIRONMENT_FIELDS)
        + differences(manifest.model, model, _MODEL_FIELDS)
        + differences(manifest.recipe, found_recipe, recipe_fields)
    )
    lengths = manifest.recipe.get("prefill_lengths")
    warmed = isinstance(lengths, list) and padded_length in lengths
    if not manifest.recipe.get("max_cache_len") and not warmed:
        found.append(Difference("prefill_lengths", lengths, padded_length))
    return found
