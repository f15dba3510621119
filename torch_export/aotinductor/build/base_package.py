"""The base graph, `forward(input_ids, attention_mask) -> logits`: exported, compiled, packaged.

torch's plain loader opens it; how it is served, `start.base_engine` says.
"""

import re
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import nn

from aotinductor import torch_private
from aotinductor.build.compiler import compile_program, example_and_dim
from aotinductor.lengths import Bounds
from aotinductor.native.compile import compile_steps
from aotinductor.start.base_engine import Constant
from aotinductor.start.package import Package

PLAIN_MODEL = "model"  # the name that aoti_load_package looks for by itself
_CODE_ONLY = {"aot_inductor.package_constants_in_so": False}
# At the library's end, and not within it: there their offsets are known, whatever their size.
_BEHIND_LIBRARY = {"aot_inductor.force_mmap_weights": True}


def compile_base_package(
    causal_lm, bounds: Bounds, path: Path, embed_weights: bool, max_autotune: bool
) -> dict:
    """Write the package, and return the metadata's `details` of it.

    With its weights it is compiled twice: a model either brings its weights, which the plain loader
    needs, or leaves them to be bound, which a start without unpacking them needs.
    """
    exported, options = export_base_graph(causal_lm, bounds), {"max_autotune": max_autotune}
    files = {"base": compile_program(exported, options | _CODE_ONLY)}
    if embed_weights:
        files[PLAIN_MODEL] = compile_program(exported, options | _BEHIND_LIBRARY)
    torch_private.package_aoti(path, files)
    with tempfile.TemporaryDirectory(prefix="llama-native-") as folder:
        steps = compile_steps(Path(folder))  # binds the constants at a start
        with zipfile.ZipFile(path, "a") as archive:
            archive.write(steps, f"{path.stem}/native/{steps.name}")
    offsets = find_behind_library(path) if embed_weights else {}
    return {
        "graphs": ["base"],
        "vocab_size": causal_lm.config.vocab_size,
        "constants": describe_constants(exported, offsets),
    }


class BaseGraph(nn.Module):
    """A Llama-family model whose only inputs are ids and mask, padded on the right.

    The submodules keep their names: the graph's constants are called as the checkpoint's tensors.
    """

    def __init__(self, causal_lm):
        super().__init__()
        self.model, self.lm_head = causal_lm.model, causal_lm.lm_head

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(batch, seq) int64, (batch, seq) int64 of 1 and 0 -> (batch, seq, vocab)."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (seq,)
        causal = positions[:, None] >= positions  # (seq, seq), query by key
        # Made here, because transformers' own mask builder cannot be exported (its vmap stops both
        # the strict and the non-strict tracer); a mask of four dimensions it takes as it is.
        mask = causal & attention_mask.bool()[:, None, None, :]  # (batch, 1, seq, seq)
        hidden = self.model(
            input_ids, attention_mask=mask, position_ids=positions[None], use_cache=False
        )[0]  # (batch, seq, hidden)
        return self.lm_head(hidden)


def export_base_graph(causal_lm, bounds: Bounds):
    """Export for every multiple within the bounds, or, static, for their one length."""
    length, length_dim = example_and_dim(bounds)
    ids = torch.zeros((1, length), dtype=torch.int64, device=causal_lm.device)
    example, shapes = (ids, torch.ones_like(ids)), (length_dim, length_dim)
    return torch.export.export(BaseGraph(causal_lm), example, dynamic_shapes=shapes)


def find_behind_library(path: Path) -> dict[str, int]:
    """Return where each constant of the plain model begins in the package.

    The runtime reads them one after the other from the end of the library's file, in the order and
    with the sizes of the generated constructor, which is in the package too.
    """
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        files = [name for name in archive.namelist() if f"/aotinductor/{PLAIN_MODEL}/" in name]
        (library,) = (name for name in files if name.endswith(".so"))
        (source,) = (name for name in files if name.endswith(".wrapper.cpp"))
        constructor = archive.read(source).decode()
        end = Package(file, path, {"graphs": []}).offset_of(library.partition("/")[2])
        end += archive.getinfo(library).file_size - 8  # a magic number is the last
    declared = r'\.data_size = (\d+);.*?\.original_fqn = "([^"]*)"'
    offsets = {}
    for size, name in reversed(re.findall(declared, constructor, re.DOTALL)):
        end -= int(size)
        offsets[name] = end
    return offsets


def describe_constants(
    exported: torch.export.ExportedProgram, offsets: dict[str, int]
) -> list[dict]:
    """Return the metadata's row of each tensor that the graph really reads, once."""
    stored, rows = exported.state_dict, []
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
        row = Constant(name, tuple(tensor.shape), dtype, aliases, values, offset)
        rows.append(row._asdict())
    return rows
