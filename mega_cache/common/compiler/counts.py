"""What the compiler really did in this process: counters of torch's, and what was built and tuned.

    watch = watch_compilation()     before a load and the first compile: imports inductor (0.8 s)
    ...
    counts = read_counts(watch)     the names of measures.COUNTERS; None is unknown

A process that never compiles calls `read_counts(None)`, which imports nothing. Where dynamo or
inductor are absent nobody could trace or compile, and 0 is true; what only a watch can see is None.
"""

import functools
import os
import re
import sys
from pathlib import Path

from common.measure.measures import COUNTERS

# A kernel goes through one or several of these (2.9 to 2.13; the last from 2.12 on). torch keeps
# the seconds of each time by these names.
_TUNING = (
    "CachingAutotuner.benchmark_all_configs",
    "CachingAutotuner.coordinate_descent_tuning",
    "CachingAutotuner.combo_sequential_autotune",
)


class Watch:
    """Grows while the process compiles: everything in it is observed, nothing steered."""

    def __init__(self, before: set[Path]):
        self.before = before  # kernels and helpers that were there already
        self.restored: set[Path] = set()  # put there by an artifact
        self.cudagraph_replays = 0


@functools.cache
def watch_compilation() -> Watch:
    """Start to observe; call before loading an artifact and before the first compile."""
    import torch
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from torch._inductor.triton_bundler import TritonBundler

    watch = Watch(set().union(*_built_files().values()))
    emit, replay = TritonBundler.read_and_emit, torch.cuda.CUDAGraph.replay

    @functools.wraps(emit)
    def read_and_emit(bundle):
        # Those on disk already are left alone by torch, and were counted where they came from.
        present = _built_files()["kernels_compiled"]
        for kernel in bundle.kernel_artifacts:
            folder = Path(triton_cache_dir(kernel.device)).resolve() / kernel.kernel_hash
            watch.restored.update({folder / a.filename for a in kernel.artifacts} - present)
        return emit(bundle)

    @functools.wraps(replay)
    def counted_replay(graph):
        watch.cudagraph_replays += 1
        return replay(graph)

    # Private, 2.9 to 2.13. A graph entry carries its cubins and writes them at a hit: those are
    # restored, not compiled.
    TritonBundler.read_and_emit = staticmethod(read_and_emit)
    # Public. Inductor's CUDA-graph trees replay through it, once for each graph and step.
    torch.cuda.CUDAGraph.replay = counted_replay
    return watch


def read_counts(watch: Watch | None) -> dict[str, int | None]:
    """Return the counts of this process up to now."""
    counts: dict[str, int | None] = dict.fromkeys(COUNTERS, 0)
    if dynamo := sys.modules.get("torch._dynamo.utils"):
        for name, place in COUNTERS.items():
            if place:
                counts[name] = int(dynamo.counters[place[0]][place[1]])
        # A reason for every compile of a frame that failed its guards, also across
        # torch._dynamo.reset(), which clears the frame counters; of the last 64 compiles.
        compiles = dynamo.get_compilation_metrics()
        counts["recompiles"] = sum(bool(one.recompile_reason) for one in compiles)
        times = dynamo.compilation_time_metrics
        counts["kernels_tuned"] = max(len(times.get(name, ())) for name in _TUNING)
    if workers := sys.modules.get("torch._inductor.async_compile"):
        # pools that were started (private, 2.9 to 2.13)
        counts["compile_workers"] = workers.AsyncCompile.process_pool.cache_info().misses
    if watch:
        counts["cudagraph_replays"] = watch.cudagraph_replays
        for name, files in _built_files().items():
            counts[name] = len(files - watch.before - watch.restored)
    else:
        unseen = None if "torch._inductor" in sys.modules else 0
        counts |= {"cudagraph_replays": None, "kernels_compiled": unseen, "helpers_built": unseen}
    return counts


def compiled_kernels(watch: Watch) -> list[Path]:
    """Return the kernels that appeared in the cache folders and that no artifact put there.

    Those of another process that compiles into the same folders at the same time too.
    """
    return sorted(_built_files()["kernels_compiled"] - watch.before - watch.restored)


def _built_files() -> dict[str, set[Path]]:
    """Return what was built into this process's cache folders, by the name of its count.

    Files, not calls, are counted: inductor compiles C++ in threads and Triton in worker
    processes, where a hook of the parent sees nothing, but all write into these folders.
    """
    # Private: the only way to ask for the default folder; same module on 2.9 to 2.13.
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    def named(pattern: str, root: str) -> set[Path]:
        files = ((at, name) for at, _, names in os.walk(os.path.realpath(root)) for name in names)
        return {Path(at, name) for at, name in files if re.fullmatch(pattern, name)}

    triton = triton_cache_dir(0)
    # the instruction-set probes are <hash>.so, and no kernels
    kernels = named(r".*\.main\.so", cache_dir()) | named(r".*\.(cubin|hsaco|spv)", triton)
    # C modules that Triton has gcc build: for the driver, and to launch a kernel
    helpers = named(r"(cuda_utils|hip_utils|__triton_launcher).*\.so", triton)
    return {"kernels_compiled": kernels, "helpers_built": helpers}
