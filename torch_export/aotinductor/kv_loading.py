"""From a package with a KV cache on disk to a generator: torch alone, no compiler."""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from aotinductor.binding import load_constants
from aotinductor.kv_cache import CacheShape, rope_table
from aotinductor.kv_generation import Generator
from aotinductor.package_loader import Model, bind_constants, device_index, open_model

if TYPE_CHECKING:
    from common.manifest import Manifest
    from common.stopwatch import Stages
    from common.targets import Target

GRAPHS = ("prefill", "decode")


def open_generator(
    path: str, manifest: "Manifest", target: "Target", cuda_graph: bool, stages: "Stages"
) -> Generator:  # fmt: skip
    """Open both graphs, bind the checkpoint's weights unless the package has its own, capture.

    The weights travel to the device while the package is unpacked and opened.
    """
    device = target.device
    with ThreadPoolExecutor(max_workers=1) as executor:
        embedded = manifest.recipe["embed_weights"]
        weights = None if embedded else executor.submit(load_constants, manifest, target)
        models = [open_model(path, name, device_index(device)) for name in GRAPHS]
        stages.close("package")
        if weights is not None:
            for model in models:
                bind_constants(model, weights.result())
    stages.close("weights")
    generator = make_generator(*models, manifest.details, target.dtype, device)
    stages.close("KV cache")
    if cuda_graph:
        generator.capture()
    stages.close("graph capture")
    return generator


def make_generator(
    prefill: Model, decode: Model, details: dict, dtype: torch.dtype, device: torch.device
) -> Generator:
    cache = CacheShape(**details["cache"])
    table = rope_table(**details["rope"], slots=cache.slots, dtype=dtype, device=device)
    return Generator(prefill, decode, cache, table)
