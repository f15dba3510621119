"""The hand-written kernel of decode, in Triton's interpreter: its numbers and what it touches."""

import json
import sys
from pathlib import Path

import pytest
from helpers import run_command, succeeded

pytest.importorskip("triton", reason="torch for CPUs comes without Triton")

# float16 rounds the rotated heads, the weights and what is stored: a few units of 2**-11
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}


@pytest.fixture(scope="module")
def cases():
    script = Path(__file__).with_name("interpreted_attention.py")
    return json.loads(succeeded(run_command([sys.executable, script])).stdout)


@pytest.mark.parametrize("group", (1, 3, 4, 8))
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("dtype", tuple(TOLERANCE))
def test_kernel_equals_plain_attention_at_every_length(cases, dtype, head_dim, group):
    alike = [case for case in cases if case["case"][:3] == [dtype, head_dim, group]]
    assert len(alike) == (9 if group == 3 else 8)  # once with norms of each head
    for case in alike:
        assert case["error"] <= TOLERANCE[dtype], case
        assert case["stored_error"] <= TOLERANCE[dtype], case


def test_kernel_writes_its_own_slot_alone_and_reads_none_beyond(cases):
    # slots beyond the position hold NaN, which would show in the errors above
    assert all(case["others_untouched"] for case in cases)
    assert all(case["splits"] == 4 for case in cases)


@pytest.mark.parametrize(
    ("head_dim", "supported"), [(32, True), (64, True), (128, True), (80, False), (96, False)]
)
def test_heads_whose_halves_are_no_power_of_two_are_left_to_the_plain_path(head_dim, supported):
    from aotinductor.build import decode_kernel

    assert decode_kernel.supports(head_dim) is supported
