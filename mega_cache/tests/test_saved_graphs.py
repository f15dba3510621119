"""What a saved graph's code imports is what it uses, and it stays the same code."""

import ast

import torch

from portable_cache.saved_graphs import import_only_what_is_used

HEAD = """# AOT ID: ['0_inference']
import math
import torch
from torch._inductor.codegen.memory_planning import _align as align
from torch._inductor.select_algorithm import extern_kernels
from torch._inductor.hooks import (
    run_intermediate_hooks,
)
from torch import device, empty_strided
"""


def imports(source):
    return [ast.unparse(n) for n in ast.parse(source).body if isinstance(n, ast.ImportFrom)]


def test_unused_imports_of_inductor_go_and_every_line_keeps_its_number():
    source = HEAD + "def call(x):\n    return empty_strided(x)\n"
    lean = import_only_what_is_used(source)
    assert imports(lean) == ["from torch import device, empty_strided"]
    assert lean.splitlines()[9:] == source.splitlines()[9:]
    assert len(lean.splitlines()) == len(source.splitlines())


def test_what_is_used_stays():
    lean = import_only_what_is_used(HEAD + "size = align(3)\nrun_intermediate_hooks('a', size)\n")
    assert len(imports(lean)) == 3


def test_library_calls_that_are_torchs_own_come_from_torch():
    names = {}
    exec(import_only_what_is_used(HEAD + "mm = extern_kernels.mm\n"), names)
    assert names["mm"] is torch.mm


def test_library_calls_of_inductors_own_stay_inductors():
    lean = import_only_what_is_used(HEAD + "f = extern_kernels.bias_addmm\n")
    assert "from torch._inductor.select_algorithm import extern_kernels" in imports(lean)
