"""Weights that are stored in another dtype than the model's become what torch makes of them."""

import pytest
import torch

from aotinductor.native.compile import compile_steps
from aotinductor.start.c_interface import converter, open_library

# every 16-bit pattern, each with what a rounding looks at: ties, just above and below, none
PATTERNS = (torch.arange(1 << 16) << 16)[:, None] | torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001])


@pytest.fixture(scope="module")
def convert(tmp_path_factory):
    library = open_library(str(compile_steps(tmp_path_factory.mktemp("native"))))
    bring = converter(library)

    def convert(values, wanted):
        result = torch.empty(values.shape, dtype=wanted)
        names = [str(one.dtype).removeprefix("torch.") for one in (values, result)]
        bring(values.data_ptr(), names[0], result.data_ptr(), names[1], values.numel())
        return result

    return convert


def bits(tensor):
    """Return the bits of what is a number; every NaN is like the other (torch's vary)."""
    kind = torch.int32 if tensor.element_size() == 4 else torch.int16
    return tensor.view(kind).masked_fill(tensor.isnan(), 0x7FC0)


def values_of(dtype):
    if dtype in (torch.bfloat16, torch.float16):
        return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    single = PATTERNS.flatten().to(torch.int32).view(torch.float32)
    return single.to(dtype)


@pytest.mark.parametrize("wanted", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize(
    "stored", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str
)
def test_every_rounding_overflow_and_nan_is_torchs(stored, wanted, convert):
    values = values_of(stored)
    found, expected = convert(values, wanted), values.to(wanted)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(bits(found), bits(expected))


def test_a_length_that_is_no_multiple_of_a_vector_is_converted_to_its_end(convert):
    values = torch.randn(2048 + 13)
    assert torch.equal(convert(values, torch.bfloat16), values.bfloat16())
