"""Save the Triton kernels that tuning chose, and only those: a load tunes and compiles none.

Inductor saves a graph when it has been compiled, with each kernel in every configuration there is
to choose from. The choice comes later, at the kernel's first run, so the saved graph does not know
it, and a process that loads the graph tunes again and compiles what tuning asks for: with
max-autotune every kernel, in the other modes those with several configurations, and reductions that
need many registers. torch has no setting against it (2.9 to 2.13; pytorch #172819).

A kernel is pinned when it ran and when torch can launch it without Triton ("statically"). Any other
would be compiled or tuned again, so it fails the build instead. Private names, the same on torch
2.9 to 2.13 unless a comment says otherwise.
"""

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ScriptError

if TYPE_CHECKING:
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.triton_bundler import TritonBundle

# What makes a loaded kernel look for a better configuration; combo kernels are tuned from 2.12 on.
NO_MORE_TUNING = {
    "coordinate_descent_tuning": False,
    "dynamic_scale_rblock": False,
    "combo_tuning_groups": None,
}

_autotuners: dict[str, list["CachingAutotuner"]] = {}  # by digest of the kernel's source
ran: dict[int, "CachingAutotuner"] = {}  # id -> itself, so that the id stays its own
_unpinned: set[str] = set()


@functools.cache
def watch() -> None:
    """Remember every Triton kernel that is compiled or loaded, and which of them run.

    At a build, before the first compile. Kernels that select_algorithm tries out belong to no
    graph: they run as benchmarks only.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.triton_bundler import TritonBundler

    put, load = TritonBundler.put_static_autotuner, TritonBundler.load_autotuners
    run = CachingAutotuner.run

    def put_static_autotuner(key, kernel):
        _autotuners.setdefault(key, []).append(kernel)
        return put(key, kernel)

    def load_autotuners(static_autotuners):
        for entry in static_autotuners or ():
            _autotuners.setdefault(entry.cache_key, []).append(entry.kernel)
        return load(static_autotuners)

    def run_and_remember(self, *args, benchmark_run=False, **kwargs):
        if not benchmark_run:
            ran[id(self)] = self
        return run(self, *args, benchmark_run=benchmark_run, **kwargs)

    TritonBundler.put_static_autotuner = staticmethod(put_static_autotuner)
    TritonBundler.load_autotuners = staticmethod(load_autotuners)
    CachingAutotuner.run = run_and_remember


def check_all_pinned() -> None:
    """Raise ScriptError, naming them, unless what was pickled has every kernel that ran."""
    static = {id(kernel) for kernels in _autotuners.values() for kernel in kernels}
    never_static = {
        kernel.inductor_meta.get("kernel_name", "a kernel without a name")
        for key, kernel in ran.items()
        if key not in static
    }
    problems = [f"{n} ran, but torch cannot launch it without Triton" for n in sorted(never_static)]
    problems += [f"{name} was compiled, but never ran" for name in sorted(_unpinned)]
    if problems:
        raise ScriptError(
            f"every load would compile or tune again: {'; '.join(problems)}. Nothing is saved"
        )


def reduce_bundle(bundle: "TritonBundle") -> tuple[type, tuple]:
    """Return what pickle makes of a bundle: its kernels as they ran, one cubin each."""
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from torch._inductor.runtime.triton_heuristics import triton_hash_to_path_key
    from torch._inductor.triton_bundler import TritonKernelArtifact, TritonKernelArtifacts

    pinned, artifacts = [], []
    for entry in bundle.static_autotuners:
        live = [one for one in _autotuners.get(entry.cache_key, ()) if id(one) in ran]
        if not live:
            _unpinned.add(entry.kernel_name)
            continue
        kernel, winner = copy.copy(entry.kernel), _winner(live[-1])
        kernel.inductor_meta = winner.inductor_meta = entry.kernel.inductor_meta | NO_MORE_TUNING
        kernel.compile_results = [winner]
        pinned.append(type(entry)(entry.cache_key, entry.kernel_name, kernel))
        device = kernel.triton_meta.get("device") or 0
        folder = triton_hash_to_path_key(winner.kernel.hash)
        name = f"{winner.kernel.name}.cubin"
        cubin = Path(triton_cache_dir(device), folder, name).read_bytes()
        artifacts.append(TritonKernelArtifacts(folder, device, [TritonKernelArtifact(name, cubin)]))
    return type(bundle), (artifacts, pinned)


def _winner(live: "CachingAutotuner") -> Any:
    """Return a copy of the compile result behind the one launcher that tuning left."""
    from torch._inductor.runtime.triton_heuristics import triton_config_to_hashable

    (launcher,) = live.launchers
    wanted = triton_config_to_hashable(launcher.config)
    same = [r for r in live.compile_results if triton_config_to_hashable(r.config) == wanted]
    # coordinate descent keeps the launcher only; Triton's cache has what it compiled
    found = same[0] if same else live._precompile_config(launcher.config)
    winner = copy.copy(found)
    winner.kernel = copy.copy(found.kernel)  # through __getstate__: no handle, no path
    winner.kernel.cubin_raw = None
    return winner
