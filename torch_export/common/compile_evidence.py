"""What the compiler really did in this process: counters, kernels compiled, hits and misses.

    watch = watch_compilation()              before the first compile: imports inductor (0.8 s)
    ...
    evidence = read_evidence(watch)          CompileEvidence, plain ints or None
    watch.graphs                             one GraphLookup for each graph and cache

A process that never compiles calls `read_evidence(None)`: dynamo is not imported for it, and where
it is absent no graph was captured or looked up, so those counts are a true 0. What needs the watch
(kernels_compiled, cudagraph_replays) is None without it, but for kernels_compiled where inductor is
absent: 0, for there was nobody to compile one.
"""

import functools
import os
import re
import sys
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

# JSON name -> (group, name) in torch._dynamo.utils.counters; the same on 2.9 to 2.13.
COUNTERS = {
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
CPU_KERNELS = re.compile(r".*\.main\.so")
GPU_KERNELS = re.compile(r".*\.(cubin|hsaco|spv)")
TENSOR = re.compile(r"dtype=torch\.(?P<dtype>\w+), shape=torch\.Size\((?P<shape>[^)]*)\)")
COMPONENT = re.compile(r"\[(?P<digest>[^\]]+)\] (?P<name>.*?): (?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class CompileEvidence:
    unique_graphs: int | None
    calls_captured: int | None
    async_compile_miss: int | None
    async_compile_hit: int | None
    fxgraph_cache_hit: int | None
    fxgraph_cache_miss: int | None
    fxgraph_cache_bypass: int | None
    aot_autograd_cache_hit: int | None
    aot_autograd_cache_miss: int | None
    aot_autograd_cache_bypass: int | None
    recompiles: int | None
    cudagraph_skips: int | None
    cudagraph_replays: int | None
    kernels_compiled: int | None


@dataclass(frozen=True)
class GraphLookup:
    cache: str  # "fx_graph" or "aot_autograd"
    key: str
    hit: bool
    components: dict[str, str]  # part of the key -> its digest and a shortened value


@dataclass
class Watch:
    """Grows while the process compiles: everything in it is observed, nothing steered."""

    kernels_before: frozenset[Path]
    restored: set[Path] = field(default_factory=set)
    graphs: list[GraphLookup] = field(default_factory=list)
    cudagraph_replays: int = 0


# ---- counters ----------------------------------------------------------------------------


def read_evidence(watch: Watch | None) -> CompileEvidence:
    """Return the counts of this process up to now; imports nothing."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        counts = dict.fromkeys((*COUNTERS, "recompiles"), 0)
    else:
        counts = {name: int(dynamo.counters[g][c]) for name, (g, c) in COUNTERS.items()}
        counts["recompiles"] = count_recompiles(dynamo)
    return CompileEvidence(
        **counts,
        cudagraph_replays=watch.cudagraph_replays if watch else None,
        kernels_compiled=count_kernels_compiled(watch) if watch else none_or_unknown(),
    )


def count_recompiles(dynamo) -> int:
    # The metrics keep a reason for every compile of a frame that failed its guards, also across
    # torch._dynamo.reset(), which clears the frame counters. They hold the last 64 compiles.
    return sum(bool(metrics.recompile_reason) for metrics in dynamo.get_compilation_metrics())


# ---- kernels -----------------------------------------------------------------------------


def kernel_files() -> frozenset[Path]:
    """Return the compiled kernels in this process's cache folders.

    Files, not calls, are counted: inductor compiles C++ in threads and Triton in worker
    processes, where a hook of the parent sees nothing, but all write into these folders.
    """
    # Private: the only way to ask for the default folder; same module on 2.9 to 2.13.
    from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir

    cpp = _files_below(Path(cache_dir()).resolve(), CPU_KERNELS)
    return cpp | _files_below(Path(triton_cache_dir(0)).resolve(), GPU_KERNELS)


def _files_below(root: Path, pattern: re.Pattern) -> frozenset[Path]:
    return frozenset(
        Path(folder, name)
        for folder, _, names in os.walk(root)
        for name in names
        if pattern.fullmatch(name)
    )


def none_or_unknown() -> int | None:
    return None if "torch._inductor" in sys.modules else 0


def count_kernels_compiled(watch: Watch) -> int:
    """Return how many kernels appeared in the cache folders that no bundle put there.

    Another process that compiles into the same folders at the same time is counted too.
    """
    return len(kernel_files() - watch.kernels_before - watch.restored)


# ---- hooks -------------------------------------------------------------------------------


def watch_compilation(known_keys: frozenset[str] = frozenset()) -> Watch:
    """Start to observe; call before loading a bundle and before the first compile.

    `known_keys`: keys of a loaded bundle, whose parts need not be spelt out (2.13: costly).
    """
    watch = _watch()
    _known_keys.update(known_keys)
    return watch


_known_keys: set[str] = set()


@functools.cache
def _watch() -> Watch:
    watch = Watch(kernels_before=kernel_files())
    _observe_fx_cache(watch)
    _observe_aot_cache(watch)
    _observe_triton_bundles(watch)
    _observe_cuda_graphs(watch)
    return watch


def _observe_fx_cache(watch: Watch) -> None:
    # Private, 2.9 to 2.13: every look-up passes here, from AOTAutograd's hit and from a compile.
    from torch._inductor.codecache import FxGraphCache

    stock = FxGraphCache.load_with_key

    @functools.wraps(stock)
    def load_with_key(key, debug_lines, *args, **kwargs):
        graph, info = stock(key, debug_lines, *args, **kwargs)
        lookup = GraphLookup("fx_graph", key, graph is not None, key_components(debug_lines))
        watch.graphs.append(lookup)
        return graph, info

    FxGraphCache.load_with_key = staticmethod(load_with_key)


def _observe_aot_cache(watch: Watch) -> None:
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
        watch.graphs.append(GraphLookup("aot_autograd", key, result is not None, components))
        return result

    autograd_cache.autograd_cache_key = autograd_cache_key
    autograd_cache.AOTAutogradCache._lookup = staticmethod(lookup)
    # Later torch (seen on 2.13) spells out the parts of a key only for a debug log.
    if hasattr(autograd_cache, "_get_debug_lines_for_cache_key"):
        autograd_cache._get_debug_lines_for_cache_key = _lines_unless_known


def _lines_unless_known(pickler, details, key) -> list[str]:
    return [] if key in _known_keys else pickler.debug_lines(details)


def _observe_triton_bundles(watch: Watch) -> None:
    # Private, 2.9 to 2.13. A graph entry carries its cubins and writes them at a hit: those are
    # restored, not compiled. NOT PROVEN ON CUDA.
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from torch._inductor.triton_bundler import TritonBundler

    stock = TritonBundler.read_and_emit

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
    # NOT PROVEN ON CUDA.
    import torch

    stock = torch.cuda.CUDAGraph.replay

    @functools.wraps(stock)
    def replay(self):
        watch.cudagraph_replays += 1
        return stock(self)

    torch.cuda.CUDAGraph.replay = replay


# ---- why a graph missed ------------------------------------------------------------------


def key_components(lines) -> dict[str, str]:
    """Return {part of a cache key: "digest value"} from torch's "[digest] name: value" lines."""
    parts = (COMPONENT.fullmatch(line) for line in lines)
    return {p["name"]: f"{p['digest'][:12]} {_shortened(p['value'])}" for p in parts if p}


def _shortened(value: str) -> str:
    tensor = TENSOR.search(value)
    return f"{tensor['dtype']}{tensor['shape']}" if tensor else value[:60]


def missed(graphs: list[GraphLookup], built: list[GraphLookup]) -> list[str]:
    """Return one line for each look-up that missed, for `--require-hit`; empty is a full hit."""
    return [
        f"{graph.cache} {graph.key[:12]} missed: "
        + ("; ".join(differing_components(graph, built)) or "no graph of the build is comparable")
        for graph in without_abandoned(graphs)
        if not graph.hit
    ]


def without_abandoned(graphs: list[GraphLookup]) -> list[GraphLookup]:
    """Return `graphs` less the AOTAutograd misses after which nothing was compiled.

    With `dynamic=True` dynamo makes Python floats symbolic, AOTAutograd turns them back into
    numbers and has the trace start over (TensorifyScalarRestartAnalysis, 2.9 to 2.13). The first
    trace's look-up misses at build and at run alike. A miss that leads to a compile is followed
    by a look-up of its FX graph; that one by another AOTAutograd look-up.
    """
    following = [graph.cache for graph in graphs[1:]]
    return [
        graph
        for graph, after in zip_longest(graphs, following)
        if graph.hit or graph.cache != "aot_autograd" or after != "aot_autograd"
    ]


def differing_components(run: GraphLookup, built: list[GraphLookup], most: int = 8) -> list[str]:
    """Return "name: built ..., run ..." for the parts in which a missed key differs.

    Compared with the graph of the same cache at build that differs in the fewest parts.
    """
    candidates = [g for g in built if g.cache == run.cache and g.components]
    if not candidates or not run.components:
        return []
    nearest, names = min(
        ((other, _differences(run, other)) for other in candidates), key=lambda pair: len(pair[1])
    )
    shown = [f"{n}: built {_value(nearest, n)}, run {_value(run, n)}" for n in names[:most]]
    return shown + ([f"and {len(names) - most} more"] if len(names) > most else [])


def _differences(one: GraphLookup, other: GraphLookup) -> list[str]:
    names = sorted(one.components.keys() | other.components.keys())
    return [name for name in names if _digest(one, name) != _digest(other, name)]


def _digest(graph: GraphLookup, name: str) -> str:
    # Alone: a value may show an address, which is not in the key.
    return graph.components.get(name, "").partition(" ")[0]


def _value(graph: GraphLookup, name: str) -> str:
    return graph.components.get(name, "? absent").partition(" ")[2]


def parse_graphs(records: list[dict]) -> list[GraphLookup]:
    """Return the look-ups that a build wrote into its metadata."""
    return [GraphLookup(**record) for record in records]
