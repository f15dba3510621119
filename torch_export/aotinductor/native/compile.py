"""The native libraries that a package of a KV cache carries, compiled where it is built."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from common.errors import EnvironmentProblemError

STEPS, RUNTIME = "libllama_steps.so", "libllama_runtime.so"
_SOURCES = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")
_SOURCES_OF = {
    "cpu": ("runtime.cpp", "handles.cpp", "products.cpp", "attention.cpp"),
    "cuda": ("runtime_cuda.cpp", "handles.cpp"),
}


def compile_native(folder: Path, device: str) -> dict[str, Path]:
    """Compile both libraries for "cpu" or "cuda" into `folder`; return their paths by name.

    CXX names another compiler than g++. Raises EnvironmentProblemError with the compiler's first
    error.
    """
    runtime = folder / RUNTIME
    _compile(_SOURCES_OF[device], runtime)
    return {STEPS: compile_steps(folder), RUNTIME: runtime}


def compile_steps(folder: Path) -> Path:
    """Compile what every start calls, a step's calls first of all, into `folder`."""
    library = folder / STEPS
    _compile(("steps.cpp", "inputs.cpp"), library)
    return library


def _compile(sources: Sequence[str], library: Path) -> None:
    wanted = os.environ.get("CXX", "g++")
    compiler = shutil.which(wanted)
    if compiler is None:
        raise EnvironmentProblemError(
            f"no C++ compiler: {wanted} is not on PATH; install g++ or name another in CXX"
        )
    # the level that packages are built for, whatever the machine that builds has beyond it
    level = ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []
    # the name that programs ask for, under which the loader knows a library opened before them
    flags = [*_FLAGS, *level, f"-Wl,-soname,{library.name}"]
    command = [compiler, *flags, "-o", str(library), *(str(_SOURCES / name) for name in sources)]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode != 0:
        lines = ended.stderr.splitlines() or ["no message"]
        error = next((line for line in lines if "error" in line), lines[0])
        raise EnvironmentProblemError(f"{wanted} cannot compile {library.name}: {error}")
