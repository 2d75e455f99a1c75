"""all_finite: any inf or nan, in any dtype and stride."""

from __future__ import annotations

import pytest
import torch

from bda_fx.passes.read_weights import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_value_that_is_not_finite(dtype: torch.dtype, value: float) -> None:
    matrix = torch.randn(33, 65).to(dtype)
    matrix[0, 0] = torch.finfo(dtype).max  # as large as can be, and finite
    assert all_finite(matrix)
    assert all_finite(matrix.T)
    for at in ((0, 1), (32, 64), (17, 30)):
        broken = matrix.clone()
        broken[at] = value
        assert not all_finite(broken)
        assert not all_finite(broken.T)


def test_nothing_is_finite() -> None:
    assert all_finite(torch.empty(0, 3))
