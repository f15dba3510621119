"""A KV-cache package: its programs compiled, and written with what they need into one zip.

Its entries are those of `start.package`, stored, not deflated: weights are used where they lie.
"""

import json
import struct
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from aotinductor import torch_private
from aotinductor.build.compiler import compile_program
from aotinductor.build.layer_graphs import (
    Program,
    bytes_of_a_step,
    export_program,
    make_programs,
    state_dtypes,
)
from aotinductor.cache import CacheShape
from aotinductor.lengths import Bounds
from aotinductor.native.compile import RUNTIME, compile_native, missing_symbols, stripped

ALIGNMENT = 64  # of the weights' content, where vectors are loaded from best
# A step on a CPU that reads less than this is one thread's work: a few ms of a core, with a dozen
# places in each layer where several threads would wait for each other. random:tiny, 12 MB, beside
# other work: 1 to 73 ms a token with two threads, 0.7 to 2.4 with one.
ONE_THREAD_BYTES = 64 * 2**20
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def cache_shape(causal_lm, slots: int) -> CacheShape:
    """Return the shape of the model's KV cache."""
    head_dim = causal_lm.model.layers[0].self_attn.head_dim
    return CacheShape(slots, causal_lm.config.num_key_value_heads, head_dim)


def compile_layer_package(
    causal_lm, bounds: Bounds, slots: int, path: Path, embed_weights: bool, max_autotune: bool
) -> dict:
    """Write the package, and return the metadata's `details` of it."""
    cache = cache_shape(causal_lm, slots)
    programs = make_programs(causal_lm)
    with tempfile.TemporaryDirectory(prefix="llama-native-") as folder:
        native = compile_native(Path(folder), causal_lm.device.type)
        entries = {f"native/{name}": file for name, file in native.items()}
        lacks = {}
        for name, program in programs.items():
            exported = export_program(program, causal_lm, cache, bounds)
            options = program_options(name, causal_lm, max_autotune)
            with torch_private.linked_with(native[RUNTIME]):
                files = compile_program(exported, options)
            (compiled,) = (file for file in files if file.endswith(".so"))
            library = stripped(Path(compiled), Path(folder, name))
            kernels = [Path(file) for file in files if file.endswith(".cubin")]
            entries |= {f"programs/{name}/{file.name}": file for file in (library, *kernels)}
            if missing := missing_symbols(library, native[RUNTIME]):
                lacks[name] = missing
        # each once: a tied head is the embedding's
        embedded = dict(causal_lm.named_parameters()) if embed_weights else {}
        write_package(path, entries, embedded)
    return describe_package(causal_lm, cache, programs) | {"runtime": {"lacks": lacks}}


def program_options(name: str, causal_lm, max_autotune: bool) -> dict[str, object]:
    """Return the Inductor options of one program, beside those of all."""
    if name.startswith("prefill"):
        # Not tuned: that would be for the example's length, and serve every other one too. The
        # library chooses for each.
        return {"max_autotune": False}
    options = {"max_autotune": max_autotune, "coordinate_descent_tuning": max_autotune}
    if causal_lm.device.type == "cuda":
        # q, k and v have different numbers of rows: only a combined kernel launches them as one
        return options | {"combo_kernels": True}
    # A thread that waits for another one spins, and on a machine with other work waits long.
    if bytes_of_a_step(causal_lm) < ONE_THREAD_BYTES:
        return options | {"cpp.dynamic_threads": False, "cpp.threads": 1}
    return options


def describe_package(causal_lm, cache: CacheShape, programs: Mapping[str, Program]) -> dict:
    """Return what a start needs to call the programs. The depth is the checkpoint's."""
    rotary, config = causal_lm.model.rotary_emb, causal_lm.config
    dtypes = {
        name: str(one).removeprefix("torch.") for name, one in state_dtypes(causal_lm).items()
    }
    return {
        "programs": {name: list(program.inputs) for name, program in programs.items()},
        "dtypes": dtypes,
        "cache": cache._asdict(),
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "rope": {
            # (head_dim / 2,); JSON keeps float32 exactly
            "inv_freq": rotary.inv_freq.detach().double().tolist(),
            "attention_scaling": float(rotary.attention_scaling),
        },
    }


def write_package(path: Path, entries: Mapping[str, Path], embedded: Mapping[str, Tensor]) -> None:
    """Write the zip: files by their names in it, and, if there are any, the weights."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, file in entries.items():
            archive.writestr(zipfile.ZipInfo(f"{path.stem}/{name}"), file.read_bytes())
        if embedded:
            entry = zipfile.ZipInfo(f"{path.stem}/weights/model.safetensors")
            # a header of the zip: 30 bytes, the name, and 20 for a size beyond 4 GiB
            begin = archive.fp.tell() + 30 + len(entry.filename.encode()) + 20
            header = safetensors_header(embedded, begin)
            entry.file_size = len(header) + sum(one.nbytes for one in embedded.values())
            with archive.open(entry, "w", force_zip64=True) as file:
                file.write(header)
                for one in embedded.values():
                    file.write(one.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def safetensors_header(tensors: Mapping[str, Tensor], at: int) -> bytes:
    """Return what comes before the tensors, in this order, in a safetensors file.

    It begins at `at`, and ends where an aligned tensor can begin.
    """
    header, end = {}, 0
    for name, one in tensors.items():
        begin, end = end, end + one.nbytes
        described = {"dtype": _SAFETENSORS_NAMES[one.dtype], "shape": list(one.shape)}
        header[name] = described | {"data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(at + 8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
