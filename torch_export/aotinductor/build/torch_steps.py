"""Steps of programs that torch compiled in this process, over the state of a package's engine."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from aotinductor.start.kv_engine import State
from aotinductor.start.loading import EMBEDDING
from aotinductor.start.memory import GpuMemory, Memory
from aotinductor.start.steps import DECODE, PREFILL
from common.model.weights import Tensor


class TorchSteps:
    """What a `KvEngine` steps with, as `PackageSteps`; each program is a function of tensors."""

    takes_prompts = True

    def __init__(
        self, functions: Mapping[str, Callable[..., object]], details: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor], state: State, memory: Memory,
    ):  # fmt: skip
        """`details` as the metadata of a package has them. A function writes into its inputs."""
        self._functions, self._inputs = functions, details["programs"]
        self._embedding, self._stream = weights[EMBEDDING].detach(), None
        if isinstance(memory, GpuMemory):
            self._stream = torch.cuda.ExternalStream(memory.stream.handle.value)
        views: dict[str, Any] = {
            name: torch_view(one, memory.device) if isinstance(one, Tensor)
            else [torch_view(table, memory.device) for table in one]
            for name, one in state._asdict().items()
        }  # fmt: skip
        names = {name for inputs in self._inputs.values() for name in inputs if "." in name}
        # what the programs of each layer are given, by the names of their inputs
        self._given: list[dict[str, torch.Tensor]] = [
            views
            | {name: weights[name.format(layer=layer)] for name in names}
            | {"keys": views["keys"][layer], "values": views["values"][layer]}
            for layer in range(len(state.keys))
        ]
        self._rotate_with(**details["rope"])

    def _rotate_with(self, inv_freq: Sequence[float], attention_scaling: float) -> None:
        rope = self._given[0]["rope"]  # (2, slots, head_dim): cosines, and signed sines
        angles = torch.outer(torch.arange(rope.shape[1]), torch.tensor(inv_freq))
        cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
        with self._on_stream():
            rope.copy_(torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)]))

    def embed(self, token_ids: Sequence[int], name: str) -> None:
        """Put the tokens' embeddings into `row` or the beginning of `hidden`."""
        place = self._given[0][name].view(-1, self._embedding.shape[1])
        with self._on_stream():
            ids = torch.tensor(token_ids, device=place.device)
            place[: len(ids)] = self._embedding[ids]

    def prefill(self, length: int, padded: int) -> None:
        state = self._given[0]
        hidden = state["hidden"][0]  # (slots, hidden)
        with self._on_stream():
            state["position"].fill_(length - 1)  # the head counts the last token itself
            for given in self._given:
                self._call(PREFILL, given | {"hidden": hidden[:padded][None]})
            state["row"].copy_(hidden[length - 1])
            self._call(DECODE[1], state)

    def decode(self, rows: int) -> None:
        with self._on_stream():
            for given in self._given:
                in_use = {name: given[name][:rows] for name in ("keys", "values")}
                self._call(DECODE[0], given | in_use)
            self._call(DECODE[1], self._given[0])

    @torch.no_grad()
    def _call(self, program: str, given: Mapping[str, torch.Tensor]) -> None:
        self._functions[program](*[given[name] for name in self._inputs[program]])

    def _on_stream(self) -> AbstractContextManager:
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()


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
