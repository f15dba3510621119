"""From a model to a `.pt2`: export, compile ahead of time, package, and say where the weights lie.

Private API: `torch._inductor.aot_compile` and `torch._inductor.package.package_aoti`, which are
what `aoti_compile_and_package` calls for one program (read in torch 2.9.1 and 2.13.0); it takes
only one.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aotinductor import kv_graphs
from aotinductor.base import export_base_graph
from aotinductor.host_code import portable_host_code
from aotinductor.kv_cache import CacheShape
from aotinductor.lengths import Bounds
from aotinductor.package import OPENED, PLAIN_MODEL, Constant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CODE_ONLY = {"aot_inductor.package_constants_in_so": False}
# At the library's end, and not within it: there their offsets are known, whatever their size.
_BEHIND_LIBRARY = {"aot_inductor.force_mmap_weights": True}
# A record for each tensor, whatever the number of graphs that read it; 2.9 knows one format for it.
_BESIDE_LIBRARY = _CODE_ONLY | (
    {"aot_inductor.package_constants_on_disk": True}
    if torch.__version__ < "2.10"
    else {"aot_inductor.package_constants_on_disk_format": "pickle_weights"}
)
_PAGE_BYTES = 16384  # what the runtime wants the weights behind a library aligned to


@dataclass(frozen=True)
class Program:
    """An exported program, and Inductor options for it alone."""

    exported: torch.export.ExportedProgram
    options: Mapping[str, object] = field(default_factory=dict)


def compile_base_package(
    model: "PreTrainedModel", bounds: Bounds, example_seq_len: int, path: Path,
    embed_weights: bool, max_autotune: bool,
) -> dict:  # fmt: skip
    """Write `path` with the base graph; return the metadata's `details`.

    With its weights it is compiled twice: a model either brings its weights, which the plain loader
    needs, or leaves them to be bound, which a start without unpacking them needs.
    """
    exported = export_base_graph(model, bounds, example_seq_len)
    name = OPENED[False][0]
    program = Program(exported, {"max_autotune": max_autotune})
    files = {name: compile_program(program, _CODE_ONLY)}
    constants = list_constants([exported])
    if embed_weights:
        files[PLAIN_MODEL] = compile_program(program, _BEHIND_LIBRARY)
    package(path, files)
    if embed_weights:
        constants = with_offsets(constants, find_behind_library(path))
    return {"graphs": [name], "constants": [asdict(constant) for constant in constants]}


def compile_kv_package(
    model: "PreTrainedModel", bounds: Bounds, slots: int, example_seq_len: int, path: Path,
    embed_weights: bool, max_autotune: bool,
) -> dict:  # fmt: skip
    """Write `path` with the models `prefill` and `decode`; return the metadata's `details`."""
    cache = CacheShape.of(model.config, slots)
    programs = {
        # Not tuned: that would be for the example's length, and serve every other one too. The
        # library chooses for each.
        "prefill": Program(
            kv_graphs.export_prefill(model, cache, bounds, example_seq_len), {"max_autotune": False}
        ),
        "decode": Program(
            kv_graphs.export_decode(model, cache),
            {"max_autotune": max_autotune, "coordinate_descent_tuning": max_autotune}
            | kv_graphs.decode_options(model),
        ),
    }
    place = _BESIDE_LIBRARY if embed_weights else _CODE_ONLY
    package(path, {name: compile_program(one, place) for name, one in programs.items()})
    constants = list_constants(program.exported for program in programs.values())
    if embed_weights:
        constants = with_offsets(constants, find_beside_library(path))
    return {
        "graphs": list(programs),
        "cache": asdict(cache),
        "rope": kv_graphs.rope_recipe(model),
        "constants": [asdict(constant) for constant in constants],
    }


def compile_program(program: Program, place: Mapping[str, object]) -> Any:
    """Return the files of one compiled program, its constants where `place` has them."""
    from torch._inductor import aot_compile

    args, kwargs = program.exported.example_inputs
    # the module's own guards are Python checks, which a compiled package does not run anyway
    module = program.exported.module(check_guards=False)
    options = {
        "aot_inductor.package": True,
        # or the kernels are built for this machine's number of cores, whatever the other one has
        "cpp.dynamic_threads": True,
        # More than one, also where a build has one: with 1 Inductor leaves out what keeps several
        # threads of a later run from all doing the same piece of work (`omp single`), and each of
        # them advances `position` (torch 2.9.1 to 2.13). How many hardly matters.
        "cpp.threads": 16,
        # all but CPP, whose template for CPUs packs this checkpoint's weights into a new constant
        "max_autotune_gemm_backends": "ATEN,TRITON",
    }
    with portable_host_code(args[0].device):
        return aot_compile(module, args, kwargs, options={**options, **program.options, **place})


def package(path: Path, files: Mapping[str, list]) -> None:
    from torch._inductor.package import package_aoti

    package_aoti(str(path), dict(files))


def with_offsets(constants: Iterable[Constant], offsets: Mapping[str, int]) -> list[Constant]:
    return [replace(constant, offset=offsets[constant.name]) for constant in constants]


def find_behind_library(path: Path) -> dict[str, int]:
    """Return where each constant of the plain model begins in the package.

    The runtime reads them one after the other from the end of the library's file, in the order and
    with the sizes of the generated constructor, which is in the package too.
    """
    with zipfile.ZipFile(path) as archive:
        files = [
            name
            for name in archive.namelist()
            if name.split("/")[1:-1] == ["data", "aotinductor", PLAIN_MODEL]
        ]
        (library,) = (name for name in files if name.endswith(".so"))
        (source,) = (name for name in files if name.endswith(".wrapper.cpp"))
        rows = re.findall(
            r'\.data_size = (\d+);.*?\.original_fqn = "([^"]*)"',
            archive.read(source).decode(),
            re.DOTALL,
        )
        size = archive.getinfo(library).file_size
    first = size - sum(int(data_size) for data_size, _ in rows) - 8  # a magic number is the last
    if first % _PAGE_BYTES:
        raise RuntimeError(f"the weights behind {library} are not where the runtime reads them")
    offset = record_offset(path, library) + first
    offsets = {}
    for data_size, name in rows:
        offsets[name] = offset
        offset += int(data_size)
    return offsets


def find_beside_library(path: Path) -> dict[str, int]:
    """Return where each constant begins that has a record of its own: a `torch.save`, a zip too."""
    offsets = {}
    with zipfile.ZipFile(path) as archive:
        for config in archive.namelist():
            if not config.endswith("/weights_config.json"):
                continue
            root = config.partition("/")[0]
            for name, (record, _, _, _) in json.loads(archive.read(config)).items():
                if name not in offsets:
                    record = f"{root}/data/weights/{record}"
                    saved = io.BytesIO(archive.read(record))
                    begin = torch._C.PyTorchFileReader(saved).get_record_offset("data/0")
                    offsets[name] = record_offset(path, record) + begin
    return offsets


def record_offset(path: Path, name: str) -> int:
    """Return where the content of an entry begins in the file."""
    return torch._C.PyTorchFileReader(str(path)).get_record_offset(name.partition("/")[2])


def list_constants(exported_programs: Iterable[torch.export.ExportedProgram]) -> list[Constant]:
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
    return [str(spec.target) for spec in specs if spec.arg.name in used]


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
