"""Host code of a CUDA package starts on other processors than the one that built it."""

import platform

import pytest
import torch

from aotinductor.build.compiler import portable_host_code
from aotinductor.recipe import COMMON_LEVEL, machine_of
from common import machine

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
here = torch.backends.cpu.get_cpu_capability()
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or here not in ("AVX2", "AVX512"), reason="no x86-64-v3 here"
)


def flags_of_inductor() -> str:
    from torch._inductor.cpp_builder import CppTorchDeviceOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = CppTorchDeviceOptions(vec_isa=pick_vec_isa(), device_type="cpu", aot_mode=True)
    return " ".join([*options.get_cflags(), *options.get_passthrough_args()])


def test_cuda_package_is_compiled_for_the_common_level():
    with portable_host_code(CUDA):
        flags = flags_of_inductor()
    assert f"march={COMMON_LEVEL}" in flags
    assert "native" not in flags and "avx512" not in flags


def test_cpu_package_stays_this_processors_own():
    with portable_host_code(CPU):
        assert "march=native" in flags_of_inductor()


def test_setting_ends_with_the_build():
    before = flags_of_inductor()
    with portable_host_code(CUDA):
        pass
    assert flags_of_inductor() == before


def test_recipe_names_the_level_of_what_is_compiled():
    assert machine_of("cuda") == {
        "device": "cuda", "cpu_capability": COMMON_LEVEL, "cpu_features": None,
    }  # fmt: skip
    assert machine_of("cpu")["cpu_capability"] == here
    assert set(machine_of("cpu")["cpu_features"]) == machine.cpu_features() > {"avx2", "fma"}
