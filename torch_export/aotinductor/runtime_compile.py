"""What a start without a package does instead: compile the same graph in this process."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aotinductor.base_generation import Step
from aotinductor.base_graph import BaseGraph, export_base_graph
from aotinductor.bounds import Bounds
from aotinductor.building import compile_base_package
from aotinductor.loading import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_lazily(
    model: "PreTrainedModel", bounds: Bounds, one_dynamic_graph: bool, max_autotune: bool
) -> Step:
    """Return the base graph under torch.compile; its first call compiles."""
    dynamic = False
    if bounds.dynamic_seq_len:
        # None is torch's own way: static at first, dynamic from the second length on
        dynamic = True if one_dynamic_graph else None
    return torch.compile(
        BaseGraph(model),
        fullgraph=True,
        dynamic=dynamic,
        mode="max-autotune" if max_autotune else "default",
    )


def compile_now(
    model: "PreTrainedModel", bounds: Bounds, example_seq_len: int, max_autotune: bool
) -> Step:
    """Export, compile and load a package that is gone when the process ends."""
    exported = export_base_graph(model, bounds, example_seq_len)
    with tempfile.TemporaryDirectory(prefix="llama-package-") as folder:
        path = Path(folder, "model.pt2")
        compile_base_package(exported, path, max_autotune)
        return open_model(str(path), model.device)
