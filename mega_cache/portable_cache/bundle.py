"""Save and load a mega-cache blob after whose load nothing is left to compile, tune or build.

`torch.compiler.save_cache_artifacts()` stores compiled graphs. What a start would still do after a
load of those is in the same blob here:

    tuned Triton kernels        inside the graphs themselves (saved_graphs, tuned_kernels)
    Triton's C helper           an entry of torch's kind "autotune", which is a plain file
    precompiled decode steps    the same, named by the slots of their KV cache (decode_ahead)
    C++ kernels of CPU graphs   a kind of entry of our own (cpu_kernels)

A plain `torch.compiler.load_cache_artifacts(blob)` works on the file too, under the settings of
`configure`. Only where there are C++ kernels cpu_kernels must have been imported.
A blob is code (pickles and native code): whoever calls `load_bundle` has decided to trust it.
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

# Private, the documented extension point of the mega-cache; the same names on 2.9 to 2.13.
from torch.compiler._cache import CacheArtifact, CacheArtifactManager
from torch.utils import _appending_byte_serializer

from common.errors import ArtifactDamagedError, EnvironmentProblemError, ScriptError
from portable_cache import cpu_kernels, saved_graphs, tuned_kernels

_DECODE_STEP = re.compile(r"decode_step/([1-9][0-9]{0,8})")  # slots of its KV cache
# Where torch looks for Triton's cache below its own, for the first device.
_TRITON_HELPER = re.compile(r"triton/0/([A-Za-z0-9_-]{20,80}/cuda_utils[A-Za-z0-9_.-]*\.so)")
# Entries become paths below the cache folder through torch's own code, which checks nothing.
_KEYS = {
    "inductor": re.compile(r"f[a-z2-7]{51}"),
    "aot_autograd": re.compile(r"a[a-z2-7]{51}"),
    "autotune": re.compile(rf"[\w-]+/[\w-][\w.-]*|{_TRITON_HELPER.pattern}", re.ASCII),
    cpu_kernels.KIND: cpu_kernels.KEY,
}

# What is wrong with a blob is said in one line by us, not in a traceback by torch.
logging.getLogger(CacheArtifact.__module__).setLevel(logging.ERROR)


class _BoundedReader(_appending_byte_serializer.BytesReader):
    """Ends where torch's own (2.9 to 2.13) reads on beyond a damaged blob's end, for ever."""

    def read_uint64(self) -> int:
        if self._i + 8 > len(self._data):
            raise EOFError
        return super().read_uint64()


_appending_byte_serializer.BytesReader = _BoundedReader


class SavedBundle(NamedTuple):
    blob: bytes
    entries: dict[str, int]  # number of entries by kind, decode steps as one of their own


class LoadedBundle(NamedTuple):
    decode_steps: dict[int, bytes]  # by slots of the KV cache
    restored: set[Path]  # kernels that don't count as compiled


def check_caches_are_on() -> None:
    """Raise EnvironmentProblemError where torch is told to keep and to look up no graphs."""
    # Private module, the names on 2.9 to 2.13; the variables set them.
    from torch._inductor import config

    if config.force_disable_caches or not config.fx_graph_cache:
        off = "FORCE_DISABLE_CACHES=1" if config.force_disable_caches else "FX_GRAPH_CACHE=0"
        raise EnvironmentProblemError(
            f"torch's compiler caches are off (TORCHINDUCTOR_{off}), and a portable cache is made "
            "of their entries: unset that variable"
        )


def configure() -> None:
    """Make every kernel one that can be saved as it ran; part of the keys of build and run."""
    from torch._inductor import config

    # Triton cuts the name of a kernel's file at 150 characters, and then torch doesn't find the
    # file. A descriptive name lists all operators of the kernel and gets that long.
    config.triton.descriptive_names = False
    # kernels that a model brings, through torch.library.triton_op
    config.static_launch_user_defined_triton_kernels = True


def watch() -> None:
    """From now on remember what this process compiles and loads, as far as torch doesn't."""
    cpu_kernels.record()
    tuned_kernels.watch()


def save_bundle(decode_steps: dict[int, bytes] | None = None) -> SavedBundle:
    """Return everything this process compiled, as one blob, with its precompiled `decode_steps`.

    Raises ScriptError when nothing was compiled, or when a kernel can't be saved as it ran.
    """
    # Private, as is the class of plain files: what save_cache_artifacts() writes.
    from torch._inductor.runtime.autotune_cache import AutotuneCacheArtifact as PlainFile

    entries = CacheArtifactManager._new_cache_artifacts
    if not entries.get("inductor"):
        raise ScriptError("no graph was compiled that could be saved: warm up first")
    for kind in {"inductor", "aot_autograd"} & entries.keys():
        entries[kind] = [
            replace(entry, content=saved_graphs.repickle(entry.content)) for entry in entries[kind]
        ]
    tuned_kernels.check_all_pinned()
    cpu_kernels.save_kernels()
    if tuned_kernels.ran:
        # The C module that Triton builds with gcc in every process that has a kernel to run.
        # Private (Triton 3.5 to 3.7): it is in no table, but its functions know it.
        from triton.runtime import driver

        helper = Path(driver.active.utils.load_binary.__self__.__file__)
        key = f"triton/0/{helper.parent.name}/{helper.name}"
        entries["autotune"].append(PlainFile(key, helper.read_bytes()))
    counts = {kind: len(found) for kind, found in entries.items()}
    if decode_steps:
        counts["decode_step"] = len(decode_steps)
        for slots, content in decode_steps.items():
            entries["autotune"].append(PlainFile(f"decode_step/{slots}", content))
    blob, _ = CacheArtifactManager.serialize()
    return SavedBundle(blob, counts)


def load_bundle(blob: bytes) -> LoadedBundle:
    """Put the blob's entries into this process's caches and return what came.

    Everything is checked before anything is written. Raises ArtifactDamagedError or
    ArtifactMismatchError. `torch.compiler.load_cache_artifacts` is the same, but writes unchecked
    names and answers a damaged blob with a log line and None.
    """
    # Private; the folders can be asked for nowhere else. The same modules on 2.9 to 2.13.
    from torch._inductor import config
    from torch._inductor.codecache import write_atomic
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    entries = CacheArtifactManager.deserialize(blob)
    if entries is None:
        raise ArtifactDamagedError(
            f"{len(blob)} bytes that torch {torch.__version__} can't read as cache artifacts "
            "(cut short, altered, or not such a file): build or copy it again"
        )
    _check(entries)
    triton_root = Path(triton_cache_dir(0)).resolve()
    # Triton reads the variable when it is first used, and has a folder of its own without it
    os.environ.setdefault("TRITON_CACHE_DIR", str(triton_root))
    decode_steps, helpers, in_the_cache = {}, {}, []
    for entry in entries.get("autotune", ()):
        if step := _DECODE_STEP.fullmatch(entry.key):
            decode_steps[int(step[1])] = entry.content
        elif helper := _TRITON_HELPER.fullmatch(entry.key):
            # where Triton looks: the user may have given it a folder of its own
            helpers[triton_root / helper[1]] = entry.content
        else:
            in_the_cache.append(entry)
    CacheArtifactManager.populate_caches(entries | {"autotune": in_the_cache})
    for path, content in helpers.items():
        write_atomic(str(path), content, make_dirs=True)
    # Spare this process the pool of workers that any CUDA graph wakes, and whose end it would wait
    # for: what must be compiled all the same is compiled in here. Not part of the cache's keys.
    config.compile_threads = 1
    return LoadedBundle(decode_steps, restored={*cpu_kernels.prebuilt.values(), *helpers})


def _check(entries: Mapping[str, list[CacheArtifact]]) -> None:
    """Raise unless every entry has a name that a build writes and its kernels run here."""
    if not entries.get("inductor") or not all(entries.values()):
        raise ArtifactDamagedError("the blob holds no compiled graph: build it again")
    for kind, found in entries.items():
        for entry in found:
            if kind in _KEYS and not _KEYS[kind].fullmatch(entry.key):
                raise ArtifactDamagedError(f"{kind} entry {entry.key!r} has a name no build writes")
    if kernels := {entry.key: entry.content for entry in entries.get(cpu_kernels.KIND, ())}:
        cpu_kernels.check_runs_here(kernels.get(cpu_kernels.BUILT_FOR, b""))
