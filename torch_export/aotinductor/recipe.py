"""What a package was built for, and whether this run is that."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aotinductor.flags import BuildSettings
from aotinductor.lengths import make_bounds
from aotinductor.package import instruction_set
from common.artifact.manifest import Difference, Manifest, differences
from common.measure.report import gpu_environment, package_version
from common.model.checkpoint import Checkpoint
from common.model.stored import StoredTensor
from common.model.target import Target

_CHUNK_BYTES = 1 << 20


def make_recipe(settings: BuildSettings, target: Target) -> dict[str, Any]:
    """Return every setting that shapes the package."""
    embed = settings.weights_embedded
    return {
        **_machine(target),
        **make_bounds(settings.shape).as_json(),
        # of weights that are in the package: one of code only is for any of its architecture
        "weights_fingerprint": weights_fingerprint(target.checkpoint) if embed else None,
        **vars(settings.graph),
        "max_cache_len": settings.slots,
        "embed_weights": embed,
    }


def find_differences(manifest: Manifest, target: Target) -> list[Difference]:
    """Return every field in which this run is not what the package was built for."""
    recipe = _machine(target)
    # a package of code only is bound to whatever weights of its architecture are there
    if manifest.recipe.get("embed_weights"):
        built = manifest.recipe.get("weights_fingerprint")
        here = files_identity(target.checkpoint)
        # a folder may hold configuration and tokenizer only; and all of a checkpoint is read again
        # only if its files are not the very ones that the build read
        if here is None or here == manifest.details.get("weights_files"):
            recipe["weights_fingerprint"] = built
        else:
            recipe["weights_fingerprint"] = weights_fingerprint(target.checkpoint)
    # its code calls into torch's libraries, and its kernels are machine code for one architecture
    environment = gpu_environment() | {"torch": package_version("torch")}
    return (
        differences(manifest.environment, environment, ("torch", "cuda", "compute_capability"))
        + differences(manifest.model, target.describe_model(), ("config_digest", "dtype"))
        + differences(manifest.recipe, recipe, recipe)
    )


def weights_fingerprint(checkpoint: Checkpoint) -> str | None:
    """Return a digest of all that the model reads: names, shapes, bytes; None without weights.

    Fine-tunes of one model share its configuration: without this, `--model-id OTHER` would answer
    with the weights in the package. It is the same however the tensors are cut into files.
    """
    stored = checkpoint.stored
    names = sorted(checkpoint.parameters.keys() & stored.keys())
    with ThreadPoolExecutor() as pool:  # reading and hashing both let go of the GIL
        digests = pool.map(_content_digest, [stored[name] for name in names])
        lines = [
            f"{name} {stored[name].dtype} {stored[name].shape} {digest}"
            for name, digest in zip(names, digests, strict=True)
        ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if stored else None


def files_identity(checkpoint: Checkpoint) -> str | None:
    """Return a digest that changes when another file takes the place of one of the weights'.

    Of places, sizes, inodes and times of change: no byte is read. None without weights.
    """
    stats = [(path, path.stat()) for path in sorted({t.path for t in checkpoint.stored.values()})]
    lines = [f"{path} {one.st_size} {one.st_ino} {one.st_mtime_ns}" for path, one in stats]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest() if lines else None


def _content_digest(tensor: StoredTensor) -> str:
    digest, left = hashlib.sha256(), tensor.nbytes
    with open(tensor.path, "rb", buffering=0) as file:
        file.seek(tensor.begin)
        while left and (piece := file.read(min(_CHUNK_BYTES, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def _machine(target: Target) -> dict[str, str]:
    return {"device": target.device.type, "cpu_capability": instruction_set(target.device)}
