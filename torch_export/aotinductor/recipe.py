"""What a package was built for, and whether this run is that."""

import ctypes
import hashlib
from typing import Any

from aotinductor.flags import BuildSettings
from aotinductor.lengths import make_bounds
from common import machine
from common.artifact.manifest import Difference, Manifest, differences, model_differences
from common.model.checkpoint import Checkpoint
from common.model.stored import Stored
from common.model.target import Target
from common.model.weights import map_tensor


def make_recipe(settings: BuildSettings, target: Target) -> dict[str, Any]:
    """Return every setting that shapes the package."""
    embed, bounds = settings.weights_embedded, make_bounds(settings.shape)
    return {
        **machine_of(target.device),
        **bounds._asdict(),
        "buckets": bounds.buckets,
        # of weights that are in the package: one of code only is for any of its architecture
        "weights_fingerprint": weights_fingerprint(target.checkpoint) if embed else None,
        "layer_digest": target.checkpoint.layer_digest,
        **vars(settings.graph),
        "max_cache_len": settings.slots,
        "embed_weights": embed,
    }


def find_differences(manifest: Manifest, target: Target, library: str) -> list[Difference]:
    """Return every field in which this start is not what the package was built for.

    `library`: what stands behind its calls. Over libtorch that must be the torch that built it.
    """
    built, here = manifest.recipe, machine_of(target.device)
    if missing := sorted(set(built.get("cpu_features") or ()) - machine.cpu_features()):
        here["cpu_features"] = f"a processor without {', '.join(missing)}"
    else:
        here["cpu_features"] = built.get("cpu_features")
        if target.device == "cpu":  # all that its word stands for is there
            here["cpu_capability"] = built.get("cpu_capability")
    # a package of code only is bound to whatever weights of its architecture are there
    if built.get("embed_weights"):
        # a folder may hold configuration and tokenizer only; and all of a checkpoint is read again
        # only if its files are not the very ones that the build read
        files = files_identity(target.checkpoint)
        if files is None or files == manifest.details.get("weights_files"):
            here["weights_fingerprint"] = built.get("weights_fingerprint")
        else:
            here["weights_fingerprint"] = weights_fingerprint(target.checkpoint)
    architecture, model_fields = dict(target.checkpoint.architecture), ["dtype"]
    if built.get("kv_cache"):  # one layer, compiled once, serves any depth
        del architecture["layers"]
    words = model_differences(manifest, architecture)
    if not words:  # else a digest of them tells nobody more
        if built.get("kv_cache"):
            here["layer_digest"] = target.checkpoint.layer_digest
        else:
            model_fields.append("config_digest")
    environment, fields = machine.gpu_environment(), ["compute_capability"]
    if library == "libtorch":  # its code calls into torch's libraries
        environment["torch"] = machine.package_version("torch")
        fields = ["torch", "cuda", *fields]
    elif environment["cuda"]:  # the runtime library keeps its interface within a major version
        major = str(manifest.environment.get("cuda")).partition(".")[0]
        if environment["cuda"].partition(".")[0] != major:
            fields = ["cuda", *fields]
    return (
        differences(manifest.environment, environment, fields)
        + differences(manifest.model, target.describe_model(), model_fields)
        + words
        + differences(built, here, here)
    )


def weights_fingerprint(checkpoint: Checkpoint) -> str | None:
    """Return a digest of all that the model reads: names, shapes, bytes; None without weights.

    Fine-tunes of one model share its configuration: without this, `--model-id OTHER` would answer
    with the weights in the package. It is the same however the tensors are cut into files.
    """
    # imported here: a start of a package that is code alone does not pay for it
    from concurrent.futures import ThreadPoolExecutor

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


def _content_digest(tensor: Stored) -> str:
    mapped = map_tensor(tensor)
    content = (ctypes.c_char * mapped.nbytes).from_address(mapped.address)
    return hashlib.sha256(content).hexdigest()


def machine_of(device: str) -> dict[str, Any]:
    """Return what a package needs of a processor: the recipe holds it.

    A CUDA package's C++ is compiled for the common level; a CPU package's runs where its
    processor's features are.
    """
    capability, features = machine.cpu_capability(), sorted(machine.cpu_features())
    if machine.host_code_is_portable(device):
        capability, features = machine.COMMON_LEVEL, None
    return {"device": device, "cpu_capability": capability, "cpu_features": features}
