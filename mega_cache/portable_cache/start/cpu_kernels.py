"""Carry the C++ kernels of a CPU graph inside the bundle, so that a load calls no g++.

torch saves the sources of a CPU graph's kernels, never the shared objects, so a plain load compiles
each one. Here they are one more kind of entry in the same blob, behind one that says what they were
built for.
"""

import functools
import hashlib
import inspect
import sysconfig
from pathlib import Path

import torch

from common.errors import ArtifactMismatchError
from common.machine import cpu_features
from portable_cache import torch_private

KIND = "kernel_files"
BUILT_FOR = "built_for"
STACK = f"torch {torch.__version__} for {sysconfig.get_config_var('SOABI')}"

recorded: dict[str, Path] = {}  # digest -> shared object that this process has loaded
prebuilt: dict[str, Path] = {}  # digest -> shared object that came with a bundle


@torch_private.register_artifact
class KernelFile(torch_private.CacheArtifact):
    """One shared object, its key "digest/folder/file"; or, first of all, BUILT_FOR."""

    def populate_cache(self) -> None:
        if self.key == BUILT_FOR:
            check_runs_here(self.content)
            record()
        else:
            digest, _, name = self.key.partition("/")
            prebuilt[digest] = Path(torch_private.cache_dir()).resolve() / name
            # no reader ever sees half a file, nor a mapped one change
            torch_private.write_atomic(str(prebuilt[digest]), self.content, make_dirs=True)

    @staticmethod
    def type() -> str:
        return KIND


def built_for() -> bytes:
    """Return what this process's kernels need of another one's: its stack and its processor."""
    return f"{STACK}\n{' '.join(sorted(cpu_features()))}".encode()


def check_runs_here(built_for: bytes) -> None:
    """Raise ArtifactMismatchError unless this process can run kernels that were built so."""
    stack, _, features = built_for.decode(errors="replace").partition("\n")
    if stack != STACK:
        raise ArtifactMismatchError(f"C++ kernels built with {stack!r}, this is {STACK!r}")
    check_processor(features.split())


def check_processor(features: list[str]) -> None:
    """Raise ArtifactMismatchError unless this processor has all those features."""
    if missing := sorted(set(features) - cpu_features()):
        raise ArtifactMismatchError(
            f"C++ code built for a processor with {', '.join(missing)}, which this one lacks: "
            "rebuild on this machine"
        )


@functools.cache
def record() -> None:
    """From now on remember each C++ kernel that is loaded, and answer with prebuilt ones.

    Wraps the one door through which inductor's generated code gets its CPU kernels. It returns a
    function that returns the kernel.
    """
    with torch_private.losing("g++ compiles the C++ kernels of a traced graph at each load"):
        # bound to its class, which is the base of others
        stock = torch_private.load_cpp_kernel.__func__
        load_library = torch_private.load_cpp_library.__func__
        signature = inspect.signature(stock)

        def load_pybinding_async(cls, *args, **kwargs):
            call = signature.bind(cls, *args, **kwargs)
            call.apply_defaults()
            # The source's own name: torch's hashes the compiler's command line, and to get that it
            # probes the instruction sets and runs g++. BUILT_FOR guards what is left out.
            source = {k: v for k, v in call.arguments.items() if k not in ("cls", "submit_fn")}
            text = repr((cls.__name__, sorted(source.items())))
            digest = hashlib.sha256(text.encode()).hexdigest()
            get_kernel = None if digest in prebuilt else stock(cls, *args, **kwargs)

            def load():
                if get_kernel is None:
                    path = prebuilt[digest]
                    # The key only names the module; torch uses the file's stem too.
                    module = load_library(cls, str(path), path.name.partition(".")[0])
                    kernel = getattr(module, cls.entry_function)
                else:
                    kernel = get_kernel()
                recorded[digest] = Path(kernel.__self__.__file__)  # a builtin's self is its module
                return kernel

            return load

        torch_private.replace("load_cpp_kernel", classmethod(load_pybinding_async))
