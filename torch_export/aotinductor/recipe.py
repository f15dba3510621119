"""What a package was built for, and whether this run is that."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from aotinductor.flags import BuildSettings
from aotinductor.lengths import Bounds
from aotinductor.package import instruction_set
from common.manifest import Difference, Manifest, differences
from common.report import package_version
from common.target import Target
from common.weights import list_checkpoint

# its code calls into torch's libraries, and its kernels are machine code for one architecture
_ENVIRONMENT_FIELDS = ("torch", "cuda", "compute_capability")
_MODEL_FIELDS = ("config_digest", "dtype")
_RECIPE_FIELDS = ("weights_fingerprint", "batch_size", "device", "cpu_capability")
_SAMPLE_BYTES = 4096  # of each tensor: a fine-tune that changes a tensor changes its beginning


def make_recipe(settings: BuildSettings, target: Target, bounds: Bounds) -> dict[str, Any]:
    """Return every setting that shapes the package."""
    return {
        **_fixed_recipe(target),
        **bounds.as_json(),
        "example_seq_len": settings.shape.example_seq_len,
        "kv_cache": settings.graph.kv_cache,
        "max_cache_len": settings.graph.slots(settings.shape),
        "max_autotune": settings.compilation.max_autotune,
        "embed_weights": settings.graph.weights_embedded,
        "cast_weights": _converts_weights(target),
    }


def find_differences(manifest: Manifest, target: Target) -> list[Difference]:
    """Return every field in which this run is not what the package was built for."""
    found_recipe = _fixed_recipe(target)
    fields = list(_RECIPE_FIELDS)
    # a package of code only is bound to whatever weights of its architecture are there; and a
    # folder may hold the configuration only
    if not manifest.recipe.get("embed_weights") or found_recipe["weights_fingerprint"] is None:
        fields.remove("weights_fingerprint")
    return (
        differences(manifest.environment, _environment(), _ENVIRONMENT_FIELDS)
        + differences(manifest.model, target.describe_model(), _MODEL_FIELDS)
        + differences(manifest.recipe, found_recipe, fields)
    )


def weights_fingerprint(folder: Path) -> str | None:
    """Return a digest of every tensor's name, shape, dtype and first bytes; None without weights.

    A package carries the weights it was built from, and fine-tunes of one model share its
    configuration: without this, `--model-id OTHER` would answer with the wrong model's weights. It
    takes milliseconds, and is the same however the tensors are cut into files.
    """
    try:
        tensors = list_checkpoint(folder)
    except FileNotFoundError:  # configuration and tokenizer only
        return None
    digests = {}
    for name, stored in tensors.items():
        with open(stored.path, "rb") as file:
            file.seek(stored.begin)
            sample = file.read(min(_SAMPLE_BYTES, stored.nbytes))
        digests[name] = hashlib.sha256(f"{stored.dtype} {stored.shape}".encode() + sample)
    text = json.dumps({name: digests[name].hexdigest() for name in sorted(digests)})
    return hashlib.sha256(text.encode()).hexdigest()


def _converts_weights(target: Target) -> bool:
    """Return whether the checkpoint's own dtype is another than the one asked for."""
    stored = list_checkpoint(target.checkpoint.folder).values()
    return any(one.dtype != target.dtype for one in stored if one.dtype.is_floating_point)


def _fixed_recipe(target: Target) -> dict[str, Any]:
    """Return the settings that a run has no flag for."""
    return {
        "weights_fingerprint": weights_fingerprint(target.checkpoint.folder),
        "batch_size": 1,
        "device": target.device.type,
        "cpu_capability": instruction_set(target.device),
    }


def _environment() -> dict[str, Any]:
    """Return what must be equal, without the driver and the commit, which cost a process each."""
    # as common.report.environment() says it: of the machine's GPU, whatever --device is
    seen = torch.cuda.is_available()
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if seen else None
    return {
        "torch": package_version("torch"),
        "cuda": torch.version.cuda if seen else None,
        "compute_capability": capability,
    }
