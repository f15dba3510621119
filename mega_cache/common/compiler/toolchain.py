"""Whether this machine can compile what a build asks of it, told before the build begins to work.

Inductor and Triton call C and C++ compilers minutes into a build, and what those miss ends there in
an opaque compiler error. Here the same headers and libraries are compiled once, in a second.

On CUDA the headers come from the wheels that torch brings, so no CUDA toolkit is needed: they are
put together in one folder, which takes the place of CUDA_HOME in this process.
"""

import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

from common import cuda
from common.cli import Console
from common.errors import EnvironmentProblemError

# variable in which a user may name a compiler -> what torch or Triton take otherwise: the first one
# that is there; the first is also its package for apt-get
_COMPILERS = {"CC": ("gcc", "clang"), "CXX": ("g++",)}
_CUDA_HEADERS = ("cuda.h", "cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h")
_MISSING_HEADER = re.compile(r"fatal error: '?([\w./+-]+)'?(?:: No such file| file not found)")


def prepare_toolchain(device: str, host_code: bool, console: Console) -> None:
    """Make what a build compiles with findable, or raise EnvironmentProblemError with the cure.

    `host_code`: C++ around the kernels is compiled too, as AOTInductor does. To be called inside
    `private_compiler_caches`, which removes what is put together here. Imports the compiler.
    """
    python = ["-I", sysconfig.get_path("include")]
    if device == "cpu":
        check_compiles("CXX", ("Python.h", "vector", "omp.h"), [*python, "-fopenmp"])
    else:
        home = assemble_cuda_home(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        driver = ["-L", str(home / "lib64"), "-lcuda"]
        check_compiles("CC", ("Python.h",), [*python, *driver])  # Triton's launcher
        if host_code:
            check_compiles("CXX", _CUDA_HEADERS, ["-I", str(home / "include"), *driver])
        # where Triton looks, and torch's extension builder for Inductor
        os.environ.setdefault("TRITON_LIBCUDA_PATH", str(home / "lib64"))
        os.environ["CUDA_HOME"] = str(home)
        if builder := sys.modules.get("torch.utils.cpp_extension"):
            builder.CUDA_HOME = str(home)  # it reads the environment once, on import
    if (host_code or device == "cpu") and shutil.which("openssl") is None:
        raise EnvironmentProblemError(
            "openssl is not on PATH, and torch's compiler takes the digests of C++ headers with "
            "it: install it (apt-get install openssl)"
        )
    _show_tuning_as_progress(console)


def check_compiles(variable: str, headers: Sequence[str], flags: Sequence[str]) -> None:
    """Compile and link a file that includes `headers`; raise with the cure when that fails."""
    language, suffix = ("C", ".c") if variable == "CC" else ("C++", ".cpp")
    named = os.environ.get(variable)
    wanted = (named,) if named else _COMPILERS[variable]
    command = next(filter(None, map(shutil.which, wanted)), None)
    if command is None:
        raise EnvironmentProblemError(
            f"no {language} compiler: {' or '.join(wanted)} is not on PATH; install one "
            f"(apt-get install {_COMPILERS[variable][0]}) or name it in {variable}"
        )
    with tempfile.TemporaryDirectory(prefix="llama-toolchain-") as folder:
        source = Path(folder, f"probe{suffix}")
        source.write_text("".join(f"#include <{header}>\n" for header in headers))
        ended = subprocess.run(
            [command, str(source), "-shared", "-fPIC", "-o", f"{folder}/probe.so", *flags],
            capture_output=True,
            text=True,
            env=os.environ | {"LC_ALL": "C"},  # the answer is read below
        )
    if ended.returncode == 0:
        if variable == "CXX":
            _require_shared_libstdcxx(command)
        return
    if missing := _MISSING_HEADER.search(ended.stderr):
        reason = f"{missing[1]} is missing, which this build compiles with: {_cure(missing[1])}"
    else:
        told = re.search(r".*(?:error|cannot find).*", ended.stderr)
        text = told[0].strip() if told else "no message"
        reason = f"{command} cannot compile for this build: {text}"
    raise EnvironmentProblemError(reason)


def _require_shared_libstdcxx(command: str) -> None:
    """Raise unless what is compiled shares the C++ library with the rest of its process.

    Where the linker finds the archive alone, each compiled program holds a copy of the library. It
    crashes when it is opened beside another one (seen on a machine with a GPU: SIGSEGV, bad_cast).
    """

    def place(file: str) -> Path:
        question = [command, f"-print-file-name={file}"]
        return Path(subprocess.run(question, capture_output=True, text=True).stdout.strip())

    if place("libstdc++.so").is_absolute():
        return
    archive = place("libstdc++.a")
    if archive.is_absolute():
        shared = cuda.loaded_library("libstdc++.so.6") or "/path/to/libstdc++.so.6"
        link = archive.parent.resolve() / "libstdc++.so"
        raise EnvironmentProblemError(
            f"{command} finds libstdc++.a and no libstdc++.so: what it compiles would hold a copy "
            f"of that library, and crash; name another in CXX, or ln -s {shared} {link}"
        )


def _cure(header: str) -> str:
    if header == "Python.h":
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"install the headers of {sys.executable} (apt-get install python{version}-dev), or "
            "use a Python that brings them (uv, conda, pyenv)"
        )
    if header in ("vector", "omp.h"):
        return "install the compiler's own libraries (apt-get install g++)"
    import torch

    # the wheel that has it, for this torch's CUDA
    wheel = "cccl" if header.startswith("nv/") else "runtime"
    major, minor = torch.version.cuda.split(".")[:2]
    suffix = f"-cu{major}" if major == "12" else ""  # from CUDA 13 on the names have none
    return f"{sys.executable} -m pip install 'nvidia-cuda-{wheel}{suffix}=={major}.{minor}.*'"


def assemble_cuda_home(parent: Path) -> Path:
    """Return a new folder with `include` and `lib64`: links to headers and driver found here.

    The wheels that torch brings come before a toolkit in the usual place, which may be of another
    CUDA version; a CUDA_HOME that the user set comes before both.
    """
    import torch

    parent.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="cuda-home-", dir=parent))
    (home / "include").mkdir()
    (home / "lib64").mkdir()
    packages = Path(torch.__file__).parent.parent
    set_by_user = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(set_by_user)] if set_by_user else []
    places += [*sorted(packages.glob("nvidia/*")), packages / "triton/backends/nvidia"]
    for place in (*places, Path("/usr/local/cuda")):
        # from CUDA 13 on some are in cccl
        for entry in (*place.glob("include/*"), *place.glob("include/cccl/*")):
            link = home / "include" / entry.name
            if not link.is_symlink():
                link.symlink_to(entry)
    # linkers look for the driver that this process uses by this name
    if driver := cuda.loaded_library("libcuda.so"):
        (home / "lib64/libcuda.so").symlink_to(driver)
    return home


def _show_tuning_as_progress(console: Console) -> None:
    """Have Inductor tell a line of each product it tuned, in place of its tables.

    The settings that turn the tables off are part of Inductor's cache key, and an artifact has to
    hit for a user who never heard of them; so the two functions that print are replaced.
    """
    from torch._inductor import select_algorithm  # private, the same names on 2.9 to 2.13

    def report(name, input_nodes, timings, elapse, *args, **kwargs) -> None:
        shapes = ", ".join("x".join(map(str, node.get_size())) for node in input_nodes)
        console.say(f"  tuned {name}({shapes}): {len(timings)} candidates in {elapse:.1f} s")

    select_algorithm.AlgorithmSelectorCache.log_results = staticmethod(report)
    select_algorithm._log_autotune_choices_stats = lambda *args: None
    # a candidate that does not fit this GPU is dropped, and no more than that
    logging.getLogger(select_algorithm.__name__).setLevel(logging.CRITICAL)


def quieten(device: str, console: Console) -> None:
    """Keep off stderr what the compiler says that is no news."""
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    if console.quiet:
        warnings.filterwarnings("ignore", module=r"(torch|triton)\.")
    if console.quiet or device != "cuda":  # a skipped CUDA graph is news where there is a GPU
        for name in ("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension"):
            logging.getLogger(name).setLevel(logging.ERROR)
