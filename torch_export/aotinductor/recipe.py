"""What a package was built for, and whether this run is that."""

import hashlib
import platform
from typing import Any

from aotinductor.flags import BuildSettings
from aotinductor.lengths import make_bounds
from common import machine
from common.artifact.manifest import Difference, Manifest, differences
from common.model.checkpoint import Checkpoint
from common.model.target import Target

COMMON_LEVEL = "x86-64-v3"  # AVX2 and FMA: Intel since 2013, AMD since 2015
_SAMPLE_BYTES = 4096  # of each tensor: a fine-tune that changes a tensor changes its beginning


def make_recipe(settings: BuildSettings, target: Target) -> dict[str, Any]:
    """Return every setting that shapes the package."""
    return {
        **machine_of(target.device),
        **make_bounds(settings.shape).as_json(),
        "weights_fingerprint": weights_fingerprint(target.checkpoint),
        "layer_digest": target.checkpoint.layer_digest,
        **vars(settings.graph),
        "max_cache_len": settings.slots,
        "embed_weights": settings.weights_embedded,
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
        # a folder may hold configuration and tokenizer only
        found = weights_fingerprint(target.checkpoint)
        here["weights_fingerprint"] = found or built.get("weights_fingerprint")
    model = target.describe_model()
    if built.get("kv_cache"):  # one layer, compiled once, serves any depth
        here["layer_digest"] = target.checkpoint.layer_digest
        model["config_digest"] = manifest.model.get("config_digest")
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
        + differences(manifest.model, model, ("config_digest", "dtype"))
        + differences(built, here, here)
    )


def weights_fingerprint(checkpoint: Checkpoint) -> str | None:
    """Return a digest of every tensor's name, shape, dtype and first bytes; None without weights.

    Fine-tunes of one model share its configuration: without this, `--model-id OTHER` would answer
    with the weights in the package. It is the same however the tensors are cut into files.
    """
    if not checkpoint.stored:
        return None
    digest = hashlib.sha256()
    for name, stored in sorted(checkpoint.stored.items()):
        with open(stored.path, "rb") as file:
            file.seek(stored.begin)
            sample = file.read(min(_SAMPLE_BYTES, stored.nbytes))
        digest.update(f"{name} {stored.dtype} {stored.shape}".encode() + sample)
    return digest.hexdigest()


def machine_of(device: str) -> dict[str, Any]:
    """Return what a package needs of a processor: the recipe holds it.

    A CUDA package's C++ only launches kernels, so it is compiled for the common level: compiled for
    exactly this processor, it would die of SIGILL on another one. A CPU package computes in it, and
    runs where its processor's features are.
    """
    capability = machine.cpu_capability()
    if device == "cuda" and platform.machine() == "x86_64" and capability != "DEFAULT":
        return {"device": device, "cpu_capability": COMMON_LEVEL, "cpu_features": None}
    features = sorted(machine.cpu_features())
    return {"device": device, "cpu_capability": capability, "cpu_features": features}
