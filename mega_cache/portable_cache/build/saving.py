"""Save what this process compiled as one mega-cache blob, complete for a load (start/bundle.py)."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import ScriptError
from portable_cache import torch_private
from portable_cache.build import tuned_kernels
from portable_cache.start import bundle, cpu_kernels


class SavedBundle(NamedTuple):
    blob: bytes
    entries: dict[str, int]  # number of entries by kind, the decode step as one of its own


def watch() -> None:
    """From now on remember what this process compiles and loads, as far as torch doesn't."""
    cpu_kernels.record()
    tuned_kernels.watch()


def save_bundle(decode_step: bytes | None = None) -> SavedBundle:
    """Return everything this process compiled, and its `decode_step`, as one blob.

    Raises ScriptError when nothing was compiled, or when a kernel can't be saved as it ran.
    """
    entries = torch_private.new_artifacts
    if not entries.get("inductor"):
        raise ScriptError("no graph was compiled that could be saved: warm up first")
    with torch_private.losing("a load tunes and compiles Triton kernels again"):
        _pin_tuned_kernels(entries)
    if cpu_kernels.recorded:
        _record(cpu_kernels.KIND, cpu_kernels.BUILT_FOR, cpu_kernels.built_for())  # read first
    for digest, path in cpu_kernels.recorded.items():
        _record(cpu_kernels.KIND, "/".join((digest, *path.parts[-2:])), path.read_bytes())
    counts = {kind: len(found) for kind, found in entries.items()}
    if decode_step:
        counts["decode_step"] = 1
        entries["autotune"].append(torch_private.PlainFile(bundle.DECODE_STEP, decode_step))
    blob, _ = torch_private.CacheArtifactManager.serialize()
    return SavedBundle(blob, counts)


def _record(kind: str, key: str, content: bytes) -> None:
    torch_private.CacheArtifactManager.record_artifact(kind, key, content)


def _pin_tuned_kernels(entries: dict[str, list[Any]]) -> None:
    """Put Triton kernels into the graphs as they ran, and Triton's C helper beside them."""
    if not tuned_kernels.ran:
        return
    for kind in {"inductor", "aot_autograd"} & entries.keys():
        entries[kind] = [
            replace(entry, content=tuned_kernels.pin(entry.content)) for entry in entries[kind]
        ]
    tuned_kernels.check_all_pinned()
    # What Triton builds with gcc in every process that has a kernel to run. It is in no table, but
    # its functions know it.
    helper = Path(torch_private.triton_driver.active.utils.load_binary.__self__.__file__)
    key = f"triton/0/{helper.parent.name}/{helper.name}"
    entries["autotune"].append(torch_private.PlainFile(key, helper.read_bytes()))
