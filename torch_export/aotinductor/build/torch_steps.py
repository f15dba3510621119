"""Whole steps of the layer programs over torch tensors: a loop over the layers, then the head."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

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
