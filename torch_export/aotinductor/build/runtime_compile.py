"""What a start without a package serves with: transformers' model, or its graphs, compiled here."""

import tempfile
from pathlib import Path

import torch

from aotinductor import package
from aotinductor.base import BaseGraph
from aotinductor.build import layer_graphs
from aotinductor.build.compile_package import compile_package
from aotinductor.flags import RunSettings
from aotinductor.kv_generation import CacheShape
from aotinductor.lengths import Bounds, Plan
from aotinductor.loading import Engine, make_engine
from common.cli import Console
from common.compiler.toolchain import prepare_toolchain
from common.measure.measures import Stages
from common.model.target import Target, load_model
from common.model.weights import start_upload


def serve_without_package(
    settings: RunSettings, target: Target, plan: Plan, cuda_graph: bool, stages: Stages,
    console: Console,
):  # fmt: skip
    """Return transformers' model, or the engine that a package would give, made of it here."""
    import transformers  # noqa: F401  # here: its seconds are not the weights'

    flags = settings.loading
    export = flags.no_preload_method == "export"
    if settings.mode == "skip":
        prepare_toolchain(target.device, host_code=export, console=console)
    stages.close("imports")
    model = load_model(target)
    stages.close("weights")
    if settings.mode == "eager":
        return model
    max_autotune = flags.max_autotune
    if max_autotune is None:  # as the package was built where there is one
        max_autotune = bool(plan.built.get("max_autotune", True))
    if export:
        with tempfile.TemporaryDirectory(prefix="llama-package-") as folder:
            path = Path(folder, "model.pt2")
            engine, _ = make_package(model, plan.bounds, plan.slots, path, False, max_autotune)
    else:
        engine = _torch_compile(model, plan, flags.compile_dynamic_seq_len, max_autotune)
    if cuda_graph:
        engine.capture()
    stages.close("compile")
    return engine


def make_package(
    model, bounds: Bounds, slots: int | None, path: Path, embed_weights: bool, max_autotune: bool
) -> tuple[Engine, dict]:
    """Write `path`; return an engine over it, and the metadata's details.

    It runs on the package's own weights, or else on the model's.
    """
    details = compile_package(model, bounds, slots, path, embed_weights, max_autotune)
    constants, values = package.read_constants(details, model.device)
    weights = model.state_dict()
    if embed_weights:
        weights = start_upload(package.find_in_package(constants, path), model.device).wait()
    weights |= values
    models = [package.open_model(path, name, model.device, weights) for name in details["graphs"]]
    return make_engine(models, details, model.dtype, model.device), details


def _torch_compile(model, plan: Plan, one_dynamic_graph: bool, max_autotune: bool) -> Engine:
    # without Inductor's own CUDA graphs: the generator captures decode, as of a package
    tuned = "max-autotune" if plan.slots is None else "max-autotune-no-cudagraphs"

    def compiled(graph: torch.nn.Module, dynamic: bool | None) -> package.Model:
        mode = tuned if max_autotune else "default"
        called = torch.compile(graph, fullgraph=True, dynamic=dynamic, mode=mode)
        return lambda inputs: [called(*inputs)]

    # None is torch's own way: static at first, dynamic from the second length on
    dynamic = (one_dynamic_graph or None) if plan.bounds.dynamic_seq_len else False
    if plan.slots is None:
        models, details = [compiled(BaseGraph(model), dynamic)], {}
    else:
        on_cpu = model.device.type == "cpu"  # there the length in use changes decode's shapes
        prefill, decode = layer_graphs.PrefillGraph(model), layer_graphs.DecodeGraph(model)
        models = [compiled(prefill, dynamic), compiled(decode, on_cpu)]
        details = layer_graphs.describe_state(model, CacheShape.of(model.config, plan.slots))
    return make_engine(models, details, model.dtype, model.device)
