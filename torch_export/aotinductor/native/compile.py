"""The native libraries that a package of a KV cache carries, compiled where it is built."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from common.errors import EnvironmentProblemError, writing

STEPS, RUNTIME, OPENMP = "libllama_steps.so", "libllama_runtime.so", "libgomp.so.1"
_FOLDER = Path(__file__).parent
_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi",
    "-Wl,-Bsymbolic",  # a library calls its own functions, also where libtorch's come first
)  # fmt: skip
# the driver and CUDA's runtime, which are opened beside the runtime library
_OF_CUDA = re.compile(r"cu(da)?[A-Z]")
RUNTIME_SOURCES = {
    "cpu": ("runtime.cpp", "handles.cpp", "products.cpp", "attention.cpp"),
    "cuda": ("runtime_cuda.cpp", "handles.cpp"),
}


def compile_native(folder: Path, device: str) -> dict[str, Path]:
    """Compile both libraries for "cpu" or "cuda" into `folder`; return the files there by name.

    Beside them a copy of the compiler's libgomp, which programs need and slim images lack (its
    licence has an exception for what is compiled with it). libstdc++ doesn't travel: the wheels of
    tokenizers and numpy need it too. CXX names another compiler than g++, which
    `prepare_toolchain` has found. Raises EnvironmentProblemError with its first error.
    """
    runtime, openmp = folder / RUNTIME, folder / OPENMP
    _compile(RUNTIME_SOURCES[device], runtime)
    question = [_compiler(), f"-print-file-name={OPENMP}"]
    told = subprocess.run(question, capture_output=True, text=True, check=True).stdout.strip()
    with writing(openmp):
        shutil.copy(told, openmp)
    return {STEPS: compile_steps(folder), RUNTIME: runtime, OPENMP: openmp}


def compile_steps(folder: Path) -> Path:
    """Compile what every start calls, a step's calls first of all, into `folder`."""
    library = folder / STEPS
    _compile(["steps.cpp", "inputs.cpp"], library)
    return library


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _compile(sources: Sequence[str], library: Path) -> None:
    # the level that packages are built for, whatever the building machine has beyond it
    level = ["-march=x86-64-v3"] if platform.machine() == "x86_64" else []
    # By this name the loader knows a library that was opened before the programs that need it. Of
    # its sources: two packages in one process have each their own, unless it is the same.
    code = b"".join(path.read_bytes() for path in sorted(_FOLDER.glob("*.[chi]*")))
    digest = hashlib.sha256(code).hexdigest()[:12]
    name = f"-Wl,-soname,{library.stem}.{digest}.so"
    command = [_compiler(), *_FLAGS, *level, name, "-s", "-o", str(library.resolve()), *sources]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=_FOLDER)
    if ended.returncode != 0:
        told = re.search(r".*error.*", ended.stderr)
        text = told[0].strip() if told else "no message"
        raise EnvironmentProblemError(f"{command[0]} cannot compile {library.name}: {text}")


# --- compiled programs beside them --------------------------------------------------------------


def missing_symbols(program: Path, runtime: Path) -> list[str]:
    """Return what a program calls and the runtime library hasn't: with any it needs libtorch.

    For a program that isn't linked with libtorch: what it takes from the C and C++ libraries and
    from libgomp carries a version, and functions of torch's C interface have none.
    """
    offered = {name for kind, name in _dynamic_symbols(runtime) if kind not in "Uw"}
    # U: undefined, and not weak
    called = {name for kind, name in _dynamic_symbols(program) if kind == "U" and "@" not in name}
    return sorted(name for name in called - offered if not _OF_CUDA.match(name))


def _dynamic_symbols(library: Path) -> list[tuple[str, str]]:
    """Return kind and name of each symbol, as `nm` writes them."""
    # of binutils, which a C++ compiler cannot do without
    command = ["nm", "--dynamic", str(library)]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [(fields[-2], fields[-1]) for fields in map(str.split, table.splitlines())]


def stripped(library: Path, folder: Path) -> Path:
    """Return a copy in a new folder, without what only a debugger reads.

    The newest torch compiles that in, three quarters of a library.
    """
    folder.mkdir()
    copy = folder / library.name
    subprocess.run(["strip", "--strip-unneeded", "-o", str(copy), str(library)], check=True)
    return copy
