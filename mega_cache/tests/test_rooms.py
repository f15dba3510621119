"""What each room may import, and that private names of the stack stand in one module."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import FOLDER

from portable_cache import torch_private

PACKAGE = FOLDER / "portable_cache"
STACK = ("torch", "transformers", "triton")
# what common/compiler reads and replaces itself, to count what was compiled and to tell of tuning
IN_COMMON = (
    "torch._dynamo.utils.counters",
    "torch._dynamo.utils.get_compilation_metrics",
    "torch._dynamo.utils.compilation_time_metrics",
    "torch._inductor.async_compile.AsyncCompile.process_pool",
    "torch._inductor.triton_bundler.TritonBundler.read_and_emit",
    "torch._inductor.runtime.cache_dir_utils.cache_dir",
    "torch._inductor.runtime.cache_dir_utils.triton_cache_dir",
    "torch._inductor.select_algorithm.AlgorithmSelectorCache.log_results",
    "torch._inductor.select_algorithm._log_autotune_choices_stats",
)

PUBLIC = ("_asdict", "_replace")  # of a NamedTuple


def modules(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (PACKAGE / room).glob("*.py"))


def imported(path: Path) -> list[str]:
    """Return the full name of every module and every name that a file imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def private_names(path: Path) -> list[str]:
    """Return private parts of modules that are imported, and private attributes of anything else.

    Of `self` and `cls` they are this package's own.
    """
    found = [
        name
        for name in imported(path)
        if name.startswith(STACK) and any(part.startswith("_") for part in name.split("."))
    ]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own and not node.attr.startswith("__") and node.attr not in PUBLIC:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", modules(".", "start"), ids=lambda path: path.stem)
def test_a_start_imports_nothing_of_a_build(path):
    assert not [name for name in imported(path) if name.startswith("portable_cache.build")]


@pytest.mark.parametrize("path", modules("start"), ids=lambda path: path.stem)
def test_a_start_imports_nothing_that_measures(path):
    assert not [name for name in imported(path) if name.startswith("common.measure")]


@pytest.mark.parametrize("path", modules(".", "start", "build"), ids=lambda path: path.stem)
def test_private_names_of_the_stack_stand_in_one_module(path):
    assert path.name == "torch_private.py" or not private_names(path)


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._inductor import config",
        "from torch import _inductor",
        "def f(): from torch.compiler._cache import CacheArtifact",
        "torch._dynamo.reset()",
        "model.config._attn_implementation",
    ],
)
def test_a_private_name_is_found_in_any_form(line, tmp_path):
    file = tmp_path / "module.py"
    file.write_text(line)
    assert len(private_names(file)) == 1


NAMES = (*torch_private.NAMES.values(), *IN_COMMON)


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_is_on_this_stack_as_the_table_says(name):
    if name.startswith("triton.") and not torch.cuda.is_available():
        pytest.skip("Triton is asked on CUDA only")
    torch_private.owner_of(name)  # or it raises


def test_every_name_of_the_table_is_used():
    text = "".join(path.read_text() for path in modules(".", "start", "build"))
    named = {short: len(re.findall(rf'torch_private\.{short}\b|"{short}"', text))
             for short in torch_private.NAMES}  # fmt: skip
    assert [short for short, times in named.items() if times < 2] == []  # once in the table


GONE = """
import torch._inductor.codecache as codecache
{damage}
from portable_cache import torch_private
from portable_cache.start import bundle, cpu_kernels

cpu_kernels.record()
print(len(torch_private.lost), *torch_private.lost, sep="\\n")
"""


@pytest.mark.parametrize(
    ("damage", "told", "then"),
    [
        ("", None, None),
        (
            "codecache.CppPythonBindingsCodeCache.load_pybinding_async = lambda other: None",
            "it takes no submit_fn",
            "g++ compiles the C++ kernels of a traced graph at each load",
        ),
        (
            "del codecache.CppPythonBindingsCodeCache.load_pybinding_async",
            "CppPythonBindingsCodeCache.load_pybinding_async as known here",
            "g++ compiles the C++ kernels of a traced graph at each load",
        ),
    ],
)
def test_a_name_that_is_gone_or_changed_is_one_line_that_says_what_still_works(damage, told, then):
    done = subprocess.run(
        [sys.executable, "-c", GONE.format(damage=damage)],
        capture_output=True, text=True, cwd=FOLDER,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, *lines = done.stdout.splitlines()
    assert int(count) == len(lines) == (told is not None)
    if told:
        assert told in lines[0] and lines[0].endswith(then) and "tested" not in then
