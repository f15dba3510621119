"""The decode kernel's numbers in Triton's interpreter, beside attention written plainly.

Run by test_decode_kernel.py in a process of its own: TRITON_INTERPRET counts when the kernel is
defined. Prints a JSON list with one object for each case.
"""

import json
import os
import sys
from itertools import product
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from triton.runtime import interpreter

from aotinductor.build import decode_kernel
from aotinductor.build.layer_graphs import plain_attention

# around the kernel's block of 32 slots; splits are empty, partly full or several blocks long
POSITIONS = (0, 1, 31, 32, 33, 130, 517, 1023)
SLOTS = 1024
KV_HEADS = 2
# 4 splits, so that the loop of each goes round up to 8 times
decode_kernel.PROGRAMS = 4 * KV_HEADS
# which refuses an interpreted kernel
decode_kernel.wrap_triton = lambda kernel: kernel


def measure(dtype: torch.dtype, head_dim: int, group: int, position: int, normed: bool) -> dict:
    """Return how far the kernel is from float32 attention, and whether it wrote one slot only."""
    generator = torch.Generator().manual_seed(position)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    width = KV_HEADS * head_dim
    q, k, v = random(group * width), random(width), random(width)
    before = [random(SLOTS, width), random(SLOTS, width)]
    frequencies = torch.logspace(0, -4, head_dim // 2)
    rope = rope_table(frequencies)
    place = torch.tensor([position])

    expected_tables = [table.float() for table in before]
    row = [tensor.float() for tensor in (q, k, v)]
    norms = [1 + random(head_dim), 1 + random(head_dim)] if normed else []
    how = (place, rope, norms, head_dim**-0.5, 1e-5)
    expected = plain_attention(*row, *expected_tables, *how)

    tables = [table.clone() for table in before]
    for table in tables:
        table[position:] = float("nan")  # no slot from here on may be read
    parts, lse = decode_kernel.attend(q, k, v, *tables, *how)
    found = decode_kernel.join(parts, lse).flatten()
    stored = [table[position].float() for table in tables]
    return {
        "case": [str(dtype).removeprefix("torch."), head_dim, group, position, normed],
        "splits": len(parts),
        "error": relative_error(found, expected),
        "stored_error": max(
            relative_error(now, table[position])
            for now, table in zip(stored, expected_tables, strict=True)
        ),
        "others_untouched": all(
            torch.equal(now[:position], was[:position]) and bool(now[position + 1 :].isnan().all())
            for now, was in zip(tables, before, strict=True)
        ),
    }


def rope_table(frequencies: torch.Tensor) -> torch.Tensor:
    """Return (2, slots, head_dim): cosines and signed sines."""
    angles = torch.arange(float(SLOTS))[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def allow_tensor_bounds() -> None:
    """Let the interpreter run loops that end at a value on the device.

    Its tensors hold arrays of one element there, which newer NumPy refuses to take for a number.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):  # which newer Triton adds
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patched


if __name__ == "__main__":
    allow_tensor_bounds()
    torch.set_num_threads(1)
    kinds = (torch.float32, torch.float16), (64, 128)
    cases = [*product(*kinds, (1, 3, 4, 8), POSITIONS, [False])]
    cases += product(*kinds, [3], [130], [True])  # norms know nothing of groups and positions
    print(json.dumps([measure(*case) for case in cases]))
