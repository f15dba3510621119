"""From the package on disk to an engine that generates: torch alone, no compiler.

The weights travel while the package is opened, its graphs are warmed up, and decode is captured:
all of it over tensors that have their places, and zeros in them, until the bytes arrive.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from aotinductor import package
from aotinductor.base import BaseGenerator
from aotinductor.flags import APPROACH, RunSettings
from aotinductor.kv_generation import CacheShape, Generator, rope_table
from aotinductor.lengths import Plan
from aotinductor.recipe import find_differences
from common import errors
from common.artifact.disk import open_verified
from common.artifact.manifest import Manifest, describe, differences, raise_if_different
from common.cli import Console
from common.measure import report
from common.measure.measures import Stages
from common.model import weights
from common.model.target import Target, synchronize

Engine = BaseGenerator | Generator


def load_package(
    settings: RunSettings, target: Target, plan: Plan, cuda_graph: bool, warm_up_tokens: int,
    stages: Stages, console: Console,
) -> tuple[Engine, dict]:  # fmt: skip
    """Check the package against this run, then load it; any doubt is an error of its own kind.

    Returns what generates, and what a result tells of the package. On a GPU each graph is warmed
    up, prefill at the padded length `warm_up_tokens`.
    """
    pair = settings.files.pair()
    with open_verified(pair, APPROACH, settings.trust, console) as verified:
        manifest = verified.manifest
        raise_if_different(pair.path, find_differences(manifest, target))
        for difference in differences(manifest.environment, report.gpu_environment(), ("driver",)):
            console.warn(f"{describe([difference])}: usually harmless")
        if manifest.recipe != plan.built:
            problem = f"{pair.path} was replaced since this start: try again"
            raise errors.ArtifactMismatchError(problem)
        try:
            package.check_layout(verified.file, manifest.details["graphs"])
            # the file is open in here and in the mappings made here: no name of it is needed later
            path = Path(verified.path_for_loader)
            engine = _load(path, manifest, target, cuda_graph, warm_up_tokens, stages)
        except (RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:
            text = next((line for line in str(error).splitlines() if line.strip()), "no message")
            if "out of memory" in text:
                text = f"out of device memory while loading {pair.path}: {text}"
                raise errors.EnvironmentProblemError(text) from error
            if isinstance(error, KeyError | TypeError):
                text = f"its metadata does not describe it: {text}"
            raise errors.ArtifactDamagedError(
                f"{pair.path} cannot be loaded ({text}): build it with ./build.sh"
            ) from error
    recipe, file = manifest.recipe, manifest.file
    built_from = f"{manifest.model['id']} (in the package)"
    return engine, {
        "name": pair.path.name,
        "sha256": file["sha256"],
        "bytes": file["bytes"],
        "verify_seconds": verified.verify_seconds,
        "kv_cache": recipe["kv_cache"],
        "weights_of": built_from if recipe["embed_weights"] else target.checkpoint.model_id,
    }


def _load(
    path: Path, manifest: Manifest, target: Target, cuda_graph: bool, warm_up_tokens: int,
    stages: Stages,
) -> Engine:  # fmt: skip
    details, device = manifest.details, target.device
    if manifest.recipe["kv_cache"] != ("cache" in details):
        raise ValueError("its metadata's recipe and details are of different graphs")
    constants, values = package.read_constants(details, device)
    if manifest.recipe["embed_weights"]:
        upload = weights.start_upload(package.find_in_package(constants, path), device)
    else:
        folder = target.checkpoint.folder
        dtype = target.dtype  # a fine-tune may be stored in another one
        target.checkpoint.require_weights()
        try:
            stored = weights.list_checkpoint(folder)
            # transformers reads none of what it ties
            stored = {n: one for n, one in stored.items() if n not in target.checkpoint.aliases}
            stored = package.find_in_checkpoint(constants, stored, dtype)
        except (ValueError, FileNotFoundError) as error:
            raise errors.ArtifactMismatchError(f"{folder}: {error}") from error
        upload = weights.start_upload(stored, device, dtype)

    def time_upload() -> None:  # most of it goes on behind other stages
        with stages.stage("weights", hidden=True):
            for thread in upload.threads:
                thread.join()

    clock = threading.Thread(target=time_upload)
    clock.start()
    tensors = upload.tensors | values
    models = [package.open_model(path, name, device, tensors) for name in details["graphs"]]
    stages.close("artifact")
    engine = make_engine(models, details, target.dtype, device)
    if device.type == "cuda":
        # what a request will run, so that kernels and libraries are there; no trace of it is left
        if isinstance(engine, BaseGenerator):
            engine.run([0] * warm_up_tokens, warm_up_tokens)
        else:
            engine.prefill([0] * warm_up_tokens, warm_up_tokens)
            if cuda_graph:
                engine.capture()
            engine.reset()
        synchronize(device)
        stages.close("capture")
    upload.wait()
    clock.join()
    stages.close("weights")
    return engine


def make_engine(
    models: Sequence[package.Model], details: dict, dtype: torch.dtype, device: torch.device
) -> Engine:
    """Return what generates with these graphs; `details` may hold a `kv_graphs.describe_state`."""
    if "cache" not in details:
        (model,) = models
        return BaseGenerator(model, device)
    cache = CacheShape(**details["cache"])
    table = rope_table(**details["rope"], slots=cache.slots, dtype=dtype, device=device)
    prefill, decode = models
    return Generator(prefill, decode, cache, table)
