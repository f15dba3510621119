"""Compile exported programs into one `.pt2`, with or without their weights.

Private API: `torch._inductor.aot_compile` and `torch._inductor.package.package_aoti`, which are
what `aoti_compile_and_package` calls for one program (read in torch 2.9.1 and 2.13.0); it takes
only one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from aotinductor import package_loader


@dataclass(frozen=True)
class Constant:
    """A tensor that the graphs read.

    `aliases` are further names of the same tensor (tied weights): a checkpoint may use any of them.
    `values` holds the tensor where no checkpoint does (rope frequencies).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    aliases: tuple[str, ...] = ()
    values: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Program:
    """An exported program, and Inductor options for it alone."""

    exported: torch.export.ExportedProgram
    options: Mapping[str, object] = field(default_factory=dict)


def compile_package(
    path: str | Path,
    programs: Mapping[str, Program],
    embed_weights: bool,
    max_autotune: bool = False,
) -> list[Constant]:
    """Write `path` with one model for each name in `programs`; return the constants they expect.

    Without embedded weights the file holds code only, and the loader must bind every constant. With
    them each graph holds a copy of its own: two graphs, twice the weights.
    """
    from torch._inductor import aot_compile
    from torch._inductor.package import package_aoti

    files = {}
    for name, program in programs.items():
        exported = program.exported
        args, kwargs = exported.example_inputs
        # The module's own guards are Python checks, which a compiled package does not run anyway.
        module = exported.module(check_guards=False)
        options = inductor_options(embed_weights, max_autotune) | dict(program.options)
        files[name] = aot_compile(module, args, kwargs, options=options)
    package_aoti(str(path), files)
    constants = list_constants(program.exported for program in programs.values())
    if not embed_weights:
        check_bindable(path, programs, constants)
    return constants


def check_bindable(path: str | Path, names: Iterable[str], constants: list[Constant]) -> None:
    """Raise RuntimeError if a compiled graph reads a constant that no checkpoint can give it."""
    for name in names:
        wanted = set(package_loader.open_model(path, name).get_constant_fqns())
        if made := sorted(wanted - {constant.name for constant in constants}):
            raise RuntimeError(f"Inductor made constants of its own in {name}: {', '.join(made)}")


def inductor_options(embed_weights: bool, max_autotune: bool) -> dict[str, object]:
    """Return the options for all graphs."""
    options: dict[str, object] = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": embed_weights,
        "max_autotune": max_autotune,
        # Or the kernels are built for this machine's number of cores, whatever the other one has.
        "cpp.dynamic_threads": True,
    }
    if not embed_weights:
        # All but CPP, whose template for CPUs packs this checkpoint's weights into a new constant.
        options["max_autotune_gemm_backends"] = "ATEN,TRITON"
    return options


def list_constants(exported_programs) -> list[Constant]:
    """Return every constant of the programs once. Raises ValueError where two graphs differ."""
    found: dict[str, Constant] = {}
    for exported in exported_programs:
        for name in used_constant_names(exported):
            constant = describe_constant(exported, name)
            if found.setdefault(name, constant) != constant:
                raise ValueError(f"the graphs disagree about {name}: {found[name]} and {constant}")
    return list(found.values())


def used_constant_names(exported: torch.export.ExportedProgram) -> list[str]:
    """Names of the parameters, buffers and constants that the graph really reads."""
    kinds = torch.export.graph_signature.InputKind
    wanted = (kinds.PARAMETER, kinds.BUFFER, kinds.CONSTANT_TENSOR)
    used = {node.name for node in exported.graph.find_nodes(op="placeholder") if node.users}
    specs = (spec for spec in exported.graph_signature.input_specs if spec.kind in wanted)
    return [spec.target for spec in specs if spec.arg.name in used]


def describe_constant(exported: torch.export.ExportedProgram, name: str) -> Constant:
    persistent = exported.state_dict.get(name)
    tensor = exported.constants[name] if persistent is None else persistent
    aliases = [n for n, t in exported.state_dict.items() if n != name and is_same(t, tensor)]
    values = None
    if persistent is None:  # a checkpoint does not hold it, and float32 survives JSON unchanged
        values = tuple(tensor.detach().double().flatten().tolist())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Constant(name, tuple(tensor.shape), dtype, tuple(aliases), values)


def is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape
