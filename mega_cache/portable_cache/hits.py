"""Which compiled graphs a process looked up in torch's caches, and why one missed.

lookups = watch_lookups()              before the artifact is loaded
...
missed(lookups, those of the build)    one line for each miss; empty is a full hit
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

_TENSOR = re.compile(r"dtype=torch\.(?P<dtype>\w+), shape=torch\.Size\((?P<shape>[^)]*)\)")
_COMPONENT = re.compile(r"\[(?P<digest>[^\]]+)\] (?P<name>.*?): (?P<value>.*)", re.DOTALL)
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Lookup:
    cache: str  # "fx_graph" or "aot_autograd"
    key: str
    hit: bool
    components: dict[str, str]  # part of the key -> its digest and a shortened value


_known_keys: set[str] = set()


def know_keys(keys: Iterable[str]) -> None:
    """Spell out no parts of these keys when they are looked up: on 2.13 that is costly."""
    _known_keys.update(keys)


@functools.cache
def watch_lookups() -> list[Lookup]:
    """Return a list that grows with every look-up of this process: observed, nothing steered."""
    lookups: list[Lookup] = []
    _observe_fx_cache(lookups)
    _observe_aot_cache(lookups)
    return lookups


def _observe_fx_cache(lookups: list[Lookup]) -> None:
    # Private, 2.9 to 2.13: every look-up passes here, from AOTAutograd's hit and from a compile.
    from torch._inductor.codecache import FxGraphCache

    stock = FxGraphCache.load_with_key

    @functools.wraps(stock)
    def load_with_key(key, debug_lines, *args, **kwargs):
        graph, info = stock(key, debug_lines, *args, **kwargs)
        lookups.append(Lookup("fx_graph", key, graph is not None, key_components(debug_lines)))
        return graph, info

    FxGraphCache.load_with_key = staticmethod(load_with_key)


def _observe_aot_cache(lookups: list[Lookup]) -> None:
    # Private, 2.9 to 2.13: the key is made first, then looked up.
    from torch._functorch._aot_autograd import autograd_cache

    lines_of: dict[str, list[str]] = {}
    stock_key = autograd_cache.autograd_cache_key
    stock_lookup = autograd_cache.AOTAutogradCache._lookup

    @functools.wraps(stock_key)
    def autograd_cache_key(*args, **kwargs):
        key, lines = stock_key(*args, **kwargs)
        lines_of[key] = lines
        return key, lines

    @functools.wraps(stock_lookup)
    def lookup(key, *args, **kwargs):
        result = stock_lookup(key, *args, **kwargs)
        components = key_components(lines_of.get(key, ()))
        lookups.append(Lookup("aot_autograd", key, result is not None, components))
        return result

    autograd_cache.autograd_cache_key = autograd_cache_key
    autograd_cache.AOTAutogradCache._lookup = staticmethod(lookup)
    # Later torch (seen on 2.13) spells out the parts of a key only for a debug log.
    if hasattr(autograd_cache, "_get_debug_lines_for_cache_key"):
        autograd_cache._get_debug_lines_for_cache_key = _lines_unless_known


def _lines_unless_known(pickler, details, key) -> list[str]:
    return [] if key in _known_keys else pickler.debug_lines(details)


def key_components(lines: Iterable[str]) -> dict[str, str]:
    """Return {part of a cache key: "digest value"} from torch's "[digest] name: value" lines."""
    parts = (_COMPONENT.fullmatch(line) for line in lines)
    return {p["name"]: f"{p['digest'][:12]} {_shortened(p['value'])}" for p in parts if p}


def _shortened(value: str) -> str:
    tensor = _TENSOR.search(value)
    return f"{tensor['dtype']}{tensor['shape']}" if tensor else " ".join(value.split())[:60]


def parse_lookups(records: list[dict]) -> list[Lookup]:
    """Return the look-ups that a build wrote into its metadata."""
    return [Lookup(**record) for record in records]


# ---- what did not hit --------------------------------------------------------------------


def missed(lookups: Sequence[Lookup], built: Sequence[Lookup]) -> list[str]:
    """Return one line for each look-up that missed: in what it differs from the build's nearest."""
    return [
        f"{lookup.cache} {lookup.key[:12]} missed: "
        + ("; ".join(_differing(lookup, built)) or "no graph of the build is comparable")
        for lookup in _without_abandoned(lookups)
        if not lookup.hit
    ]


def made_anew(counts: dict[str, int | None], kernels: Sequence[Path]) -> list[str]:
    """Return one line for each kind of thing that was built in this process and not loaded."""
    names = ", ".join(path.name for path in kernels[:_NAMED_AT_MOST])
    kinds = {
        "kernels_compiled": f"kernels compiled ({names})",
        "kernels_tuned": "kernels tuned",
        "helpers_built": "C helpers built",
        "compile_workers": "pools of compile workers started",
    }
    return [f"{counts[name]} {text}" for name, text in kinds.items() if counts.get(name)]


def _without_abandoned(lookups: Sequence[Lookup]) -> list[Lookup]:
    """Return `lookups` less the AOTAutograd misses after which nothing was compiled.

    With `dynamic=True` dynamo makes Python floats symbolic, AOTAutograd turns them back into
    numbers and has the trace start over (TensorifyScalarRestartAnalysis, 2.9 to 2.13). The first
    trace's look-up misses at build and at run alike. A miss that leads to a compile is followed
    by a look-up of its FX graph; that one by another AOTAutograd look-up.
    """
    following = [lookup.cache for lookup in lookups[1:]]
    return [
        lookup
        for lookup, after in zip_longest(lookups, following)
        if lookup.hit or lookup.cache != "aot_autograd" or after != "aot_autograd"
    ]


def _differing(run: Lookup, built: Sequence[Lookup], most: int = 8) -> list[str]:
    """Return "name: built ..., run ..." for the parts in which a missed key differs.

    Compared with the look-up of the same cache at build that differs in the fewest parts.
    """
    candidates = [one for one in built if one.cache == run.cache and one.components]
    if not candidates or not run.components:
        return []
    nearest, names = min(
        ((other, _differences(run, other)) for other in candidates), key=lambda pair: len(pair[1])
    )
    shown = [f"{n}: built {_value(nearest, n)}, run {_value(run, n)}" for n in names[:most]]
    return shown + ([f"and {len(names) - most} more"] if len(names) > most else [])


def _differences(one: Lookup, other: Lookup) -> list[str]:
    names = sorted(one.components.keys() | other.components.keys())
    return [name for name in names if _digest(one, name) != _digest(other, name)]


def _digest(lookup: Lookup, name: str) -> str:
    # Alone: a value may show an address, which is not in the key.
    return lookup.components.get(name, "").partition(" ")[0]


def _value(lookup: Lookup, name: str) -> str:
    return lookup.components.get(name, "? absent").partition(" ")[2]
