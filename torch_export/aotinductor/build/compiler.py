"""From an exported program to machine code, with the settings that all programs share."""

from collections.abc import Mapping

import torch

from aotinductor import torch_private
from aotinductor.lengths import Bounds
from common.compiler.host_code import portable_host_code


def compile_program(
    exported: torch.export.ExportedProgram, own_options: Mapping[str, object]
) -> list[str]:
    """Return the files of one compiled program."""
    options = {
        # or the kernels are built for this machine's number of cores, whatever the other one has
        "cpp.dynamic_threads": True,
        # More than one, also where a build has one: with 1 Inductor leaves out what keeps several
        # threads of a later run from all doing the same piece of work (`omp single`), and each of
        # them advances `position` (torch 2.9.1 to 2.13). How many hardly matters.
        "cpp.threads": 16,
        # all but CPP, whose template for CPUs packs this checkpoint's weights into a new constant
        "max_autotune_gemm_backends": "ATEN,TRITON",
        # a build starts without any: a base graph costs 4 to 14 s more with them, layers the same
        "aot_inductor.precompile_headers": False,
    }
    with portable_host_code(exported.example_inputs[0][0].device.type):
        return torch_private.aot_compile(exported, options | dict(own_options))


def example_and_dim(bounds: Bounds) -> tuple[int, dict | None]:
    """Return the length to trace with, and what is dynamic on dimension 1; None is static."""
    if not bounds.dynamic_seq_len:
        return bounds.max_seq_len, None
    multiple = bounds.dynamic_seq_multiple
    first, last = bounds.buckets[0] // multiple, bounds.max_seq_len // multiple
    blocks = torch.export.Dim("blocks", min=first, max=last)
    # an example of one block would be taken for a constant, and so would one that is as long as
    # the KV cache: it stays below the longest
    longest = max(last - 1, first, 2)
    example = min(max(bounds.example_seq_len // multiple, first, 2), longest, last)
    return example * multiple, {1: blocks if multiple == 1 else multiple * blocks}
