"""Carry the C++ kernels of a CPU graph inside the bundle, so that a load calls no g++.

torch (2.9 to 2.13) saves the sources of a CPU graph's kernels, never the shared objects, so a plain
load compiles each one, after seconds of instruction-set probing. Here they are one more kind of
entry in the same blob, with an index of what they were built for:

    record()            before the first compile
    entries()           at save: what goes into the blob
    KernelFile          what a load makes of an entry; registered when this module is imported
"""

import functools
import hashlib
import inspect
import json
import os
import platform
import re
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Private, the documented extension point of the mega-cache; the same names on 2.9 to 2.13.
from torch.compiler._cache import CacheArtifact, CacheArtifactFactory

from common.errors import ArtifactDamagedError, ArtifactMismatchError

KIND = "kernel_files"
INDEX = "index.json"
SCHEMA = 2

# torch names a C++ kernel by a hash: two of its letters are the folder
FILE_NAME = re.compile(r"[a-z2-7]{2}/c[a-z2-7]{51}\.main\.so")
# What g++ -march=native may use (inductor passes it); other words of /proc/cpuinfo don't matter.
CODE_FEATURES = re.compile(
    r"sse|ssse|avx|amx|fma|f16c|bmi|abm|lzcnt|popcnt|movbe|adx|gfni|vaes|aes|sha|v?pclmul|cx16|xop"
)

_recorded: dict[str, Path] = {}  # digest -> shared object that this process has loaded
_prebuilt: dict[str, Path] = {}  # digest -> shared object that came with a bundle
_restored: set[Path] = set()


@dataclass(frozen=True)
class KernelIndex:
    """What the kernels of a bundle were built for, and which source each one answers."""

    schema: int
    torch: str
    python_abi: str
    machine: str
    cpu_features: tuple[str, ...]
    vector_isa: str  # for messages: cpu_features decides
    kernels: dict[str, str]  # digest of the kernel's source -> name below the cache folder


class KernelFile(CacheArtifact):
    """One shared object, its key "folder/file"; or the index, its key INDEX."""

    def populate_cache(self) -> None:
        if self.key == INDEX:
            _use_index(parse_index(self.content))
            return
        path = _path_of(self.key)
        write_whole(path, self.content)
        _restored.add(path)

    @staticmethod
    def type() -> str:
        return KIND


# The registry lives as long as the process and refuses a second class of one name, while tests
# import this file from both folders. The private dict is the only way to ask (2.9 to 2.13).
if KIND not in CacheArtifactFactory._artifact_types:
    CacheArtifactFactory.register(KernelFile)


def restored_files() -> frozenset[Path]:
    """Return the kernels that came with a bundle: they don't count as compiled."""
    return frozenset(_restored)


def _cache_root() -> Path:
    # Private: the only way to ask for the default folder; same module on 2.9 to 2.13.
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()).resolve()


def _path_of(name: str) -> Path:
    """Return the file that entry `name` stands for; raises ArtifactDamagedError for odd names."""
    if not FILE_NAME.fullmatch(name):
        raise ArtifactDamagedError(f"entry {name!r} is not a kernel file: not written")
    path = _cache_root() / name
    # A folder of the cache may be a link that leads out of it.
    if not path.parent.resolve().is_relative_to(_cache_root()):
        raise ArtifactDamagedError(f"entry {name!r} leads out of {_cache_root()}: not written")
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` so that no reader ever sees half a file, nor a mapped one change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".bundle-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(temporary, path)


# ---- what a kernel runs on ---------------------------------------------------------------


@functools.cache
def cpu_features() -> tuple[str, ...]:
    """Return the instruction-set extensions of this processor, sorted; empty where unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ()
    for line in lines:
        label, _, words = line.partition(":")
        if label.strip() == "flags":
            return tuple(sorted(w for w in set(words.split()) if CODE_FEATURES.match(w)))
        if label.strip() == "Features":  # aarch64: every word is an extension
            return tuple(sorted(set(words.split())))
    return ()


def parse_index(content: bytes) -> KernelIndex:
    try:
        values = json.loads(content)
        values["cpu_features"] = tuple(values["cpu_features"])
        index = KernelIndex(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactDamagedError(f"the bundle's kernel index can't be read: {error}") from error
    if index.schema != SCHEMA:
        raise ArtifactMismatchError(
            f"kernel index of schema {index.schema}, expected {SCHEMA}: rebuild"
        )
    return index


def check_entries(found: dict[str, bytes]) -> None:
    """Raise unless every entry has a name that a build writes, and its kernels run here."""
    if not found:
        return
    for name in found.keys() - {INDEX}:
        _path_of(name)
    if INDEX not in found:
        raise ArtifactDamagedError("the blob holds kernel files without their index: rebuild")
    index = parse_index(found[INDEX])
    if absent := set(index.kernels.values()) - found.keys():
        raise ArtifactDamagedError(f"the kernel index names {len(absent)} absent files: rebuild")
    _check_index(index)


def _check_index(index: KernelIndex) -> None:
    """Raise ArtifactMismatchError unless this process can run the kernels of the bundle."""
    here = (torch.__version__, sysconfig.get_config_var("SOABI"), platform.machine())
    for label, built, found in zip(
        ("torch", "Python ABI", "machine"),
        (index.torch, index.python_abi, index.machine),
        here,
        strict=True,
    ):
        if built != found:
            raise ArtifactMismatchError(f"kernels built for {label} {built}, this is {found}")
    if missing := sorted(set(index.cpu_features) - set(cpu_features())):
        raise ArtifactMismatchError(
            f"C++ kernels built for a processor with {', '.join(missing)} "
            f"({index.vector_isa}), which this one lacks: rebuild on this machine"
        )


def _use_index(index: KernelIndex) -> None:
    _check_index(index)
    _prebuilt.update({digest: _path_of(name) for digest, name in index.kernels.items()})
    record()


# ---- the one door to a kernel ------------------------------------------------------------


@functools.cache
def record() -> None:
    """From now on remember each C++ kernel that is loaded, and answer with prebuilt ones.

    Wraps the one door through which inductor's generated code gets its CPU kernels, the
    private `CppPythonBindingsCodeCache.load_pybinding_async` (2.9 to 2.13; on 2.13 with two
    more parameters). It returns a function that returns the kernel. Calling twice is harmless.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Cache

    stock = Cache.load_pybinding_async.__func__
    signature = inspect.signature(stock)

    def load_pybinding_async(cls, *args, **kwargs):
        digest = _kernel_digest(cls.__name__, signature.bind(cls, *args, **kwargs))
        if (path := _prebuilt.get(digest)) is not None and path.is_file():
            return functools.partial(_load_prebuilt, cls, digest, path)
        return functools.partial(_load_and_record, stock(cls, *args, **kwargs), digest)

    Cache.load_pybinding_async = classmethod(load_pybinding_async)


def _kernel_digest(owner: str, call: inspect.BoundArguments) -> str:
    """Return a name for a kernel's source that no folder, compiler or flag goes into.

    torch's own name hashes the compiler's command line, and to get that it probes the
    instruction sets and runs `g++ --version`. The index guards what the name leaves out.
    """
    call.apply_defaults()
    source = {k: v for k, v in call.arguments.items() if k not in ("cls", "submit_fn")}
    return hashlib.sha256(repr((owner, sorted(source.items()))).encode()).hexdigest()


def _load_prebuilt(cls, digest: str, path: Path):
    _recorded[digest] = path
    # The key only names the module; torch uses the file's stem too.
    module = cls._load_library(str(path), path.name.partition(".")[0])
    return getattr(module, cls.entry_function)


def _load_and_record(get_kernel, digest: str):
    kernel = get_kernel()
    _recorded[digest] = Path(kernel.__self__.__file__).resolve()  # a builtin's self: its module
    return kernel


def entries() -> list[KernelFile]:
    """Return the kernels that this process loaded, the index first: it refuses before a write."""
    if not _recorded:
        return []
    # Private, 2.9 to 2.13. Only at build, where inductor has already paid for the probing.
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    root = _cache_root()
    kernels = {digest: path.relative_to(root).as_posix() for digest, path in _recorded.items()}
    index = KernelIndex(
        schema=SCHEMA,
        torch=torch.__version__,
        python_abi=sysconfig.get_config_var("SOABI"),
        machine=platform.machine(),
        cpu_features=cpu_features(),
        vector_isa=str(pick_vec_isa()),
        kernels=kernels,
    )
    files = [KernelFile(name, (root / name).read_bytes()) for name in sorted({*kernels.values()})]
    return [KernelFile(INDEX, json.dumps(asdict(index), sort_keys=True).encode()), *files]
