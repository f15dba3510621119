"""C++ around CUDA kernels, compiled for more processors than the one it is compiled on.

Private names of torch, read in 2.9.1, 2.11.0 and 2.14.1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from common.machine import COMMON_LEVEL, host_code_is_portable


@contextmanager
def portable_host_code(device: str) -> Iterator[None]:
    """While inside, Inductor compiles C++ for COMMON_LEVEL, where that is right for `device`."""
    if not host_code_is_portable(device):
        yield
        return
    from torch._inductor import config, cpp_builder

    # 256 bits is AVX2; "ok": its probe of every instruction set takes six seconds
    options = {"cpp.simdlen": 256, "cpp.vec_isa_ok": True}
    if hasattr(config.cpp, "march"):  # a setting from 2.13 on
        with config.patch(options | {"cpp.march": COMMON_LEVEL}):
            yield
        return
    stock = cpp_builder._get_optimization_cflags  # where the flag is a literal

    def for_level(*args, **kwargs):
        cflags, ldflags = stock(*args, **kwargs)
        return [flag.replace("march=native", f"march={COMMON_LEVEL}") for flag in cflags], ldflags

    with config.patch(options), patch.object(cpp_builder, "_get_optimization_cflags", for_level):
        yield
