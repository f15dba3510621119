"""Whole steps of the layer programs over torch tensors: a loop over the layers, then the head."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch

from aotinductor.start.kv_engine import State
from aotinductor.start.loading import EMBEDDING
from aotinductor.start.memory import GpuMemory, Memory
from common.model.weights import Tensor

# a program: its inputs in order; it writes into them and returns nothing
Run = Callable[[list[torch.Tensor]], object]


def torch_view(tensor: Tensor, device: str) -> torch.Tensor:
    """Return the same memory as torch sees it; `tensor` must outlive it."""
    dtype = getattr(torch, tensor.dtype)
    if device == "cpu":
        raw = (ctypes.c_char * tensor.nbytes).from_address(tensor.address)
        return torch.frombuffer(raw, dtype=dtype).view(tensor.shape)

    class Bytes:
        __cuda_array_interface__ = {
            "shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.address, False),
            "version": 3,
        }  # fmt: skip

    return torch.as_tensor(Bytes(), device=device).view(dtype).view(tensor.shape)


class TorchSteps:
    """What a `KvEngine` steps with where graphs were compiled at runtime.

    `inputs` names what each program takes; what is not of the state is one of `weights`.
    """

    takes_prompts = True

    def __init__(
        self, programs: Mapping[str, Run], inputs: Mapping[str, Sequence[str]],
        weights: Mapping[str, torch.Tensor], state: State, memory: Memory,
    ):  # fmt: skip
        device = memory.device
        self._programs, self._inputs, self._weights = programs, inputs, weights
        self._tables = [
            {"keys": torch_view(keys, device), "values": torch_view(values, device)}
            for keys, values in zip(state.keys, state.values, strict=True)
        ]
        single = {name: one for name, one in state._asdict().items() if isinstance(one, Tensor)}
        self._state = {name: torch_view(one, device) for name, one in single.items()}
        self._stream = None
        if isinstance(memory, GpuMemory):
            self._stream = torch.cuda.ExternalStream(memory.stream.handle.value)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._all_rows = len(self._tables[0]["keys"])

    @torch.no_grad()
    def rotate_with(self, inv_freq: list[float], attention_scaling: float) -> None:
        """Write the rotations of every slot, in float32, as Hugging Face computes them."""
        rope = self._state["rope"]  # (2, slots, head_dim): cosines, and signed sines
        positions = torch.arange(rope.shape[1], dtype=torch.float32, device=rope.device)
        frequencies = torch.tensor(inv_freq, dtype=torch.float32, device=rope.device)
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
        rope.copy_(torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))))

    @torch.no_grad()
    def embed(self, token_ids: Sequence[int], name: str) -> None:
        """Put the tokens' embeddings into `row` or the beginning of `hidden`."""
        with self._in_stream():
            table, place = self._weights[EMBEDDING], self._state[name].flatten()
            rows = table[torch.tensor(token_ids, device=table.device)].flatten()
            place[: len(rows)].copy_(rows)

    def prefill(self, length: int, padded: int) -> None:
        """The prompt's rows stand in the first `padded` of `hidden`."""
        # the rows of the longest prompt lie one after the other, so fewer are a tensor of their own
        hidden = self._state["hidden"].flatten()[: padded * self._state["row"].shape[0]]
        self._run("prefill_layer", {"hidden": hidden.view(1, padded, -1)}, self._all_rows)
        with torch.no_grad(), self._in_stream():
            self._state["position"].fill_(length - 1)  # the head counts the last token itself
            self._state["row"].copy_(hidden.view(padded, -1)[length - 1])
        self._run_head()

    def decode(self, rows: int) -> None:
        """One token: decode gets the first `rows` of each table."""
        if self._graph is None:
            self._run("decode_layer", {}, rows)
            self._run_head()
        else:
            with self._in_stream():
                self._graph.replay()

    def capture(self) -> None:
        """Record decode as a CUDA graph; what was in the state is lost."""
        for _ in range(2):  # compiles and loads, which a capture cannot
            self.decode(self._all_rows)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self.decode(self._all_rows)
        self._graph = graph

    @torch.no_grad()
    def _run(self, name: str, own: Mapping[str, torch.Tensor], rows: int) -> None:
        named, inputs = {**self._weights, **self._state, **own}, self._inputs[name]
        with self._in_stream():
            for layer, tables in enumerate(self._tables):
                named |= {table: tensor[:rows] for table, tensor in tables.items()}
                self._programs[name]([named[one.format(layer=layer)] for one in inputs])

    @torch.no_grad()
    def _run_head(self) -> None:
        named = {**self._weights, **self._state}
        with self._in_stream():
            self._programs["head"]([named[one] for one in self._inputs["head"]])

    def _in_stream(self):
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()
