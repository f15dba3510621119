"""From the package on disk to an engine that generates: torch alone, no compiler.

The weights travel while the package is opened, its graphs are warmed up, and decode is captured:
all of it over tensors that have their places, and zeros in them, until the bytes arrive.
"""

import threading
from pathlib import Path
from typing import NamedTuple

import torch

from aotinductor import package
from aotinductor.base import BaseGenerator
from aotinductor.flags import APPROACH
from aotinductor.kv_generation import CacheShape, Generator, rope_table
from aotinductor.lengths import Plan
from aotinductor.recipe import find_differences
from common.artifacts import ArtifactPair, TrustFlags, open_verified
from common.cli import Console
from common.errors import ArtifactDamagedError, ArtifactMismatchError, EnvironmentProblemError
from common.manifest import Manifest, describe, differences, raise_if_different
from common.measures import Stages
from common.report import gpu_environment
from common.target import Target, synchronize
from common.weights import Upload, list_checkpoint, start_upload

Engine = BaseGenerator | Generator


class Loaded(NamedTuple):
    """What generates, and what a result tells of the package that it came from."""

    engine: Engine
    artifact: dict


def load_package(
    pair: ArtifactPair, target: Target, plan: Plan, trust: TrustFlags, cuda_graph: bool,
    warm_up_tokens: int, stages: Stages, console: Console,
) -> Loaded:  # fmt: skip
    """Check the package against this run, then load it; any doubt is an error of its own kind.

    On a GPU each graph is warmed up, prefill at the padded length `warm_up_tokens`.
    """
    with open_verified(pair, APPROACH, trust, console) as verified:
        manifest = verified.manifest
        raise_if_different(pair.path, find_differences(manifest, target))
        for difference in differences(manifest.environment, gpu_environment(), ("driver",)):
            console.warn(f"{describe([difference])}: usually harmless")
        if manifest.recipe != plan.built:
            raise ArtifactMismatchError(f"{pair.path} was replaced since this start: try again")
        try:
            package.check_layout(verified.file, manifest.details["graphs"])
            # the file is open in here and in the mappings made here: no name of it is needed later
            path = Path(verified.path_for_loader)
            engine = _load(path, manifest, target, cuda_graph, warm_up_tokens, stages)
        except (RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:
            text = next((line for line in str(error).splitlines() if line.strip()), "no message")
            if "out of memory" in text:
                text = f"out of device memory while loading {pair.path}: {text}"
                raise EnvironmentProblemError(text) from error
            if isinstance(error, KeyError | TypeError):
                text = f"its metadata does not describe it: {text}"
            raise ArtifactDamagedError(
                f"{pair.path} cannot be loaded ({text}): build it with ./build.sh"
            ) from error
    recipe, file = manifest.recipe, manifest.file
    built_from = f"{manifest.model['id']} (in the package)"
    artifact = {
        "name": pair.path.name,
        "sha256": file["sha256"],
        "bytes": file["bytes"],
        "verify_seconds": verified.verify_seconds,
        "kv_cache": recipe["kv_cache"],
        "weights_of": built_from if recipe["embed_weights"] else target.checkpoint.model_id,
    }
    return Loaded(engine, artifact)


def _load(
    path: Path, manifest: Manifest, target: Target, cuda_graph: bool, warm_up_tokens: int,
    stages: Stages,
) -> Engine:  # fmt: skip
    details, device = manifest.details, target.device
    if manifest.recipe["kv_cache"] != ("cache" in details):
        raise ValueError("its metadata's recipe and details are of different graphs")
    constants = [package.Constant(**row) for row in details["constants"]]
    upload = _start_upload(path, constants, manifest, target)

    def time_upload() -> None:  # most of it goes on behind other stages
        with stages.stage("weights", hidden=True):
            for thread in upload.threads:
                thread.join()

    clock = threading.Thread(target=time_upload)
    clock.start()
    tensors = upload.tensors | package.make_values(constants, device)
    models = [package.open_model(path, name, device, tensors) for name in details["graphs"]]
    stages.close("artifact")
    engine = make_engine(models, details, target.dtype, device)
    if device.type == "cuda":
        _warm_up(engine, warm_up_tokens, cuda_graph)
        synchronize(device)
        stages.close("capture")
    upload.wait()
    clock.join()
    stages.close("weights")
    return engine


def _start_upload(
    path: Path, constants: list[package.Constant], manifest: Manifest, target: Target
) -> Upload:
    if manifest.recipe["embed_weights"]:
        return start_upload(package.find_in_package(constants, path), target.device)
    folder = target.checkpoint.folder
    # only a build that converted the weights asks for a conversion again
    dtype = target.dtype if manifest.recipe["cast_weights"] else None
    try:
        stored = package.find_in_checkpoint(constants, list_checkpoint(folder), dtype)
    except (ValueError, FileNotFoundError) as error:
        raise ArtifactMismatchError(f"{folder}: {error}") from error
    return start_upload(stored, target.device, dtype)


def make_engine(
    models: list[package.Model], details: dict, dtype: torch.dtype, device: torch.device
) -> Engine:
    """Return what generates with the models of a package whose metadata has these details."""
    if "cache" not in details:
        (model,) = models
        return BaseGenerator(lambda ids, mask: model.run([ids, mask])[0], device)
    cache = CacheShape(**details["cache"])
    table = rope_table(**details["rope"], slots=cache.slots, dtype=dtype, device=device)
    prefill, decode = models
    return Generator(prefill, decode, cache, table)


@torch.no_grad()
def _warm_up(engine: Engine, tokens: int, cuda_graph: bool) -> None:
    """Run what a request will, so that kernels and libraries are there; leave no trace of it."""
    if isinstance(engine, BaseGenerator):
        ids = torch.zeros(1, tokens, dtype=torch.int64, device=engine.device)
        engine.step(ids, torch.ones_like(ids))
        return
    engine.prefill([0] * tokens, tokens)
    if cuda_graph:
        engine.capture()
    engine.reset()
