"""What a start without a package serves with: transformers' model, or its graphs, compiled here."""

import tempfile
from pathlib import Path

import torch

from aotinductor import package
from aotinductor.base import BaseGenerator
from aotinductor.build.base_package import BaseGraph, compile_base_package
from aotinductor.build.layer_graphs import make_programs
from aotinductor.build.layer_package import (
    cache_shape,
    compile_layer_package,
    describe_package,
    make_engine,
    open_package,
)  # fmt: skip
from aotinductor.flags import RunSettings
from aotinductor.lengths import Bounds, Plan
from aotinductor.loading import Engine
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
    stages.close("compile")
    return engine


def make_package(
    model, bounds: Bounds, slots: int | None, path: Path, embed_weights: bool, max_autotune: bool
) -> tuple[Engine, dict]:
    """Write `path`; return an engine over it, and the metadata's details.

    It runs on the package's own weights, or else on the model's.
    """
    how = (path, embed_weights, max_autotune)
    if slots is not None:
        details = compile_layer_package(model, bounds, slots, *how)
        return open_package(path, details, model.device, dict(model.named_parameters())), details
    details = compile_base_package(model, bounds, *how)
    constants, values = package.read_constants(details, model.device)
    weights = model.state_dict()
    if embed_weights:
        weights = start_upload(package.find_in_package(constants, path), model.device).wait()
    run = package.open_model(path, "base", model.device, weights | values)
    return BaseGenerator(run, model.device), details


def _torch_compile(model, plan: Plan, one_dynamic_graph: bool, max_autotune: bool) -> Engine:
    # without Inductor's own CUDA graphs: the generator captures decode, as of a package
    tuned = "max-autotune" if plan.slots is None else "max-autotune-no-cudagraphs"
    mode = tuned if max_autotune else "default"
    # None is torch's own way: static at first, dynamic from the second length on
    dynamic = (one_dynamic_graph or None) if plan.bounds.dynamic_seq_len else False
    if plan.slots is None:
        graph = torch.compile(BaseGraph(model), fullgraph=True, dynamic=dynamic, mode=mode)
        return BaseGenerator(lambda inputs: [graph(*inputs)], model.device)
    cache = cache_shape(model, plan.slots)
    programs = make_programs(model, cache)
    compiled = {}
    for name, program in programs.items():
        # on a CPU the rows in use change with the length
        varies = model.device.type == "cpu" if name.startswith("decode") else dynamic
        graph = torch.compile(program, fullgraph=True, dynamic=varies, mode=mode)
        compiled[name] = lambda inputs, graph=graph: graph(*inputs)
    details = describe_package(model, cache, programs)
    return make_engine(compiled, details, dict(model.named_parameters()), model.device)
