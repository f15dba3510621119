"""From a package with a KV cache on disk to a generator: torch alone, no compiler."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common.console import Console
from common.errors import ArtifactMismatchError
from common.weights import Expected, load_weights

from aotinductor.bounds import Bounds
from aotinductor.kv_cache import CacheShape, rope_table
from aotinductor.kv_generation import Generator, Model
from aotinductor.package_loader import bind_constants, open_model

if TYPE_CHECKING:
    from common.manifest import Manifest
    from common.stopwatch import Stages

    from aotinductor.recipe import Target

GRAPHS = ("prefill", "decode")


def open_generator(
    path_for_loader: str, manifest: "Manifest", target: "Target", bounds: Bounds,
    cuda_graph: bool, stages: "Stages", console: Console,
) -> Generator:  # fmt: skip
    """Open both graphs, bind the checkpoint's weights unless the package has its own, capture.

    The weights travel to the device while the package is unpacked and opened.
    """
    device, details = target.device, manifest.details
    bound = not manifest.recipe["embed_weights"]
    with ThreadPoolExecutor(max_workers=1) as executor:
        weights = executor.submit(_load_weights, manifest, target) if bound else None
        index = -1 if device.type == "cpu" else device.index or 0
        models = [open_model(path_for_loader, name, index) for name in GRAPHS]
        stages.close("package")
        if weights is not None:
            _bind(weights, models, target, console)
    stages.close("weights")
    generator = make_generator(*models, details, bounds, target.dtype, device)
    stages.close("KV cache")
    if cuda_graph:
        generator.capture()
        stages.close("graph capture")
    return generator


def make_generator(
    prefill: Model, decode: Model, details: dict, bounds: Bounds, dtype: torch.dtype,
    device: torch.device,
) -> Generator:  # fmt: skip
    cache = CacheShape(**details["cache"])
    table = rope_table(**details["rope"], slots=cache.slots, dtype=dtype, device=device)
    return Generator(prefill, decode, cache, table, bounds.dynamic_seq_multiple)


def _load_weights(manifest: "Manifest", target: "Target") -> dict[str, torch.Tensor]:
    expected = [Expected.from_json(row) for row in manifest.details["constants"]]
    # only a build that converted the weights asks for a conversion again
    cast = bool(manifest.recipe["cast_weights"])
    with torch.no_grad():
        return load_weights(Path(target.checkpoint.folder), expected, target.device, cast)


def _bind(
    weights: "Future[dict[str, torch.Tensor]]", models: list, target: "Target", console: Console
) -> None:
    try:
        tensors = weights.result()
    except (ValueError, FileNotFoundError) as error:
        raise ArtifactMismatchError(f"{target.checkpoint.folder}: {error}") from error
    for model in models:
        bind_constants(model, tensors)
    console.say(f"bound to the weights of {target.checkpoint.model_id}")
