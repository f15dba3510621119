"""The shape of the static KV cache, and the rope table that goes with it: torch alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CacheShape:
    """The shape of k_cache and of v_cache, each (layers, batch, kv_heads, slots, head_dim)."""

    layers: int
    kv_heads: int
    slots: int
    head_dim: int
    batch: int = 1

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
    def size(self) -> tuple[int, int, int, int, int]:
        return (self.layers, self.batch, self.kv_heads, self.slots, self.head_dim)


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
