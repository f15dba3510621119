"""From the package on disk into this process: torch alone, no compiler and no transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aotinductor import package_loader
from aotinductor.flags import APPROACH
from aotinductor.recipe import Plan, find_differences
from common.artifacts import ArtifactPair, open_verified
from common.console import Console
from common.errors import (
    ArtifactDamagedError,
    ArtifactMismatchError,
    EnvironmentProblemError,
)
from common.manifest import Manifest, describe, differences, raise_if_different
from common.results import gpu_environment
from common.targets import Target
from common.trust import TrustFlags

if TYPE_CHECKING:
    import torch

    from aotinductor.base_generation import Prompt, Step
    from aotinductor.kv_generation import Generator
    from common.measures import Request
    from common.stopwatch import Stages

    Serve = Callable[[Prompt], tuple[Request, list[int]]]


@dataclass(frozen=True)
class Loaded:
    """A package ready to be called."""

    manifest: Manifest
    verify_seconds: float
    engine: "Step | Generator"
    weights_of: str

    def as_json(self) -> dict:
        return {
            "sha256": self.manifest.file["sha256"],
            "bytes": self.manifest.file["bytes"],
            "verify_seconds": self.verify_seconds,
            "kv_cache": self.manifest.recipe["kv_cache"],
            "weights_of": self.weights_of,
        }


def load_package(
    pair: ArtifactPair, target: Target, plan: Plan, trust: TrustFlags, cuda_graph: bool,
    stages: "Stages", console: Console,
) -> Loaded:  # fmt: skip
    """Check the package against this run, then load it; any doubt is an error of its own kind."""
    with open_verified(pair, APPROACH, trust, console) as verified:
        manifest = verified.manifest
        raise_if_different(pair.path, find_differences(manifest, target))
        for difference in differences(manifest.environment, gpu_environment(), ("driver",)):
            console.warn(f"{describe([difference])}: usually harmless")
        if manifest.recipe != plan.built:
            raise ArtifactMismatchError(f"{pair.path} was replaced since this start: try again")
        stages.close("verification")
        try:
            # unpacked and opened here: afterwards the file is not needed any more
            package_loader.check_layout(verified.file, manifest.details["graphs"])
            engine = _open(verified.path_for_loader, manifest, target, cuda_graph, stages)
        except (RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise _describe_failure(pair, error) from error
    model = target.checkpoint if not manifest.recipe["embed_weights"] else None
    weights_of = model.model_id if model else f"{manifest.model['id']} (in the package)"
    console.say(f"on the weights of {weights_of}")
    return Loaded(manifest, verified.verify_seconds, engine, weights_of)


def _open(
    path: str, manifest: Manifest, target: Target, cuda_graph: bool, stages: "Stages"
) -> "Step | Generator":
    """Return what the package at `path` holds, on its weights."""
    if manifest.recipe["kv_cache"]:
        from aotinductor.kv_loading import open_generator

        return open_generator(path, manifest, target, cuda_graph, stages)
    model = package_loader.open_model(path, "model", package_loader.device_index(target.device))
    stages.close("package")
    if not manifest.recipe["embed_weights"]:
        from aotinductor.binding import load_constants

        package_loader.bind_constants(model, load_constants(manifest, target))
        stages.close("weights")
    return base_step(model)


def server_of(engine: "Step | Generator", device: "torch.device") -> "Serve":
    """Return the function that serves a request from a base step or from a generator."""
    from aotinductor import base_generation, kv_generation

    if isinstance(engine, kv_generation.Generator):
        return lambda prompt: kv_generation.serve(engine, prompt)
    return lambda prompt: base_generation.serve(engine, prompt, device)


def base_step(model: package_loader.Model) -> "Step":
    """Return a base package's model as a function: ids and mask -> logits."""
    return lambda input_ids, attention_mask: model.run([input_ids, attention_mask])[0]


def _describe_failure(pair: ArtifactPair, error: Exception) -> Exception:
    text = next((line for line in str(error).splitlines() if line.strip()), "no message")
    if "out of memory" in text:
        return EnvironmentProblemError(f"out of device memory while loading {pair.path}: {text}")
    if isinstance(error, KeyError | TypeError):
        text = f"its metadata does not describe it: {text}"
    return ArtifactDamagedError(f"{pair.path} cannot be loaded ({text}): build it with ./build.sh")
