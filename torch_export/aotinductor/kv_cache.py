"""The shape of the static KV cache, and the rope table that goes with it: torch alone.

Each layer has a table for K and one for V, slot after slot: (rows, kv_heads * head_dim). A graph
that takes every table as an input of its own writes to it in place; through a view of one larger
tensor Inductor copies the tensor first (torch 2.9.1 to 2.13). And the first slots of a table are
contiguous: a graph can be given those in use alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Tables are cut at multiples of this. More would read slots that hold nothing, fewer save little:
# 64 slots are less than a tenth of a step (random:tiny on a CPU).
BLOCK_ROWS = 64


@dataclass(frozen=True)
class CacheShape:
    """The shape of a KV cache for `slots` tokens of one sequence."""

    layers: int
    kv_heads: int
    slots: int
    head_dim: int

    @classmethod
    def of(cls, config: object, slots: int) -> "CacheShape":
        """Read the shape from a Llama-family transformers configuration."""
        head_dim = getattr(config, "head_dim", None)
        return cls(
            layers=config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            slots=slots,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
        )

    @property
    def rows(self) -> int:
        """Rows of a table: the slots, and what fills the last block."""
        return -(-self.slots // BLOCK_ROWS) * BLOCK_ROWS

    def rows_in_use(self, position: int) -> int:
        """Return how many rows a step needs that writes to slot `position`: whole blocks.

        Raises ValueError beyond the last slot. No graph checks that: on a CPU it ends the process,
        on CUDA it overwrites other memory.
        """
        if not 0 <= position < self.slots:
            raise ValueError(f"no slot {position} in a KV cache of {self.slots}")
        return (position // BLOCK_ROWS + 1) * BLOCK_ROWS

    def make_tables(self, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
        """Return the tables in the graphs' order, K and V of layer 0 first.

        Zeros, not empty: a slot that is masked still takes part as 0 * value, and 0 * nan is nan.
        """
        size = (self.rows, self.kv_heads * self.head_dim)
        return [torch.zeros(size, dtype=dtype, device=device) for _ in range(2 * self.layers)]


def rope_table(
    inv_freq: Sequence[float],
    attention_scaling: float,
    slots: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Return (2, slots, head_dim): cosines and signed sines, as Hugging Face computes them.

    Once at the start, in float32, where a generated kernel would do it for every layer of every
    step.
    """
    positions = torch.arange(slots, dtype=torch.float32, device=device)
    angles = positions[:, None] * torch.tensor(inv_freq, dtype=torch.float32, device=device)
    cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(dtype)
