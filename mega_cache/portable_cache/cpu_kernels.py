"""Carry the C++ kernels of a CPU graph inside the bundle, so that a load calls no g++.

torch (2.9 to 2.13) saves the sources of a CPU graph's kernels, never the shared objects, so a plain
load compiles each one, after seconds of instruction-set probing. Here they are one more kind of
entry in the same blob, behind one that says what they were built for.
"""

import functools
import hashlib
import inspect
import re
import sysconfig
from pathlib import Path

import torch

# Private, the documented extension point of the mega-cache; the same names on 2.9 to 2.13.
from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager

from common.errors import ArtifactMismatchError

KIND = "kernel_files"
BUILT_FOR = "built_for"
STACK = f"torch {torch.__version__} for {sysconfig.get_config_var('SOABI')}"
# a digest of the source, and torch's name: a hash, two of whose letters are the folder
KEY = re.compile(rf"{BUILT_FOR}|[0-9a-f]{{64}}/[a-z2-7]{{2}}/c[a-z2-7]{{51}}\.main\.so")
# What g++ -march=native may use (inductor passes it); other words of /proc/cpuinfo don't matter.
CODE_FEATURES = re.compile(
    r"sse|ssse|avx|amx|fma|f16c|bmi|abm|lzcnt|popcnt|movbe|adx|gfni|vaes|aes|sha|v?pclmul|cx16|xop"
)

_recorded: dict[str, Path] = {}  # digest -> shared object that this process has loaded
prebuilt: dict[str, Path] = {}  # digest -> shared object that came with a bundle


@CacheArtifactFactory.register
class KernelFile(CacheArtifact):
    """One shared object, its key "digest/folder/file"; or, first of all, BUILT_FOR."""

    def populate_cache(self) -> None:
        # Private: the only way to ask for the default folder; the same modules on 2.9 to 2.13.
        from torch._inductor.codecache import write_atomic
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        if self.key == BUILT_FOR:
            check_runs_here(self.content)
            record()
        else:
            digest, _, name = self.key.partition("/")
            prebuilt[digest] = Path(cache_dir()).resolve() / name
            # no reader ever sees half a file, nor a mapped one change
            write_atomic(str(prebuilt[digest]), self.content, make_dirs=True)

    @staticmethod
    def type() -> str:
        return KIND


def save_kernels() -> None:
    """Put the kernels that this process loaded into the mega-cache that is saved next."""
    if _recorded:
        # first: it refuses before anything is written
        built_for = f"{STACK}\n{' '.join(sorted(cpu_features()))}".encode()
        CacheArtifactManager.record_artifact(KIND, BUILT_FOR, built_for)
    for digest, path in _recorded.items():
        key = "/".join((digest, *path.parts[-2:]))
        CacheArtifactManager.record_artifact(KIND, key, path.read_bytes())


def check_runs_here(built_for: bytes) -> None:
    """Raise ArtifactMismatchError unless this process can run kernels that were built so."""
    stack, _, features = built_for.decode(errors="replace").partition("\n")
    if stack != STACK:
        raise ArtifactMismatchError(f"C++ kernels built with {stack!r}, this is {STACK!r}")
    if missing := sorted(set(features.split()) - cpu_features()):
        raise ArtifactMismatchError(
            f"C++ kernels built for a processor with {', '.join(missing)}, which this one lacks: "
            "rebuild on this machine"
        )


def cpu_features() -> set[str]:
    """Return the instruction-set extensions of this processor; empty where unknown."""
    found = re.search(r"^(flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.M)
    words = found[2].split() if found else ()
    # aarch64 lists nothing but extensions
    return {word for word in words if found[1] == "Features" or CODE_FEATURES.match(word)}


@functools.cache
def record() -> None:
    """From now on remember each C++ kernel that is loaded, and answer with prebuilt ones.

    Wraps the one door through which inductor's generated code gets its CPU kernels, the
    private `CppPythonBindingsCodeCache.load_pybinding_async` (2.9 to 2.13; on 2.13 with two
    more parameters). It returns a function that returns the kernel.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Cache

    stock = Cache.load_pybinding_async.__func__
    signature = inspect.signature(stock)

    def load_pybinding_async(cls, *args, **kwargs):
        call = signature.bind(cls, *args, **kwargs)
        call.apply_defaults()
        # The source's own name: torch's hashes the compiler's command line, and to get that it
        # probes the instruction sets and runs `g++ --version`. BUILT_FOR guards what is left out.
        source = {k: v for k, v in call.arguments.items() if k not in ("cls", "submit_fn")}
        digest = hashlib.sha256(repr((cls.__name__, sorted(source.items()))).encode()).hexdigest()
        get_kernel = None if digest in prebuilt else stock(cls, *args, **kwargs)

        def load():
            if get_kernel is None:
                path = prebuilt[digest]
                # The key only names the module; torch uses the file's stem too.
                module = cls._load_library(str(path), path.name.partition(".")[0])
                kernel = getattr(module, cls.entry_function)
            else:
                kernel = get_kernel()
            # a builtin's self is its module
            _recorded[digest] = Path(kernel.__self__.__file__)
            return kernel

        return load

    Cache.load_pybinding_async = classmethod(load_pybinding_async)
