"""From a model to a `.pt2`: export, compile ahead of time, package, and say where the weights lie.

Private API: `torch._inductor.aot_compile` and `torch._inductor.package.package_aoti`, which are
what `aoti_compile_and_package` calls for one program (read in torch 2.9.1 and 2.13.0); it takes
only one.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import torch

from aotinductor.base import export_base_graph
from aotinductor.build import layer_graphs
from aotinductor.kv_generation import CacheShape
from aotinductor.lengths import Bounds
from aotinductor.package import COMMON_LEVEL, PLAIN_MODEL, Constant, instruction_set

_CODE_ONLY = {"aot_inductor.package_constants_in_so": False}
# At the library's end, and not within it: there their offsets are known, whatever their size.
_BEHIND_LIBRARY = {"aot_inductor.force_mmap_weights": True}
# A record for each tensor, whatever the number of graphs that read it; 2.9 knows one format for it.
_BESIDE_LIBRARY = _CODE_ONLY | (
    {"aot_inductor.package_constants_on_disk": True}
    if torch.__version__ < "2.10"
    else {"aot_inductor.package_constants_on_disk_format": "pickle_weights"}
)


def compile_package(
    model, bounds: Bounds, slots: int | None, path: Path, embed_weights: bool, max_autotune: bool
) -> dict:
    """Write `path` with the base graph, or, with slots, those of a KV cache.

    Returns the metadata's `details`. The base graph with its weights is compiled twice: a model
    either brings its weights, which the plain loader needs, or leaves them to be bound, which a
    start without unpacking them needs.
    """
    from torch._inductor.package import package_aoti

    options = {"max_autotune": max_autotune}
    if slots is None:
        base = export_base_graph(model, bounds)
        programs, state, find = {"base": base}, {}, find_behind_library
        files = {"base": compile_program(base, options | _CODE_ONLY)}
        if embed_weights:
            files[PLAIN_MODEL] = compile_program(base, options | _BEHIND_LIBRARY)
    else:
        cache = CacheShape.of(model.config, slots)
        prefill, decode = layer_graphs.export_graphs(model, cache, bounds)
        programs, find = {"prefill": prefill, "decode": decode}, find_beside_library
        state = layer_graphs.describe_state(model, cache)
        place = _BESIDE_LIBRARY if embed_weights else _CODE_ONLY
        options |= {"coordinate_descent_tuning": max_autotune} | layer_graphs.decode_options(model)
        files = {
            # Not tuned: that would be for the example's length, and serve every other one too. The
            # library chooses for each.
            "prefill": compile_program(prefill, {"max_autotune": False} | place),
            "decode": compile_program(decode, options | place),
        }
    package_aoti(str(path), files)
    constants = describe_constants(programs.values(), find(path) if embed_weights else {})
    return {"graphs": list(programs), **state, "constants": constants}


def compile_program(exported: torch.export.ExportedProgram, own_options: dict[str, object]):
    """Return the files of one compiled program."""
    from torch._inductor import aot_compile

    args, kwargs = exported.example_inputs
    # the module's own guards are Python checks, which a compiled package does not run anyway
    module = exported.module(check_guards=False)
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
        return aot_compile(module, args, kwargs, options=options | own_options)


@contextmanager
def portable_host_code(device: torch.device) -> Iterator[None]:
    """While inside, Inductor compiles C++ for the level that `instruction_set` names."""
    if instruction_set(device) != COMMON_LEVEL:
        yield
        return
    from torch._inductor import config, cpp_builder

    # 256 bits is AVX2; "ok": its probe of every instruction set takes six seconds
    options = {"cpp.simdlen": 256, "cpp.vec_isa_ok": True}
    with ExitStack() as patches:
        if hasattr(config.cpp, "march"):  # torch 2.13
            options["cpp.march"] = COMMON_LEVEL
        else:
            # Private: up to torch 2.11 the flag is a literal in here, and there is no setting.
            stock = cpp_builder._get_optimization_cflags

            def for_common_level(*args, **kwargs):
                cflags, ldflags = stock(*args, **kwargs)
                return [f.replace("march=native", f"march={COMMON_LEVEL}") for f in cflags], ldflags

            mend = patch.object(cpp_builder, "_get_optimization_cflags", for_common_level)
            patches.enter_context(mend)
        patches.enter_context(config.patch(options))
        yield


def find_behind_library(path: Path) -> dict[str, int]:
    """Return where each constant of the plain model begins in the package.

    The runtime reads them one after the other from the end of the library's file, in the order and
    with the sizes of the generated constructor, which is in the package too.
    """
    with zipfile.ZipFile(path) as archive:
        files = [name for name in archive.namelist() if f"/aotinductor/{PLAIN_MODEL}/" in name]
        (library,) = (name for name in files if name.endswith(".so"))
        (source,) = (name for name in files if name.endswith(".wrapper.cpp"))
        constructor = archive.read(source).decode()
        end = archive.getinfo(library).file_size - 8  # a magic number is the last
    declared = r'\.data_size = (\d+);.*?\.original_fqn = "([^"]*)"'
    end += torch._C.PyTorchFileReader(str(path)).get_record_offset(library.partition("/")[2])
    offsets = {}
    for size, name in reversed(re.findall(declared, constructor, re.DOTALL)):
        end -= int(size)
        offsets[name] = end
    return offsets


def find_beside_library(path: Path) -> dict[str, int]:
    """Return where each constant begins that has a record of its own: a `torch.save`, a zip too."""
    reader = torch._C.PyTorchFileReader(str(path))
    offsets = {}
    for config in reader.get_all_records():
        if config.endswith("/weights_config.json"):
            for name, (file, *_) in json.loads(reader.get_record(config)).items():
                if name not in offsets:
                    record = f"data/weights/{file}"
                    saved = torch._C.PyTorchFileReader(io.BytesIO(reader.get_record(record)))
                    begin = saved.get_record_offset("data/0")
                    offsets[name] = reader.get_record_offset(record) + begin
    return offsets


def describe_constants(programs: Iterable, offsets: dict[str, int]) -> list[dict]:
    """Return the metadata's row of each tensor that the graphs really read, once."""
    rows = {}
    for exported in programs:
        stored = exported.state_dict
        tensors = {**exported.constants, **stored}
        used = {node.name for node in exported.graph.find_nodes(op="placeholder") if node.users}
        for spec in exported.graph_signature.input_specs:
            name = spec.target
            if name not in tensors or spec.arg.name not in used:
                continue
            tensor, values = tensors[name], None
            if name not in stored:  # nor in a checkpoint; and float32 survives JSON unchanged
                values = tensor.detach().double().flatten().tolist()
            place = (tensor.data_ptr(), tensor.shape)
            same = [key for key, one in stored.items() if (one.data_ptr(), one.shape) == place]
            aliases = [key for key in same if key != name]
            dtype = str(tensor.dtype).removeprefix("torch.")
            offset = offsets[name] if offsets else None
            rows[name] = asdict(Constant(name, tuple(tensor.shape), dtype, aliases, values, offset))
    return list(rows.values())
