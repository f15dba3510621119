"""The machine and the stack, told without importing torch: processor, GPU, versions."""

import functools
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import cuda

# what generated code may use of a processor; other words of /proc/cpuinfo do not matter
_CODE_FEATURES = re.compile(
    r"sse|ssse|avx|amx|fma|f16c|bmi|abm|lzcnt|popcnt|movbe|adx|gfni|vaes|aes|sha|v?pclmul|cx16|xop"
)
COMMON_LEVEL = "x86-64-v3"  # AVX2 and FMA: Intel since 2013, AMD since 2015
LEVEL_FEATURES = frozenset({"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"})
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"}
# Turns of a loop in which a thread of OpenMP waits for the others before it sleeps. libgomp's own
# 300,000 make a model's decode 30 times slower beside other work, and hardly faster alone.
SPIN_COUNT = 20000


def spin_less() -> None:
    """Have OpenMP's threads sleep soon; before the library is loaded. A user's choice stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def environment() -> dict[str, Any]:
    """Return the machine and the stack, None where unknown: the GPU once this process uses it."""
    return gpu_environment() | _stack()


_uses_gpu = False


def use_gpu() -> None:
    """Say that this process computes on the GPU: it is part of its environment from now on."""
    global _uses_gpu
    _uses_gpu = True


def gpu_environment() -> dict[str, Any]:
    """Return name, compute capability, driver and CUDA of the GPU in use, each None without one."""
    if not _uses_gpu:
        return dict.fromkeys(("gpu", "compute_capability", "driver", "cuda"))
    # the kernel module says it at once; nvidia-smi takes a good part of a second, inside a start
    driver = _found_in("/proc/driver/nvidia/version", r"\s(\d+\.[\d.]+)")
    torch_cuda = _found_in(f"{package_folder('torch')}/version.py", r"^cuda\b.*= '(\d+\.\d+)'")
    gpu = cuda.describe()
    return {
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
        "driver": driver[0] if driver else None,
        "cuda": torch_cuda[0] if torch_cuda else cuda.runtime_version(),
    }


def package_version(name: str) -> str | None:
    """Return an installed package's version without importing it, or None."""
    folder = package_folder(name)
    if folder is None:
        return None
    # as installers write it beside the package; asking importlib.metadata takes 25 ms
    beside = [path.name for path in folder.parent.glob(f"{name}-*.dist-info")]
    if len(beside) == 1:
        return beside[0].removeprefix(f"{name}-").removesuffix(".dist-info")
    from importlib.metadata import PackageNotFoundError, version

    with suppress(PackageNotFoundError):  # a folder of this name that nobody installed
        return version(name)
    return None


@functools.cache
def package_folder(name: str) -> Path | None:
    """Return where a package is installed, without importing it; None without one."""
    import importlib.util

    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def cpu_features() -> set[str]:
    """Return the instruction-set extensions of this processor; empty where unknown."""
    lines = _found_in("/proc/cpuinfo", r"^((?:flags|Features)\s*:.*)")
    words = lines[0].partition(":")[2].split() if lines else ()
    # aarch64 lists nothing but extensions
    listed = bool(lines) and lines[0].startswith("Features")
    return {word for word in words if listed or _CODE_FEATURES.match(word)}


def host_code_is_portable(device: str) -> bool:
    """Return whether C++ of a program for `device` is compiled for COMMON_LEVEL here.

    Around CUDA kernels it only launches them: made for exactly this processor, it would die of
    SIGILL on another one for nothing. On a CPU it computes.
    """
    x86 = os.uname().machine == "x86_64"
    return device == "cuda" and x86 and cpu_features() >= LEVEL_FEATURES


def cpu_capability() -> str:
    """Return how wide this processor's vectors are, in torch's words: AVX512, AVX2 or DEFAULT."""
    features = cpu_features()
    if features >= _AVX512:
        return "AVX512"
    return "AVX2" if features >= {"avx2", "fma"} else "DEFAULT"


@functools.cache  # asks git, and reads metadata of packages: once a process
def _stack() -> dict[str, Any]:
    # imported here: a start tells what it ran on when it has answered
    import platform
    import subprocess

    # of the repository that this file is in, marked when it has changes
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    quiet = {"stderr": subprocess.DEVNULL, "cwd": Path(__file__).parent, "timeout": 10}
    commit = None
    with suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.check_output(describe, text=True, **quiet).strip()
    cpus = _found_in("/proc/cpuinfo", r"^model name\s*: (.*)")
    return {
        **{name: package_version(name) for name in ("torch", "triton", "transformers")},
        "python": platform.python_version(),
        # not platform.platform(): the name of a kernel build tells of the machine's owner
        "platform": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "cpu": f"{cpus[0]} x{len(cpus)}" if cpus else platform.processor() or None,
        "commit": commit,
    }


def _found_in(path: str, pattern: str) -> list[str]:
    file = Path(path)
    return re.findall(pattern, file.read_text(), re.MULTILINE) if file.exists() else []
