"""What this process compiled, tuned and built after a load, for `--require-hit` and the summary.

    before = snapshot()             when the caches are set up, before the bundle is loaded
    ...
    work = work_since(before, restored)
    work.describe()                 one line for each kind of work; empty: nothing was done

Seen from outside, in files and counters, and so at no cost: a start that needs no compiler imports
none to find out. Files are counted, not calls: Inductor compiles C++ in threads and Triton in worker
processes, where a hook of this process sees nothing, but all write into the same folders.
"""

import os
import re
import sys
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

# A C++ kernel is <hash>.main.so; the instruction-set probes are <hash>.so, and no kernels.
KERNEL = re.compile(r"(?P<name>.*)\.(main\.so|cubin|hsaco|spv|zebin)")
# C modules that Triton builds with gcc: one for the driver, one for each way to launch a kernel
HELPER = re.compile(r"(?P<name>cuda_utils|hip_utils|__triton_launcher)\..*so")
# one more for each measured configuration of a kernel; the class's name differs by version
BENCHMARKS = re.compile(r"benchmarking\.\w+\.benchmark_(gpu|cpu)")


@dataclass(frozen=True)
class CompileWork:
    """Work that a full hit leaves none of."""

    kernels: tuple[str, ...]  # names of kernels compiled: Triton's, or the hashes of C++ ones
    helpers: tuple[str, ...]  # names of C modules built
    benchmarks: int  # timings of kernels for tuning
    workers: int  # pools of compile workers started

    def as_json(self) -> dict[str, int]:
        return {
            "kernels_tuned": self.benchmarks,
            "helpers_built": len(self.helpers),
            "compile_workers_started": self.workers,
        }

    def describe(self, most: int = 8) -> list[str]:
        """Return one line for each kind of work that was done, with the first names."""
        lines = []
        for what, names in (("kernels compiled", self.kernels), ("C helpers built", self.helpers)):
            if names:
                more = f" and {len(names) - most} more" if len(names) > most else ""
                lines.append(f"{len(names)} {what}: {', '.join(names[:most])}{more}")
        if self.benchmarks:
            lines.append(f"kernels tuned: {self.benchmarks} timings")
        if self.workers:
            lines.append("compile workers started")
        return lines


def snapshot() -> frozenset[Path]:
    """Return the kernels and helpers in this process's cache folders."""
    # Private: the only way to ask for the default folders; same module on 2.9 to 2.13.
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    roots = {Path(cache_dir()).resolve(), Path(triton_cache_dir(0)).resolve()}
    return frozenset(
        Path(folder, name)
        for root in roots
        for folder, _, names in os.walk(root)
        for name in names
        if KERNEL.fullmatch(name) or HELPER.fullmatch(name)
    )


def work_since(before: Set[Path], restored: Set[Path] = frozenset()) -> CompileWork:
    """Return what was done since `before`, less the files that were `restored` from a bundle."""
    made = sorted(path.name for path in snapshot() - before - restored)
    return CompileWork(
        kernels=tuple(m["name"] for m in map(KERNEL.fullmatch, made) if m),
        helpers=tuple(m["name"] for m in map(HELPER.fullmatch, made) if m),
        benchmarks=benchmarks(),
        workers=workers_started(),
    )


def benchmarks() -> int:
    """Return how many timings for tuning were made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    counts = dynamo.counters["inductor"] if dynamo else {}
    return sum(count for name, count in counts.items() if BENCHMARKS.fullmatch(name))


def workers_started() -> int:
    """Return how many pools of compile workers were started in this process."""
    module = sys.modules.get("torch._inductor.async_compile")
    return module.AsyncCompile.process_pool.cache_info().misses if module else 0
