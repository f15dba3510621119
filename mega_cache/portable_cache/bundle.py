"""Save and load a mega-cache blob after whose load nothing is left to compile, tune or build.

`torch.compiler.save_cache_artifacts()` stores compiled graphs. What a start would still do after a
load of those is in the same blob here:

    tuned Triton kernels        inside the graphs themselves (saved_graphs, tuned_kernels)
    Triton's C helper           an entry of torch's kind "autotune", which is a plain file
    precompiled decode steps    the same, named by the slots of their KV cache (decode_ahead)
    C++ kernels of CPU graphs   a kind of entry of our own (cpu_kernels)

    build:  configure(), watch()        before the first compile
            saved = save_bundle()       after the warm-up; saved.blob is the `.bin`
    run:    configure()                 the same settings, or no key matches
            loaded = load_bundle(blob)  raises ArtifactDamagedError or
                                        ArtifactMismatchError, else says what came

A plain `torch.compiler.load_cache_artifacts(blob)` works on the file too, under the settings of
`configure`. Only where there are C++ kernels cpu_kernels must have been imported.
A blob is code (pickles and native code): whoever calls `load_bundle` has decided to trust it.
"""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  save_cache_artifacts fails without it (pytorch #154463)

# Private, the documented extension point of the mega-cache; the same names on 2.9 to 2.13.
from torch.compiler._cache import CacheArtifact, CacheArtifactFactory, CacheArtifactManager

from common.errors import ArtifactDamagedError, EnvironmentProblemError, ScriptError
from portable_cache import cpu_kernels, saved_graphs, tuned_kernels

_GRAPH_KINDS = ("inductor", "aot_autograd")
_PLAIN_FILE = "autotune"

_DECODE_STEP = re.compile(r"decode_step/(?P<slots>[1-9][0-9]{0,8})")
# Where torch looks for Triton's cache below its own, for the first device.
_TRITON_FOLDER = "triton/0/"
_TRITON_HELPER = re.compile(r"triton/0/[A-Za-z0-9_-]{20,80}/cuda_utils[A-Za-z0-9_.-]*\.so")
# Entries become paths below the cache folder through torch's own code, which checks nothing.
_KEYS = {
    "inductor": re.compile(r"f[a-z2-7]{51}"),
    "aot_autograd": re.compile(r"a[a-z2-7]{51}"),
    _PLAIN_FILE: re.compile(
        rf"[A-Za-z0-9_.-]+/[A-Za-z0-9_-][A-Za-z0-9_.-]*|{_TRITON_HELPER.pattern}"
    ),
}

# What is wrong with a blob is said in one line by us, not in a traceback by torch.
logging.getLogger(CacheArtifact.__module__).setLevel(logging.ERROR)

Entries = dict[str, list[CacheArtifact]]


@dataclass(frozen=True)
class SavedBundle:
    blob: bytes
    entries: dict[str, int]  # number of entries by kind
    graph_keys: dict[str, tuple[str, ...]]  # by kind: what a run has to hit


@dataclass(frozen=True)
class LoadedBundle:
    entries: dict[str, int]
    graph_keys: dict[str, tuple[str, ...]]
    decode_steps: dict[int, bytes] = field(repr=False)  # by slots of the KV cache
    restored: frozenset[Path] = field(repr=False)  # kernels that don't count as compiled


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


def configure() -> None:
    """Set what makes kernels portable. Part of the cache key: at a build and at a run alike."""
    tuned_kernels.configure()


def watch() -> None:
    """From now on remember what this process compiles and loads, as far as torch doesn't."""
    cpu_kernels.record()
    tuned_kernels.watch()


# ---- save --------------------------------------------------------------------------------


def save_bundle(decode_steps: dict[int, bytes] | None = None) -> SavedBundle:
    """Return everything this process compiled, as one blob, with its precompiled `decode_steps`.

    Raises ScriptError when nothing was compiled, and tuned_kernels.UnpinnedKernels when a kernel
    can't be saved as it ran.
    """
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise ScriptError("nothing was compiled, so there is nothing to save: warm up first")
    entries = _read(saved[0])
    if not entries.get("inductor"):
        raise ScriptError(f"no compiled graph among {sorted(entries)}: is the FX graph cache off?")
    for kind in _GRAPH_KINDS:
        entries[kind] = [
            type(entry)(entry.key, saved_graphs.repickle(entry.content))
            for entry in entries.get(kind, ())
        ]
    tuned_kernels.check_all_pinned()
    steps = decode_steps or {}
    entries[cpu_kernels.KIND] = cpu_kernels.entries()
    entries[_PLAIN_FILE] = [
        *entries.get(_PLAIN_FILE, ()),
        *_triton_helper(),
        *(_plain_file(f"decode_step/{slots}", step) for slots, step in steps.items()),
    ]
    entries = {kind: found for kind, found in entries.items() if found}
    return SavedBundle(_write(entries), _count(entries), _graph_keys(entries))


def _plain_file(key: str, content: bytes) -> CacheArtifact:
    """Return an entry that a plain load makes the file `key` of below the cache folder."""
    return CacheArtifactFactory._get_artifact_type(_PLAIN_FILE)(key, content)


def _triton_helper() -> Iterable[CacheArtifact]:
    """Yield the C module that Triton builds with gcc in every process that has a kernel to run."""
    if not tuned_kernels.any_ran():
        return
    # Private (Triton 3.5 to 3.7): the module is in no table, but its functions know it.
    from triton.runtime import driver

    path = Path(driver.active.utils.load_binary.__self__.__file__)
    yield _plain_file(f"{_TRITON_FOLDER}{path.parent.name}/{path.name}", path.read_bytes())


def _write(entries: Entries) -> bytes:
    with CacheArtifactManager.with_fresh_cache():
        CacheArtifactManager._new_cache_artifacts.update(entries)
        blob, _ = CacheArtifactManager.serialize()
    return blob


def _count(entries: Entries) -> dict[str, int]:
    """Return the number of entries by kind, decode steps as one of their own."""
    steps = len(_decode_steps(entries))
    plain = len(entries.get(_PLAIN_FILE, ())) - steps
    counts = {kind: len(found) for kind, found in entries.items()}
    counts |= {_PLAIN_FILE: plain, "decode_step": steps}
    return {kind: count for kind, count in counts.items() if count}


def _decode_steps(entries: Entries) -> dict[int, bytes]:
    named = ((_DECODE_STEP.fullmatch(e.key), e.content) for e in entries.get(_PLAIN_FILE, ()))
    return {int(name["slots"]): content for name, content in named if name}


def _graph_keys(entries: Entries) -> dict[str, tuple[str, ...]]:
    return {kind: tuple(e.key for e in entries.get(kind, ())) for kind in _GRAPH_KINDS}


# ---- load --------------------------------------------------------------------------------


def load_bundle(blob: bytes) -> LoadedBundle:
    """Put the blob's entries into this process's caches and return what came.

    Everything is checked before anything is written. Raises ArtifactDamagedError or
    ArtifactMismatchError. `torch.compiler.load_cache_artifacts` is the same, but writes unchecked
    names and answers a damaged blob with a log line and None.
    """
    entries = _read(blob)
    _check(entries)
    # Triton reads the variable when it is first used, and has a folder of its own without it
    os.environ.setdefault("TRITON_CACHE_DIR", str(triton_root()))
    CacheArtifactManager.populate_caches(_wanted_in_the_cache(entries))
    helpers = {_install_helper(e) for e in entries.get(_PLAIN_FILE, ()) if _is_helper(e)}
    _start_no_compile_workers()
    return LoadedBundle(
        _count(entries),
        _graph_keys(entries),
        _decode_steps(entries),
        cpu_kernels.restored_files() | helpers,
    )


def _wanted_in_the_cache(entries: Entries) -> Entries:
    """Leave out what is read from memory, or has a place of its own."""
    plain = [
        entry
        for entry in entries.get(_PLAIN_FILE, ())
        if not _is_helper(entry) and not _DECODE_STEP.fullmatch(entry.key)
    ]
    return entries | {_PLAIN_FILE: plain}


def _is_helper(entry: CacheArtifact) -> bool:
    return _TRITON_HELPER.fullmatch(entry.key) is not None


def _install_helper(entry: CacheArtifact) -> Path:
    """Put Triton's C module where Triton looks: the user may have given it a folder of its own."""
    path = triton_root() / entry.key.removeprefix(_TRITON_FOLDER)
    cpu_kernels.write_whole(path, entry.content)
    return path


def triton_root() -> Path:
    # Private: the only way to ask for the default folder; same module on 2.9 to 2.13.
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    return Path(triton_cache_dir(0)).resolve()


def _start_no_compile_workers() -> None:
    """Spare this process the pool that any CUDA graph wakes, and whose end it would wait for.

    What has to be compiled all the same is compiled in this process. Not part of the cache key.
    """
    from torch._inductor import config

    config.compile_threads = 1


def _read(blob: bytes) -> Entries:
    entries = CacheArtifactManager.deserialize(blob) if is_framed(blob) else None
    if entries is None:
        raise ArtifactDamagedError(
            f"{len(blob)} bytes that torch {torch.__version__} can't read as cache artifacts "
            "(cut short, altered, or not such a file): build or copy it again"
        )
    return entries


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


def _check(entries: Entries) -> None:
    """Raise unless every entry has a name that a build writes and its kernels run here."""
    if not entries.get("inductor"):
        raise ArtifactDamagedError("the blob holds no compiled graph: build it again")
    for kind, found in entries.items():
        if not found:
            raise ArtifactDamagedError(f"the list of {kind!r} entries is empty: build it again")
        for entry in found:
            if (pattern := _KEYS.get(kind)) is not None and not pattern.fullmatch(entry.key):
                raise ArtifactDamagedError(f"{kind} entry {entry.key!r} has a name no build writes")
    cpu_kernels.check_entries({e.key: e.content for e in entries.get(cpu_kernels.KIND, ())})
