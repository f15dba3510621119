"""Products of one row, written as sums, in what is compiled for a CPU.

A decode step multiplies one row by every weight. torch hands such a product to a library that reads
10 to 17 GB/s there; a sum that Inductor generates reads 30. On CUDA Inductor writes them so itself.
The row is kept in float32, and the product is rounded once.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch

from portable_cache import torch_private

aten, convert = torch.ops.aten, torch.ops.prims.convert_element_type.default


class RowSums(torch_private.CustomGraphPass):
    """Inductor's documented kind of pass: part of the caches' keys."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        rows: dict[torch.fx.Node, torch.fx.Node] = {}  # one in float32 for all its weights
        for product in (aten.mm.default, aten.addmm.default):
            for node in list(graph.find_nodes(op="call_function", target=product)):
                *bias, row, weight = node.args
                if row.meta["val"].shape[0] == 1 and weight.target is aten.permute.default:
                    with graph.inserting_before(node):
                        _write_sum(graph, node, bias, rows)

    def uuid(self) -> str:
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _write_sum(
    graph: torch.fx.Graph, node: torch.fx.Node, bias: list, rows: dict[torch.fx.Node, torch.fx.Node]
) -> None:
    """Put (1, outputs) of a row (1, inputs) and a weight (outputs, inputs) in a product's place."""

    def call(operator: Any, *arguments: Any) -> torch.fx.Node:
        made = graph.call_function(operator, arguments)
        values = [one.meta["val"] if isinstance(one, torch.fx.Node) else one for one in arguments]
        made.meta["val"] = operator(*values)
        return made

    row, weight = node.args[-2], node.args[-1].args[0]
    if row not in rows:
        # a tensor of its own, and as_strided has it written to memory: what makes the row, a norm
        # for instance, would be computed again for each row of the weight
        is_wide = row.meta["val"].dtype == torch.float32
        wide = call(aten.mul.Tensor, row, 1.0) if is_wide else call(convert, row, torch.float32)
        inputs = row.meta["val"].shape[1]
        rows[row] = call(aten.as_strided.default, wide, [1, inputs], [inputs, 1])
    products = call(aten.mul.Tensor, weight, rows[row])  # (outputs, inputs) float32
    total = call(aten.unsqueeze.default, call(aten.sum.dim_IntList, products, [1]), 0)
    for addend in bias:
        total = call(aten.add.Tensor, total, addend)
    dtype = node.meta["val"].dtype
    if dtype != torch.float32:
        total = call(convert, total, dtype)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
