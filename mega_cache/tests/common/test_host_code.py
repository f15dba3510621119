"""Host code of a CUDA program starts on other processors than the one that built it."""

import platform

import pytest
import torch

from common.compiler.host_code import portable_host_code
from common.machine import COMMON_LEVEL, host_code_is_portable

here = torch.backends.cpu.get_cpu_capability()
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or here not in ("AVX2", "AVX512"), reason="no x86-64-v3 here"
)


def flags_of_inductor() -> str:
    from torch._inductor.cpp_builder import CppTorchDeviceOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = CppTorchDeviceOptions(vec_isa=pick_vec_isa(), device_type="cpu", aot_mode=True)
    return " ".join([*options.get_cflags(), *options.get_passthrough_args()])


def test_a_cuda_program_is_compiled_for_the_common_level():
    with portable_host_code("cuda"):
        flags = flags_of_inductor()
    assert f"march={COMMON_LEVEL}" in flags
    assert "native" not in flags and "avx512" not in flags


def test_a_cpu_program_stays_this_processors_own():
    with portable_host_code("cpu"):
        assert "march=native" in flags_of_inductor()


def test_setting_ends_with_the_build():
    before = flags_of_inductor()
    with portable_host_code("cuda"):
        pass
    assert flags_of_inductor() == before


def test_this_processor_has_the_level_that_torch_finds_vectors_for():
    assert host_code_is_portable("cuda")
