"""Whole steps of the layer programs over torch tensors: a loop over the layers, then the head."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from aotinductor.build.layer_graphs import state_shapes
from aotinductor.cache import CacheShape

# a program: its inputs in order; it writes into them and returns nothing
Run = Callable[[list[Tensor]], object]


class TorchSteps:
    """Runs `prefill` and `decode` over a state that it is given.

    `state` has a tensor for each of the state's names but the tables, `hidden` for the longest
    prompt; `tables` has keys and values of each layer, which is how it knows the depth. `inputs`
    names what each program takes; what is not of the state is one of `weights`.
    """

    def __init__(
        self, programs: Mapping[str, Run], inputs: Mapping[str, Sequence[str]],
        state: Mapping[str, Tensor], tables: Sequence[tuple[Tensor, Tensor]],
        weights: Mapping[str, Tensor],
    ):  # fmt: skip
        self.programs, self.inputs = programs, inputs
        self.state, self.tables, self.weights = dict(state), tables, weights

    def prefill(self, padded: int) -> None:
        """The prompt's rows stand in the first `padded` of `hidden`, its length in `position`."""
        self._run("prefill", {"hidden": self.state["hidden"][:, :padded]}, len(self.tables[0][0]))

    def decode(self, rows: int) -> None:
        """One token: decode gets the first `rows` of each table."""
        self._run("decode", {}, rows)

    @torch.no_grad()
    def _run(self, kind: str, own: Mapping[str, Tensor], rows: int) -> None:
        named = {**self.weights, **self.state, **own}
        layer_inputs, run = self.inputs[f"{kind}_layer"], self.programs[f"{kind}_layer"]
        for layer, (keys, values) in enumerate(self.tables):
            named |= {"keys": keys[:rows], "values": values[:rows]}
            run([named[name.format(layer=layer)] for name in layer_inputs])
        self.programs[f"{kind}_head"]([named[name] for name in self.inputs[f"{kind}_head"]])


def make_steps(
    programs: Mapping[str, Run], details: Mapping, rope: Tensor, weights: Mapping[str, Tensor]
) -> TorchSteps:
    """Return steps over an empty state, as deep as the weights are; `details` are a package's."""
    cache = CacheShape(**details["cache"])
    dtypes = {name: getattr(torch, dtype) for name, dtype in details["dtypes"].items()}
    widths = (details["hidden_size"], details["vocab_size"])
    shapes = state_shapes(cache, *widths, padded=cache.slots, rows=cache.rows)
    # Zeros, not empty: a slot that is masked still takes part as 0 * value, and 0 * nan is nan.
    state = {
        name: torch.zeros(shapes[name], dtype=dtypes[name], device=rope.device) for name in dtypes
    }
    keys, values = state.pop("keys"), state.pop("values")
    tables, layers = [], count_layers(weights)
    for _ in range(layers):
        tables.append((torch.zeros_like(keys), torch.zeros_like(values)))
    inputs = details["programs"]
    return TorchSteps(programs, inputs, state | {"rope": rope}, tables, weights)


def count_layers(weights: Iterable[str]) -> int:
    """Return how many layers a checkpoint with tensors of these names has."""
    numbers = (re.match(r"model\.layers\.(\d+)\.", name) for name in weights)
    return 1 + max(int(number[1]) for number in numbers if number)
