"""Host code that starts on another processor than the one it was compiled on.

Around its CUDA kernels a package carries C++ that launches them. Inductor compiles it for exactly
this processor, and on one without AVX-512 it would die of SIGILL. That code only launches kernels,
so a package for CUDA is compiled for the common level instead; a package for the CPU computes in
it, and stays bound to what `instruction_set` says.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

COMMON_LEVEL = "x86-64-v3"  # AVX2 and FMA: Intel since 2013, AMD since 2015


def instruction_set(device: torch.device) -> str:
    """Return what host code built here for `device` needs of a processor, and what this one offers.

    The same word at build and at run is a match: the recipe holds it.
    """
    here = torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda" and platform.machine() == "x86_64" and here in ("AVX2", "AVX512"):
        return COMMON_LEVEL
    return here


@contextmanager
def portable_host_code(device: torch.device) -> Iterator[None]:
    """While inside, Inductor compiles C++ for the level that `instruction_set` names."""
    if instruction_set(device) != COMMON_LEVEL:
        yield
        return
    from torch._inductor import config, cpp_builder

    # 256 bits is AVX2; "ok": its probe of every instruction set takes six seconds
    options = {"cpp.simdlen": 256, "cpp.vec_isa_ok": True}
    if hasattr(config.cpp, "march"):  # torch 2.13
        with config.patch(options | {"cpp.march": COMMON_LEVEL}):
            yield
        return
    # Private: up to torch 2.11 the flag is a literal in here, and there is no setting for it.
    stock = cpp_builder._get_optimization_cflags

    def for_common_level(*args, **kwargs) -> tuple[list[str], list[str]]:
        cflags, ldflags = stock(*args, **kwargs)
        return [f.replace("march=native", f"march={COMMON_LEVEL}") for f in cflags], ldflags

    with (
        config.patch(options),
        patch.object(cpp_builder, "_get_optimization_cflags", for_common_level),
    ):
        yield
