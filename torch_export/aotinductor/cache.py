"""The shape of a KV cache, as a build and a start both know it. Standard library only.

Each layer has a table for K and one for V, slot after slot: (rows, kv_heads * head_dim). The first
rows of a table are contiguous, so a program can be given those in use alone.
"""

from typing import NamedTuple

# Tables are cut at multiples of this. More would read slots that hold nothing, fewer save little:
# 64 slots are less than a tenth of a step (random:tiny on a CPU).
BLOCK_ROWS = 64


class CacheShape(NamedTuple):
    """A KV cache for `slots` tokens of one sequence, in each layer."""

    slots: int
    kv_heads: int
    head_dim: int

    @property
    def rows(self) -> int:
        """Rows of a table: the slots, and what fills the last block."""
        return -(-self.slots // BLOCK_ROWS) * BLOCK_ROWS

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.kv_heads * self.head_dim

    def rows_in_use(self, length: int) -> int:
        """Rows of the blocks that hold the slots 0 to `length`."""
        return (length // BLOCK_ROWS + 1) * BLOCK_ROWS


def state_shapes(
    cache: CacheShape, hidden_size: int, vocab_size: int, padded: int, rows: int
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of the state's tensors, the tables being those of one layer."""
    return {
        "row": (hidden_size,),
        "hidden": (1, padded, hidden_size),
        "token": (1, 1),
        "position": (1,),
        "rope": (2, cache.slots, cache.head_dim),
        "keys": (rows, cache.width),
        "values": (rows, cache.width),
        "logits": (1, vocab_size),
    }
