"""Change compiled graphs as they are pickled, so that a load has nothing left to do but to load.

Each Triton kernel is pinned to the configuration it ran with (tuned_kernels). The generated code
imports only what it uses: its head asks for Inductor's code generator and matrix templates (1.3 s),
of which the code below seldom uses anything. And a load doesn't add the build's counts to its own,
which torch does for tests of its own: what was timed and compiled at a run is then what was.
"""

import ast
import copyreg
import pickle
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from portable_cache import tuned_kernels

# names library calls; most are torch's own functions under the same name
LIBRARY_CALLS = "extern_kernels"


@contextmanager
def load_ready() -> Iterator[None]:
    """Within, pickle writes compiled graphs in the form that loads fastest."""
    # Private, the same names on 2.9 to 2.13.
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.triton_bundler import TritonBundle

    copyreg.pickle(TritonBundle, tuned_kernels.reduce_bundle)
    copyreg.pickle(CompiledFxGraph, _reduce_graph)
    try:
        yield
    finally:
        del copyreg.dispatch_table[TritonBundle], copyreg.dispatch_table[CompiledFxGraph]


def repickle(content: bytes) -> bytes:
    """Return a graph that torch pickled, pickled `load_ready`."""
    value = pickle.loads(content)
    with load_ready():
        return pickle.dumps(value)


def _reduce_graph(graph: Any) -> tuple:
    build, arguments, state, *_ = object.__reduce_ex__(graph, 2)
    source_code = import_only_what_is_used(state["source_code"])
    return build, arguments, state | {"source_code": source_code, "counter_deltas": Counter()}


def import_only_what_is_used(source: str) -> str:
    """Return generated code without the imports of Inductor that nothing in it uses.

    Every line keeps its number: Inductor maps them to the model's lines.
    """
    tree = ast.parse(source)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    lines = source.splitlines(keepends=True)
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith("torch._inductor"):
            continue
        names = [alias.asname or alias.name for alias in node.names]
        if not used.intersection(names):
            replacement = "\n"
        elif names == [LIBRARY_CALLS] and _all_are_torchs_own(tree):
            replacement = f"import torch as {LIBRARY_CALLS}\n"
        else:
            continue
        more_lines = node.end_lineno - node.lineno
        lines[node.lineno - 1 : node.end_lineno] = [replacement] + ["\n"] * more_lines
    return "".join(lines)


def _all_are_torchs_own(tree: ast.Module) -> bool:
    from torch._inductor.select_algorithm import extern_kernels

    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    calls = [node.attr for node in attributes if getattr(node.value, "id", "") == LIBRARY_CALLS]
    return all(getattr(torch, name, None) is getattr(extern_kernels, name) for name in calls)
