"""Private names of torch are touched in one place, which says so when one is gone."""

import ast
from pathlib import Path

import pytest

from aotinductor import torch_private
from common.errors import EnvironmentProblemError

PACKAGE = Path(torch_private.__file__).parent


def private_names(source: str) -> list[str]:
    """Return what a module imports of torch, or reaches from it, with an underscore in front."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
    ours = (name.split(".") for name in found if name.split(".")[0] == "torch")
    return [".".join(parts) for parts in ours if any(is_private(part) for part in parts)]


def is_private(part: str) -> bool:
    return part.startswith("_") and not part.endswith("__")


def test_no_other_module_touches_a_private_name_of_torch():
    others = [path for path in PACKAGE.rglob("*.py") if path.name != "torch_private.py"]
    assert len(others) > 10
    assert {path.name: names for path in others if (names := private_names(path.read_text()))} == {}


def test_the_search_finds_each_way_to_a_private_name():
    ways = "import torch._inductor", "from torch import _C", "torch._C._aoti.x()", "torch.a._b = 1"
    assert all(private_names(way) for way in ways)
    assert private_names("import torch\ntorch.__version__") == []


def test_a_name_that_is_gone_is_one_line():
    with pytest.raises(EnvironmentProblemError, match=r"torch\._inductor\.no_such is not in torch"):
        torch_private.find("torch._inductor", "no_such")
