"""What each room may import is its rule: a start neither torch nor transformers, nor a build."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import FOLDER

THEIRS = ("torch", "transformers", "triton", "accelerate", "safetensors")
START = sorted(FOLDER.glob("aotinductor/start/*.py"))
# asked behind a question that a start with a known checkpoint doesn't have
ASKED = {"common.model.resolve", "common.model.presets"}


def modules() -> dict[str, Path]:
    """Return the folder's modules by name, without tests and scripts."""
    found = {}
    for room in ("aotinductor", "common"):
        for path in FOLDER.glob(f"{room}/**/*.py"):
            name = ".".join(path.relative_to(FOLDER).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Return what a module imports, inside functions too, but not for types alone."""
    tree, found = ast.parse(path.read_text()), set()
    for node in walk(tree):
        if isinstance(node, ast.Import):
            found |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module)
            found |= {f"{node.module}.{one.name}" for one in node.names} & MODULES.keys()
    return found


def walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from walk(child)


def reached(*names: str, but: frozenset[str] = frozenset()) -> dict[str, str]:
    """Return everything that is imported from these modules on, and by what first."""
    found, new = {}, list(names)
    while new:
        name = new.pop()
        path = MODULES.get(name)
        for imported in imports(path) if path and name not in but else ():
            if imported not in found:
                found[imported] = name
                new.append(imported)
    return found


def of(found: dict[str, str], *rooms: str) -> dict[str, str]:
    """Return those of what was reached that are of the rooms, or packages."""
    return {
        name: by
        for name, by in found.items()
        if any(name == room or name.startswith(f"{room}.") for room in rooms)
    }


def names_of(paths: list[Path]) -> list[str]:
    return [name for name, path in MODULES.items() if path in paths]


def test_a_start_reaches_neither_torch_nor_transformers():
    assert len(START) > 8
    found = reached("aotinductor", *names_of(START), but=frozenset(ASKED))
    assert of(found, *THEIRS) == {}
    # the search reaches what it should, also what functions import
    assert {"numpy", "tokenizers", "jinja2.sandbox"} <= found.keys()
    assert of(found, *ASKED).keys() == ASKED


def test_what_is_asked_reaches_them_inside_functions_alone():
    assert of(reached(*ASKED), "torch", "transformers").keys() >= {"torch", "transformers"}
    for name in ASKED:
        for node in ast.parse(MODULES[name].read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "torch" not in ast.unparse(node) and "transformers" not in ast.unparse(node)


def test_a_start_reaches_nothing_of_a_build_and_nothing_that_measures():
    found = reached("aotinductor", *names_of(START))
    assert of(found, "aotinductor.build", "aotinductor.native", "common.measure") == {}
    assert of(found, "common.compiler") == {}


@pytest.mark.parametrize("name", sorted(name for name in MODULES if ".measure." in name))
def test_measuring_imports_no_torch_but_for_the_floor(name):
    found = of(dict.fromkeys(imports(MODULES[name]), name), *THEIRS)
    assert bool(found) is (name == "common.measure.floor")


@pytest.mark.parametrize("line", ["import torch", "from torch import nn", "import torch.nn as nn"])
def test_an_import_is_found_where_it_stands(line, tmp_path):
    module = tmp_path / "module.py"
    for text in (line, f"def f():\n    if True:\n        {line}", f"class C:\n    {line}"):
        module.write_text(text)
        found = dict.fromkeys(imports(module), "module")
        assert of(found, "torch")
    guarded = f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}"
    module.write_text(guarded)
    assert not of(dict.fromkeys(imports(module), "module"), "torch")
