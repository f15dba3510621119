"""What a package was built for, and whether this run is that."""

import hashlib
from pathlib import Path
from typing import Any

from aotinductor.flags import BuildSettings
from aotinductor.lengths import make_bounds
from aotinductor.package import instruction_set
from common.artifact.manifest import Difference, Manifest, differences
from common.measure.report import gpu_environment, package_version
from common.model.target import Target
from common.model.weights import list_checkpoint, target_dtype

_SAMPLE_BYTES = 4096  # of each tensor: a fine-tune that changes a tensor changes its beginning


def make_recipe(settings: BuildSettings, target: Target) -> dict[str, Any]:
    """Return every setting that shapes the package."""
    stored = list_checkpoint(target.checkpoint.folder).values()
    return {
        **_machine(target),
        **make_bounds(settings.shape).as_json(),
        "weights_fingerprint": weights_fingerprint(target.checkpoint.folder),
        **vars(settings.graph),
        "max_cache_len": settings.slots,
        "embed_weights": settings.weights_embedded,
        # the checkpoint's own dtype is another than the one asked for
        "cast_weights": any(target_dtype(one, target.dtype) != one.dtype for one in stored),
    }


def find_differences(manifest: Manifest, target: Target) -> list[Difference]:
    """Return every field in which this run is not what the package was built for."""
    recipe = _machine(target)
    # a package of code only is bound to whatever weights of its architecture are there
    if manifest.recipe.get("embed_weights"):
        built = manifest.recipe.get("weights_fingerprint")
        # a folder may hold configuration and tokenizer only
        recipe["weights_fingerprint"] = weights_fingerprint(target.checkpoint.folder) or built
    # its code calls into torch's libraries, and its kernels are machine code for one architecture
    environment = gpu_environment() | {"torch": package_version("torch")}
    return (
        differences(manifest.environment, environment, ("torch", "cuda", "compute_capability"))
        + differences(manifest.model, target.describe_model(), ("config_digest", "dtype"))
        + differences(manifest.recipe, recipe, recipe)
    )


def weights_fingerprint(folder: Path) -> str | None:
    """Return a digest of every tensor's name, shape, dtype and first bytes; None without weights.

    Fine-tunes of one model share its configuration: without this, `--model-id OTHER` would answer
    with the weights in the package. It is the same however the tensors are cut into files.
    """
    try:
        tensors = list_checkpoint(folder)
    except FileNotFoundError:
        return None
    digest = hashlib.sha256()
    for name, stored in sorted(tensors.items()):
        with open(stored.path, "rb") as file:
            file.seek(stored.begin)
            sample = file.read(min(_SAMPLE_BYTES, stored.nbytes))
        digest.update(f"{name} {stored.dtype} {stored.shape}".encode() + sample)
    return digest.hexdigest()


def _machine(target: Target) -> dict[str, str]:
    return {"device": target.device.type, "cpu_capability": instruction_set(target.device)}
