"""Which compiled graphs a process looked up in torch's caches, and why one missed.

lookups = watch_lookups()              before the artifact is loaded
...
missed(lookups, those of the build)    one line for each miss; empty is a full hit
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from portable_cache import torch_private

# how torch writes a part of a key
_COMPONENT = re.compile(r"\[(?P<digest>[^\]]+)\] (?P<name>.*?): (?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class Lookup:
    cache: str  # "fx_graph" or "aot_autograd"
    key: str
    hit: bool
    components: dict[str, Sequence[str]]  # of an fx_graph's key: its digest and a shortened value


@functools.cache
def watch_lookups() -> list[Lookup]:
    """Return a list that grows with every look-up of this process: observed, nothing steered."""
    lookups: list[Lookup] = []
    with torch_private.losing("which graphs missed, and why, is not told"):
        # AOTAutograd's cache is asked first; at its hit and at a compile alike the FX graph's is,
        # and what makes the one miss shows in the key of the other
        stock_lookup, stock_load = torch_private.look_up_autograd, torch_private.look_up_graph

        def lookup(key, *args, **kwargs):
            found = stock_lookup(key, *args, **kwargs)
            lookups.append(Lookup("aot_autograd", key, found is not None, {}))
            return found

        def load_with_key(key, debug_lines, *args, **kwargs):
            graph, info = stock_load(key, debug_lines, *args, **kwargs)
            parts = [part for line in debug_lines if (part := _COMPONENT.fullmatch(line))]
            components = {
                p["name"]: (p["digest"], " ".join(p["value"].split())[:80]) for p in parts
            }
            lookups.append(Lookup("fx_graph", key, graph is not None, components))
            return graph, info

        torch_private.replace("look_up_autograd", staticmethod(lookup))
        torch_private.replace("look_up_graph", staticmethod(load_with_key))
    return lookups


def missed(lookups: Sequence[Lookup], built: Sequence[Lookup]) -> list[str]:
    """Return one line for each look-up that missed: in what it differs from the build's nearest."""
    lines = []
    for lookup in (one for one in lookups if not one.hit):
        differing = [_differences(lookup, other) for other in built if other.components]
        nearest = min(differing, key=len, default=[]) if lookup.components else []
        why = f": {'; '.join(nearest[:8])}" if nearest else ""
        lines.append(f"{lookup.cache} {lookup.key[:12]} missed{why}")
    return lines


def _differences(run: Lookup, other: Lookup) -> list[str]:
    differing = []
    for name in sorted(run.components.keys() | other.components.keys()):
        digest, value = run.components.get(name, ("", "absent"))
        digest_built, value_built = other.components.get(name, ("", "absent"))
        if digest != digest_built:  # alone: a value may show an address, which is not in the key
            differing.append(f"{name}: built {value_built}, run {value}")
    return differing


def made_anew(counts: dict[str, int | None], kernels: Sequence[Path], may_trace: bool) -> list[str]:
    """Return one line for each kind of thing that was made in this process and not loaded."""
    names = ", ".join(path.name for path in kernels[:5])
    kinds = {
        "unique_graphs": "graphs traced",
        "fxgraph_cache_miss": "graphs compiled",
        "kernels_compiled": f"kernels compiled ({names})",
        "kernels_tuned": "kernels tuned",
        "helpers_built": "C helpers built",
        "compile_workers": "pools of compile workers started",
    }
    if may_trace:
        del kinds["unique_graphs"]
    return [f"{counts[name]} {text}" for name, text in kinds.items() if counts.get(name)]
