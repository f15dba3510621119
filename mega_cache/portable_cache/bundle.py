"""Save and load a mega-cache blob that needs no compiler at load time.

`torch.compiler.save_cache_artifacts()` stores compiled graphs, but not the C++ kernels of a CPU
graph (2.9 to 2.13), so a plain load still runs g++ for each one, after seconds of instruction-set
probing. Here the shared objects travel inside the same blob, as one more artifact kind:

    build:  record_kernels()            before the first compile
            saved = save_bundle()       after the warm-up; saved.blob is the `.bin`
    run:    loaded = load_bundle(blob)  raises DamagedBundle or ForeignBundle, else says what came

Importing this module registers the kind: from then on a plain
`torch.compiler.load_cache_artifacts(blob)` works on the same file. A blob without kernels (every
CUDA artifact, unless `triton_helpers=True`) needs no import of ours.
A blob is code (pickles and native code): whoever calls `load_bundle` has decided to trust it.
"""

import functools
import hashlib
import inspect
import json
import logging
import os
import platform
import re
import sysconfig
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  save_cache_artifacts fails without it (pytorch #154463)

# Private, the documented extension point of the mega-cache; the same names on 2.9 to 2.13.
from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager

from common.errors import EnvironmentProblemError

KIND = "kernel_files"
DECODE_STEP = "decode_step"
INDEX = "index.json"
SCHEMA = 1

# torch names a C++ kernel by a hash: two of its letters are the folder. Triton hashes the C
# source of its helper modules. Nothing else has a reason to be in a bundle.
FILE_NAMES = {
    "inductor": re.compile(r"[a-z2-7]{2}/c[a-z2-7]{51}\.main\.so"),
    "triton": re.compile(r"[A-Za-z0-9_-]{20,80}/(cuda_utils|__triton_launcher)[A-Za-z0-9_.-]*\.so"),
}
# Kinds that become a path below the cache folder through torch's own code, which checks nothing.
TORCH_KEYS = {
    "inductor": re.compile(r"f[a-z2-7]{51}"),
    "aot_autograd": re.compile(r"a[a-z2-7]{51}"),
    "autotune": re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_-][A-Za-z0-9_.-]*"),
}
# What g++ -march=native may use (inductor passes it); other words of /proc/cpuinfo don't matter.
CODE_FEATURES = re.compile(
    r"sse|ssse|avx|amx|fma|f16c|bmi|abm|lzcnt|popcnt|movbe|adx|gfni|vaes|aes|sha|v?pclmul|cx16|xop"
)


class BundleError(ValueError):
    """The blob can't be used; the message says what was found and what to do."""


class DamagedBundle(BundleError):
    """Not a bundle, cut short, empty, or with entries that no build writes."""


class ForeignBundle(BundleError):
    """A sound bundle, built for another processor, Python or torch."""


@dataclass(frozen=True)
class KernelIndex:
    """What the native files of a bundle were built for, and which source each one answers."""

    schema: int
    torch: str
    python_abi: str
    machine: str
    cpu_features: tuple[str, ...]
    vector_isa: str | None  # for messages: cpu_features decides
    kernels: dict[str, str]  # digest of the kernel's source -> name below the cache folder


@dataclass(frozen=True)
class SavedBundle:
    blob: bytes
    entries: dict[str, int]  # number of entries by kind
    graph_keys: dict[str, tuple[str, ...]]  # by kind: what a run has to hit
    kernel_files: int
    vector_isa: str | None


@dataclass(frozen=True)
class LoadedBundle:
    entries: dict[str, int]
    graph_keys: dict[str, tuple[str, ...]]
    kernel_files: int
    vector_isa: str | None
    decode_step: bytes | None = field(repr=False)
    restored: frozenset[Path] = field(repr=False)  # so that they don't count as compiled


def check_caches_are_on() -> None:
    """Raise EnvironmentProblemError where torch is told to keep and to look up no graphs."""
    # Private module, the names on 2.9 to 2.13; the variables set them.
    from torch._inductor import config

    if config.force_disable_caches or not config.fx_graph_cache:
        variable = "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1"
        if not config.force_disable_caches:
            variable = "TORCHINDUCTOR_FX_GRAPH_CACHE=0"
        raise EnvironmentProblemError(
            f"torch's compiler caches are off ({variable}), and a portable cache is made of their "
            "entries: unset that variable"
        )


# ---- where the files live ----------------------------------------------------------------


def cache_roots() -> dict[str, Path]:
    """Return the folders that the entries' first word stands for, made if missing."""
    # Private: the only way to ask for the default folder; same module on 2.9 to 2.13.
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    return {"inductor": Path(cache_dir()).resolve(), "triton": Path(triton_cache_dir(0)).resolve()}


def entry_path(name: str) -> Path:
    """Return the file that entry `name` ("root/folder/file") stands for.

    Raises DamagedBundle for every name that a build would not have written.
    """
    root, _, relative = name.partition("/")
    pattern = FILE_NAMES.get(root)
    if pattern is None or not pattern.fullmatch(relative):
        raise DamagedBundle(f"entry {name!r} is not a kernel file: not written")
    base = cache_roots()[root]
    path = base / relative
    # A folder of the cache may be a link that leads out of it.
    if not path.parent.resolve().is_relative_to(base):
        raise DamagedBundle(f"entry {name!r} leads out of {base}: not written")
    return path


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` so that no reader ever sees half a file, nor a mapped one change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".bundle-")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(temporary, path)


# ---- what a native file runs on ----------------------------------------------------------


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


def _chosen_vector_isa() -> str:
    # Private, 2.9 to 2.13. Only at build, where inductor has already paid for the probing.
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return str(pick_vec_isa())


def check_index(index: KernelIndex) -> None:
    """Raise ForeignBundle unless this process can run the native files of the bundle."""
    here = (torch.__version__, sysconfig.get_config_var("SOABI"), platform.machine())
    for label, built, found in zip(
        ("torch", "Python ABI", "machine"),
        (index.torch, index.python_abi, index.machine),
        here,
        strict=True,
    ):
        if built != found:
            raise ForeignBundle(f"kernels built for {label} {built}, this is {found}: rebuild")
    missing = sorted(set(index.cpu_features) - set(cpu_features()))
    if missing and index.kernels:
        raise ForeignBundle(
            f"C++ kernels built for a processor with {', '.join(missing)} "
            f"({index.vector_isa}), which this one lacks: rebuild on this machine"
        )


# ---- the artifact kind -------------------------------------------------------------------

_recorded: dict[str, Path] = {}  # digest -> shared object that this process has loaded
_prebuilt: dict[str, Path] = {}  # digest -> shared object that came with a bundle
_restored: set[Path] = set()


class KernelFileArtifact(CacheArtifact):
    """One native file, its key "root/folder/file"; or the index, its key INDEX."""

    def populate_cache(self) -> None:
        if self.key == INDEX:
            use_index(parse_index(self.content))
            return
        path = entry_path(self.key)
        write_whole(path, self.content)
        _restored.add(path)

    @staticmethod
    def type() -> str:
        return KIND


# What is wrong with a blob is said in one line by us, not in a traceback by torch.
logging.getLogger(CacheArtifact.__module__).setLevel(logging.ERROR)

# The registry lives as long as the process and refuses a second class of one name, while tests
# import this file from both folders. The private dict is the only way to ask (2.9 to 2.13).
if KIND not in CacheArtifactFactory._artifact_types:
    CacheArtifactFactory.register(KernelFileArtifact)


_decode_steps: dict[str, bytes] = {}


class DecodeStepArtifact(CacheArtifact):
    """A decode step compiled ahead of time, kept in memory until somebody binds it."""

    def populate_cache(self) -> None:
        _decode_steps[self.key] = self.content

    @staticmethod
    def type() -> str:
        return DECODE_STEP


if DECODE_STEP not in CacheArtifactFactory._artifact_types:
    CacheArtifactFactory.register(DecodeStepArtifact)


def record_decode_step(content: bytes) -> None:
    """Put a precompiled decode step into the bundle that is saved next."""
    CacheArtifactManager.record_artifact(DECODE_STEP, "decode", content)


def parse_index(content: bytes) -> KernelIndex:
    try:
        values = json.loads(content)
        values["cpu_features"] = tuple(values["cpu_features"])
        index = KernelIndex(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedBundle(f"the bundle's kernel index can't be read: {error}") from error
    if index.schema != SCHEMA:
        raise ForeignBundle(f"kernel index of schema {index.schema}, expected {SCHEMA}: rebuild")
    return index


def use_index(index: KernelIndex) -> None:
    check_index(index)
    _prebuilt.update({digest: entry_path(name) for digest, name in index.kernels.items()})
    if index.kernels:
        record_kernels()


# ---- the kernel hook ---------------------------------------------------------------------


def kernel_digest(owner: str, call: inspect.BoundArguments) -> str:
    """Return a name for a kernel's source that no folder, compiler or flag goes into.

    torch's own name hashes the compiler's command line, and to get that it probes the
    instruction sets and runs `g++ --version`. The index guards what the name leaves out.
    """
    call.apply_defaults()
    source = {k: v for k, v in call.arguments.items() if k not in ("cls", "submit_fn")}
    return hashlib.sha256(repr((owner, sorted(source.items()))).encode()).hexdigest()


@functools.cache
def record_kernels() -> None:
    """From now on remember each C++ kernel that is loaded, and answer with prebuilt ones.

    Wraps the one door through which inductor's generated code gets its CPU kernels, the
    private `CppPythonBindingsCodeCache.load_pybinding_async` (2.9 to 2.13; on 2.13 with two
    more parameters). It returns a function that returns the kernel. Calling twice is harmless.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Cache

    stock = Cache.load_pybinding_async.__func__
    signature = inspect.signature(stock)

    def load_pybinding_async(cls, *args, **kwargs):
        digest = kernel_digest(cls.__name__, signature.bind(cls, *args, **kwargs))
        if (path := _prebuilt.get(digest)) is not None and path.is_file():
            return functools.partial(_load_prebuilt, cls, digest, path)
        return functools.partial(_load_and_record, stock(cls, *args, **kwargs), digest)

    Cache.load_pybinding_async = classmethod(load_pybinding_async)


def _load_prebuilt(cls, digest: str, path: Path):
    _recorded[digest] = path
    # The key only names the module; torch uses the file's stem too.
    module = cls._load_library(str(path), path.name.partition(".")[0])
    return getattr(module, cls.entry_function)


def _load_and_record(get_kernel, digest: str):
    kernel = get_kernel()
    _recorded[digest] = Path(kernel.__self__.__file__).resolve()  # a builtin's self: its module
    return kernel


# ---- save --------------------------------------------------------------------------------


def save_bundle(*, triton_helpers: bool = False) -> SavedBundle:
    """Return everything this process compiled, as one blob, with its C++ kernels.

    `triton_helpers` adds the C modules that Triton builds with gcc (cuda_utils, launchers):
    NOT PROVEN ON CUDA, and the blob then needs `import bundle` before a plain load.
    Raises BundleError when nothing was compiled.
    """
    files = _kernel_entries() | (_triton_entries() if triton_helpers else {})
    index = _build_index(files)
    if files:
        content = json.dumps(asdict(index), sort_keys=True).encode()
        # First, so that a load refuses before it writes a file.
        CacheArtifactManager.record_artifact(KIND, INDEX, content)
        for name, path in files.items():
            CacheArtifactManager.record_artifact(KIND, name, path.read_bytes())
    result = torch.compiler.save_cache_artifacts()
    if result is None:
        raise BundleError("nothing was compiled, so there is nothing to save: warm up first")
    blob, info = result
    keys = {
        kind: tuple(names)
        for kind, names in info.artifacts.items()
        if kind not in (KIND, DECODE_STEP)
    }
    if not keys.get("inductor"):
        raise BundleError(f"no compiled graph among {sorted(keys)}: is the FX graph cache off?")
    counts = {kind: len(names) for kind, names in info.artifacts.items()}
    return SavedBundle(blob, counts, keys, len(files), index.vector_isa)


def _kernel_entries() -> dict[str, Path]:
    """Return {entry name: file} of the C++ kernels that the compiled graphs loaded."""
    root = cache_roots()["inductor"]
    return {
        "inductor/" + path.relative_to(root).as_posix(): path
        for path in sorted(set(_recorded.values()))
    }


def _triton_entries() -> dict[str, Path]:
    """Return {entry name: file} of Triton's gcc-built helpers. NOT PROVEN ON CUDA.

    Cubins are not here: inductor bundles those of its kernels into its own graph entries.
    """
    root = cache_roots()["triton"]
    found = (path.relative_to(root).as_posix() for path in sorted(root.glob("*/*.so")))
    return {"triton/" + n: root / n for n in found if FILE_NAMES["triton"].fullmatch(n)}


def _build_index(files: dict[str, Path]) -> KernelIndex:
    names = {path: name for name, path in files.items()}
    kernels = {digest: names[path] for digest, path in _recorded.items()}
    return KernelIndex(
        schema=SCHEMA,
        torch=torch.__version__,
        python_abi=sysconfig.get_config_var("SOABI"),
        machine=platform.machine(),
        cpu_features=cpu_features(),
        vector_isa=_chosen_vector_isa() if kernels else None,
        kernels=kernels,
    )


# ---- load --------------------------------------------------------------------------------


def load_bundle(blob: bytes) -> LoadedBundle:
    """Put the blob's entries into this process's caches and return what came.

    Everything is checked before anything is written. Raises DamagedBundle or ForeignBundle.
    `torch.compiler.load_cache_artifacts` is the same two calls, but writes unchecked names and
    answers a damaged blob with a log line and None, a blob without entries with an empty result.
    """
    artifacts = CacheArtifactManager.deserialize(blob) if is_framed(blob) else None
    if artifacts is None:
        raise DamagedBundle(
            f"{len(blob)} bytes that torch {torch.__version__} can't read as cache artifacts "
            "(cut short, altered, or not such a file): build or copy it again"
        )
    keys = {kind: tuple(a.key for a in entries) for kind, entries in artifacts.items()}
    if not keys.get("inductor"):
        raise DamagedBundle("the blob holds no compiled graph: build it again")
    index = check_entries(artifacts)
    # Where inductor would look, and Triton must too: it reads the variable when first used.
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache_roots()["triton"]))
    before = set(_restored)
    CacheArtifactManager.populate_caches(artifacts)
    files = keys.pop(KIND, ())
    keys.pop(DECODE_STEP, None)
    return LoadedBundle(
        entries={kind: len(entries) for kind, entries in artifacts.items()},
        graph_keys=keys,
        kernel_files=sum(name != INDEX for name in files),
        vector_isa=index.vector_isa if index else None,
        decode_step=_decode_steps.get("decode"),
        restored=frozenset(_restored - before),
    )


def is_framed(blob: bytes) -> bool:
    """Say whether the lists of entries in `blob` end where it ends.

    If they do not, torch's reader (2.9 to 2.13) goes on reading nothing beyond the end, for ever.
    """
    at = 4 + 8  # checksum, version

    def number() -> int:
        nonlocal at
        at += 8
        return int.from_bytes(blob[at - 8 : at], "big")

    def skip_bytes() -> None:
        nonlocal at
        length = number()  # first: it moves `at` too
        at += length

    while at < len(blob):
        skip_bytes()  # the kind
        for _ in range(number()):
            skip_bytes()  # the key
            skip_bytes()  # the content
            if at > len(blob):
                return False
    return at == len(blob)


def check_entries(artifacts: dict[str, list[CacheArtifact]]) -> KernelIndex | None:
    """Raise unless every entry has a name a build writes and its kernels run here."""
    for kind, entries in artifacts.items():
        if not entries:
            raise DamagedBundle(f"the list of {kind!r} entries is empty, which no build writes")
        for entry in entries:
            pattern = TORCH_KEYS.get(kind)
            if pattern is not None and not pattern.fullmatch(entry.key):
                raise DamagedBundle(f"{kind} entry {entry.key!r} has a name no build writes")
    ours = {entry.key: entry for entry in artifacts.get(KIND, ())}
    for name in ours.keys() - {INDEX}:
        entry_path(name)
    if not ours:
        return None
    if INDEX not in ours:
        raise DamagedBundle("the blob holds kernel files without their index: build it again")
    index = parse_index(ours[INDEX].content)
    if absent := sorted(set(index.kernels.values()) - ours.keys()):
        raise DamagedBundle(f"the kernel index names {len(absent)} absent files: build it again")
    check_index(index)
    return index
