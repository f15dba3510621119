"""Save what this process compiled as one mega-cache blob, complete for a load (start/bundle.py).

torch saves a graph when it has been compiled, with each Triton kernel in every configuration there
is to choose from. The choice comes later, at the kernel's first run, so a process that loads the
graph tunes again and compiles what tuning asks for, in any mode; torch has no setting against it
(pytorch #172819). Here only what was chosen is saved: kernels are pinned. That needs a kernel that
ran and that torch can launch without Triton ("statically"); any other fails the build.
"""

import copy
import copyreg
import functools
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import ScriptError
from portable_cache import torch_private
from portable_cache.start import bundle, cpu_kernels

# What makes a loaded kernel look for a better configuration; combo kernels are tuned from 2.12 on.
NO_MORE_TUNING = {
    "coordinate_descent_tuning": False,
    "dynamic_scale_rblock": False,
    "combo_tuning_groups": None,
}

_autotuners: dict[str, list[Any]] = {}  # Triton kernels by digest of their source
_ran: dict[int, Any] = {}  # id -> itself, so that the id stays its own


@functools.cache
def watch() -> None:
    """Remember, from before the first compile, the kernels that are compiled or loaded, and run.

    Triton kernels that select_algorithm tries out belong to no graph: they run as benchmarks only.
    """
    cpu_kernels.record()
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
                _ran[id(self)] = self
            return run(self, *args, benchmark_run=benchmark_run, **kwargs)

        torch_private.replace("put_autotuner", staticmethod(put_static_autotuner))
        torch_private.replace("load_autotuners", staticmethod(load_autotuners))
        torch_private.replace("run_kernel", run_and_remember)


def save_bundle(decode_step: bytes | None = None) -> tuple[bytes, dict[str, int]]:
    """Return everything this process compiled, and its `decode_step`, as one blob.

    Beside it the number of its entries by kind, the decode step as one of its own. Raises
    ScriptError when nothing was compiled, or when a kernel can't be saved as it ran.
    """
    manager, entries = torch_private.CacheArtifactManager, torch_private.new_artifacts
    if not entries.get("inductor"):
        raise ScriptError("no graph was compiled that could be saved: warm up first")
    with torch_private.losing("a load tunes and compiles Triton kernels again"):
        if _ran:
            _pin_tuned_kernels(entries)
    if cpu_kernels.recorded:  # read first
        built_for = cpu_kernels.built_for()
        manager.record_artifact(cpu_kernels.KIND, cpu_kernels.BUILT_FOR, built_for)
    for digest, path in cpu_kernels.recorded.items():
        key = "/".join((digest, *path.parts[-2:]))
        manager.record_artifact(cpu_kernels.KIND, key, path.read_bytes())
    counts = {kind: len(found) for kind, found in entries.items()}
    if decode_step:
        counts["decode_step"] = 1
        entries["autotune"].append(torch_private.PlainFile(bundle.DECODE_STEP, decode_step))
    blob, _ = manager.serialize()
    return blob, counts


def _pin_tuned_kernels(entries: dict[str, list[Any]]) -> None:
    """Put Triton kernels into the graphs as they ran, and Triton's C helper beside them."""
    static = {id(kernel) for kernels in _autotuners.values() for kernel in kernels}
    names = {kernel.inductor_meta.get("kernel_name", "a kernel without a name")
             for key, kernel in _ran.items() if key not in static}  # fmt: skip
    problems = [f"{name} ran, but torch cannot launch it without Triton" for name in sorted(names)]
    unpinned: set[str] = set()
    copyreg.pickle(torch_private.TritonBundle, functools.partial(_reduce_bundle, unpinned))
    try:
        for kind in {"inductor", "aot_autograd"} & entries.keys():
            entries[kind] = [
                replace(entry, content=pickle.dumps(pickle.loads(entry.content)))
                for entry in entries[kind]
            ]
    finally:
        del copyreg.dispatch_table[torch_private.TritonBundle]
    problems += [f"{name} was compiled, but never ran" for name in sorted(unpinned)]
    if problems:
        raise ScriptError(
            f"every load would compile or tune again: {'; '.join(problems)}. Nothing is saved"
        )
    # What Triton builds with gcc in every process that has a kernel to run. It is in no table, but
    # its functions know it.
    helper = Path(torch_private.triton_driver.active.utils.load_binary.__self__.__file__)
    key = f"triton/0/{helper.parent.name}/{helper.name}"
    entries["autotune"].append(torch_private.PlainFile(key, helper.read_bytes()))


def _reduce_bundle(unpinned: set[str], bundle: Any) -> tuple[type, tuple]:
    """Return what pickle makes of a TritonBundle: its kernels as they ran, one cubin each."""
    pinned, artifacts = [], []
    for entry in bundle.static_autotuners:
        live = [one for one in _autotuners.get(entry.cache_key, ()) if id(one) in _ran]
        if not live:
            unpinned.add(entry.kernel_name)
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
