"""What the compiler really did in this process: counters of torch's, and what was built and tuned.

    watch = watch_compilation()     before the first compile: imports inductor (0.8 s)
    ...
    counts = read_counts(watch)     a dict with the names of measures.COUNTERS and more

A process that never compiles calls `read_counts(None)`: dynamo is not imported for it, and where it
is absent no graph was captured or looked up, so those counts are a true 0. What needs the watch
(kernels_compiled, cudagraph_replays) is None without it, but for kernels_compiled where inductor is
absent: 0, for there was nobody to compile one.
"""

import functools
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

# JSON name -> (group, name) in torch._dynamo.utils.counters; the same on 2.9 to 2.13.
_COUNTERS = {
    "unique_graphs": ("stats", "unique_graphs"),
    "calls_captured": ("stats", "calls_captured"),
    "async_compile_miss": ("inductor", "async_compile_cache_miss"),
    "async_compile_hit": ("inductor", "async_compile_cache_hit"),
    "fxgraph_cache_hit": ("inductor", "fxgraph_cache_hit"),
    "fxgraph_cache_miss": ("inductor", "fxgraph_cache_miss"),
    "fxgraph_cache_bypass": ("inductor", "fxgraph_cache_bypass"),
    "aot_autograd_cache_hit": ("aot_autograd", "autograd_cache_hit"),
    "aot_autograd_cache_miss": ("aot_autograd", "autograd_cache_miss"),
    "aot_autograd_cache_bypass": ("aot_autograd", "autograd_cache_bypass"),
    "cudagraph_skips": ("inductor", "cudagraph_skips"),
}
# A C++ kernel is <hash>.main.so; the instruction-set probes are <hash>.so, and no kernels.
_CPU_KERNELS = re.compile(r".*\.main\.so")
_GPU_KERNELS = re.compile(r".*\.(cubin|hsaco|spv)")
# C modules that Triton has gcc build: one for the driver, one for each way to launch a kernel.
_HELPERS = re.compile(r"(cuda_utils|hip_utils|__triton_launcher).*\.so")
# A kernel goes through one or several of these (2.9 to 2.13; the last from 2.12 on). torch keeps
# the seconds of each time by these names.
_TUNING = (
    "CachingAutotuner.benchmark_all_configs",
    "CachingAutotuner.coordinate_descent_tuning",
    "CachingAutotuner.combo_sequential_autotune",
)


@dataclass
class Watch:
    """Grows while the process compiles: everything in it is observed, nothing steered."""

    kernels_before: frozenset[Path]
    helpers_before: frozenset[Path]
    restored: set[Path] = field(default_factory=set)
    cudagraph_replays: int = 0


def read_counts(watch: Watch | None) -> dict[str, int | None]:
    """Return the counts of this process up to now; imports nothing."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        names = (*_COUNTERS, "recompiles", "kernels_tuned")
        counts: dict[str, int | None] = dict.fromkeys(names, 0)
    else:
        counts = {name: int(dynamo.counters[g][c]) for name, (g, c) in _COUNTERS.items()}
        counts["recompiles"] = _count_recompiles(dynamo)
        times = dynamo.compilation_time_metrics
        counts["kernels_tuned"] = max(len(times.get(name, ())) for name in _TUNING)
    if watch is None:
        unseen = None if "torch._inductor" in sys.modules else 0
        nothing = {"kernels_compiled": unseen, "helpers_built": unseen}
        return counts | nothing | {"cudagraph_replays": None, "compile_workers": _workers()}
    return counts | {
        "kernels_compiled": len(compiled_kernels(watch)),
        "helpers_built": len(helper_files() - watch.helpers_before - watch.restored),
        "cudagraph_replays": watch.cudagraph_replays,
        "compile_workers": _workers(),
    }


def compiled_kernels(watch: Watch) -> list[Path]:
    """Return the kernels that appeared in the cache folders and that no artifact put there.

    Those of another process that compiles into the same folders at the same time too.
    """
    return sorted(kernel_files() - watch.kernels_before - watch.restored)


def kernel_files() -> frozenset[Path]:
    """Return the compiled kernels in this process's cache folders.

    Files, not calls, are counted: inductor compiles C++ in threads and Triton in worker
    processes, where a hook of the parent sees nothing, but all write into these folders.
    """
    # Private: the only way to ask for the default folder; same module on 2.9 to 2.13.
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    cpp = _files_below(Path(cache_dir()).resolve(), _CPU_KERNELS)
    return cpp | _files_below(Path(triton_cache_dir(0)).resolve(), _GPU_KERNELS)


def helper_files() -> frozenset[Path]:
    """Return the C modules of Triton's in this process's cache folder."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

    return _files_below(Path(triton_cache_dir(0)).resolve(), _HELPERS)


def _workers() -> int:
    """Return how many pools of compile workers this process started (private, 2.9 to 2.13)."""
    module = sys.modules.get("torch._inductor.async_compile")
    return module.AsyncCompile.process_pool.cache_info().misses if module else 0


@functools.cache
def watch_compilation() -> Watch:
    """Start to observe; call before loading an artifact and before the first compile."""
    watch = Watch(kernel_files(), helper_files())
    _observe_triton_bundles(watch)
    _observe_cuda_graphs(watch)
    return watch


def _count_recompiles(dynamo) -> int:
    # The metrics keep a reason for every compile of a frame that failed its guards, also across
    # torch._dynamo.reset(), which clears the frame counters. They hold the last 64 compiles.
    return sum(bool(metrics.recompile_reason) for metrics in dynamo.get_compilation_metrics())


def _files_below(root: Path, pattern: re.Pattern) -> frozenset[Path]:
    return frozenset(
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if pattern.fullmatch(name)
    )


def _observe_triton_bundles(watch: Watch) -> None:
    # Private, 2.9 to 2.13. A graph entry carries its cubins and writes them at a hit: those are
    # restored, not compiled.
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from torch._inductor.triton_bundler import TritonBundler

    stock: Callable = TritonBundler.read_and_emit

    @functools.wraps(stock)
    def read_and_emit(bundle):
        # Those on disk already are left alone by torch, and were counted where they came from.
        present = kernel_files()
        for kernel in bundle.kernel_artifacts:
            folder = Path(triton_cache_dir(kernel.device)).resolve() / kernel.kernel_hash
            watch.restored.update({folder / a.filename for a in kernel.artifacts} - present)
        return stock(bundle)

    TritonBundler.read_and_emit = staticmethod(read_and_emit)


def _observe_cuda_graphs(watch: Watch) -> None:
    # Public class. Inductor's CUDA-graph trees replay through it, once for each graph and step.
    import torch

    stock = torch.cuda.CUDAGraph.replay

    @functools.wraps(stock)
    def replay(self):
        watch.cudagraph_replays += 1
        return stock(self)

    torch.cuda.CUDAGraph.replay = replay
