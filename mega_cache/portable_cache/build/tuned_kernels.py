"""Save the Triton kernels that tuning chose, and only those: a load tunes and compiles none.

Inductor saves a graph when it has been compiled, with each kernel in every configuration there is
to choose from. The choice comes later, at the kernel's first run, so the saved graph does not know
it, and a process that loads the graph tunes again and compiles what tuning asks for: with
max-autotune every kernel, in the other modes those with several configurations, and reductions that
need many registers. torch has no setting against it (pytorch #172819).

A kernel is pinned when it ran and when torch can launch it without Triton ("statically"). Any other
would be compiled or tuned again, so it fails the build instead.
"""

import copy
import copyreg
import functools
import pickle
from pathlib import Path
from typing import Any

from common.errors import ScriptError
from portable_cache import torch_private

# What makes a loaded kernel look for a better configuration; combo kernels are tuned from 2.12 on.
NO_MORE_TUNING = {
    "coordinate_descent_tuning": False,
    "dynamic_scale_rblock": False,
    "combo_tuning_groups": None,
}

_autotuners: dict[str, list[Any]] = {}  # by digest of the kernel's source
ran: dict[int, Any] = {}  # id -> itself, so that the id stays its own
_unpinned: set[str] = set()


@functools.cache
def watch() -> None:
    """Remember every Triton kernel that is compiled or loaded, and which of them run.

    At a build, before the first compile. Kernels that select_algorithm tries out belong to no
    graph: they run as benchmarks only.
    """
    with torch_private.losing("a load tunes and compiles Triton kernels again"):
        put, load = torch_private.put_autotuner, torch_private.load_autotuners
        run = torch_private.run_kernel

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

        torch_private.replace("put_autotuner", staticmethod(put_static_autotuner))
        torch_private.replace("load_autotuners", staticmethod(load_autotuners))
        torch_private.replace("run_kernel", run_and_remember)


def pin(content: bytes) -> bytes:
    """Return a graph that torch pickled, pickled with its kernels as they ran."""
    graph = pickle.loads(content)
    copyreg.pickle(torch_private.TritonBundle, _reduce_bundle)
    try:
        return pickle.dumps(graph)
    finally:
        del copyreg.dispatch_table[torch_private.TritonBundle]


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


def _reduce_bundle(bundle: Any) -> tuple[type, tuple]:
    """Return what pickle makes of a TritonBundle: its kernels as they ran, one cubin each."""
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
        folder = torch_private.triton_folder(winner.kernel.hash)
        name = f"{winner.kernel.name}.cubin"
        cubin = Path(torch_private.triton_cache_dir(device), folder, name).read_bytes()
        file = torch_private.KernelFile(name, cubin)
        artifacts.append(torch_private.KernelFiles(folder, device, [file]))
    return type(bundle), (artifacts, pinned)


def _winner(live: Any) -> Any:
    """Return a copy of the compile result behind the one launcher that tuning left."""
    key_of = torch_private.config_key
    (launcher,) = live.launchers
    wanted = key_of(launcher.config)
    same = [result for result in live.compile_results if key_of(result.config) == wanted]
    # coordinate descent keeps the launcher only; Triton's cache has what it compiled
    found = same[0] if same else torch_private.compile_config(live, launcher.config)
    winner = copy.copy(found)
    winner.kernel = copy.copy(found.kernel)  # through __getstate__: no handle, no path
    winner.kernel.cubin_raw = None
    return winner
