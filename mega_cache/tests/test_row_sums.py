"""Products of one row as sums: the same numbers, rounded once, and no call of a library."""

import pytest
import torch
from torch import nn

from portable_cache import torch_private
from portable_cache.start.row_sums import RowSums


class Mlp(nn.Module):
    """A norm and three products, of which two share their row; like a decoder layer's."""

    def __init__(self, bias: bool):
        super().__init__()
        self.norm = nn.RMSNorm(96)
        self.gate, self.up = nn.Linear(96, 160, bias), nn.Linear(96, 160, bias)
        self.down = nn.Linear(160, 96, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(row)) * self.up(row))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_row_gives_the_numbers_of_float32_rounded(dtype, bias, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model, x = Mlp(bias).to(dtype), torch.randn(1, 1, 96).to(dtype)
    expected = model.float()(x.float())
    model = model.to(dtype)
    eager_error = (model(x).float() - expected).abs().max()
    torch._dynamo.reset()
    with torch.no_grad(), torch_private.config.patch(post_grad_custom_pre_pass=RowSums()):
        compiled = torch.compile(model, fullgraph=True)
        found, (code,) = torch._inductor.utils.run_and_get_code(compiled, x)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() <= 1.2 * eager_error + 1e-5
    assert "mm(" not in code


def test_products_of_several_rows_stay_the_librarys(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    with torch.no_grad(), torch_private.config.patch(post_grad_custom_pre_pass=RowSums()):
        compiled = torch.compile(Mlp(False), fullgraph=True)
        _, (code,) = torch._inductor.utils.run_and_get_code(compiled, torch.randn(1, 2, 96))
    assert code.count("mm(") == 3


def test_the_pass_is_in_the_key_by_its_source():
    assert RowSums().uuid() == RowSums().uuid() and len(RowSums().uuid()) == 64
