"""Load a mega-cache blob after whose load nothing is left to compile, tune or build.

Beside graphs (build/saving.py): tuned Triton kernels inside the graphs; Triton's C helper
and the decode step as entries of torch's kind "autotune", which are plain files; C++ kernels of CPU
graphs as a kind of our own. A plain `torch.compiler.load_cache_artifacts(blob)` works too, under
the settings of `configure`, where there are C++ kernels after an import of cpu_kernels.
A blob is code (pickles and native code): whoever calls `load_bundle` has decided to trust it.
"""

import logging
import os
import re
from pathlib import Path

import torch

from common.errors import ArtifactDamagedError, EnvironmentProblemError
from portable_cache import torch_private
from portable_cache.start import cpu_kernels

DECODE_STEP = "decode_step/step.pt2"
# Where torch looks for Triton's cache below its own, for the first device.
_TRITON_HELPER = re.compile(r"triton/0/([A-Za-z0-9_-]{20,80}/cuda_utils[A-Za-z0-9_.-]*\.so)")

# What is wrong with a blob is said in one line by us, not in a traceback by torch.
logging.getLogger("torch.compiler._cache").setLevel(logging.ERROR)


def check_caches_are_on() -> None:
    """Raise EnvironmentProblemError where torch is told to keep and to look up no graphs."""
    config = torch_private.config
    if config.force_disable_caches or not config.fx_graph_cache:
        off = "FORCE_DISABLE_CACHES=1" if config.force_disable_caches else "FX_GRAPH_CACHE=0"
        raise EnvironmentProblemError(
            f"torch's compiler caches are off (TORCHINDUCTOR_{off}), and a portable cache is made "
            "of their entries: unset that variable"
        )


def configure(device: str) -> None:
    """Set what is part of the compiler's keys, the same at a build and a start."""
    row_sums = None
    if device == "cpu":
        # Triton's compile workers: processes that import torch, and here have nothing to do
        os.environ.setdefault("TORCH_WARM_POOL", "0")
        with torch_private.losing("a CPU multiplies one row by each weight slowly"):
            from portable_cache.start.row_sums import RowSums

            row_sums = RowSums()
    torch_private.configure(row_sums)


def load_bundle(blob: bytes) -> tuple[bytes | None, set[Path]]:
    """Put the blob's entries into this process's caches; return the decode step, if it has one,
    and the kernels that came, which don't count as compiled.

    Raises ArtifactDamagedError or ArtifactMismatchError before anything is written, where
    `torch.compiler.load_cache_artifacts` answers with a log line and None.
    """
    entries = torch_private.CacheArtifactManager.deserialize(blob)
    if entries is None:
        raise ArtifactDamagedError(
            f"{len(blob)} bytes that torch {torch.__version__} can't read as cache artifacts "
            "(cut short, altered, or not such a file): build or copy it again"
        )
    for entry in entries.get(cpu_kernels.KIND, ()):
        if entry.key == cpu_kernels.BUILT_FOR:
            cpu_kernels.check_runs_here(entry.content)
    triton_root = Path(torch_private.triton_cache_dir(0)).resolve()
    # Triton reads the variable when it is first used, and has a folder of its own without it
    os.environ.setdefault("TRITON_CACHE_DIR", str(triton_root))
    step, helpers, in_the_cache = None, {}, []
    for entry in entries.get("autotune", ()):
        if entry.key == DECODE_STEP:
            step = entry.content
        elif helper := _TRITON_HELPER.fullmatch(entry.key):
            # where Triton looks: the user may have given it a folder of its own
            helpers[triton_root / helper[1]] = entry.content
        else:
            in_the_cache.append(entry)
    torch_private.CacheArtifactManager.populate_caches(entries | {"autotune": in_the_cache})
    for path, content in helpers.items():
        torch_private.write_atomic(str(path), content, make_dirs=True)
    # Spare this process the pool of workers that any CUDA graph wakes, and whose end it would wait
    # for: what must be compiled all the same is compiled in here. Not part of the cache's keys.
    torch_private.config.compile_threads = 1
    return step, {*cpu_kernels.prebuilt.values(), *helpers}
