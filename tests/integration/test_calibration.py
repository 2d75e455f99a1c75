"""``calibration=``: typical inputs, which positions of them count, and inputs of the wrong kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bda_fx
from tests.programs import Attention, B, E, S, randn


class Masked(nn.Module):
    """Attention whose second half of the outputs is x, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        return torch.cat([self.attention(x)[:, : S // 2], x[:, S // 2 :] * 2.5], 1)


X = randn(B, S, E)
FIRST_HALF = (torch.arange(S) < S // 2).long().expand(B, S)


def shares(calibration: Any) -> list[float]:
    report = bda_fx.analyze(Masked(), (X,), {"counts": FIRST_HALF}, calibration=calibration)
    assert report.rewritten
    return [site.noise_share or 0.0 for site in report.rewritten]


def test_a_mask_by_name_or_as_a_tensor() -> None:
    kwargs = {"counts": FIRST_HALF}
    every = shares([((X,), kwargs)])
    first = shares([((X,), kwargs, "counts")])
    assert sum(first) > sum(every) > 0
    assert shares([((X,), kwargs, FIRST_HALF)]) == first
    assert shares([((X,), kwargs, None)]) == every
    assert sum(shares([((X,), kwargs, 1 - FIRST_HALF)])) == 0


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([((X,), {"counts": FIRST_HALF}, "mask")], TypeError, "'mask', which is not among"),
        ([((X,), {"counts": FIRST_HALF}, 3)], TypeError, "is a tensor or the name of a keyword"),
        ([((X,), {"counts": FIRST_HALF}, None, None)], TypeError, r"\(args, kwargs, mask\)"),
        ([X], TypeError, r"a sequence of \(args, kwargs\)"),
        ([((X,), {"x": X})], TypeError, r"a sequence of \(args, kwargs\)"),
        ([], ValueError, "holds no inputs"),
    ],
)
def test_calibration_of_the_wrong_kind(calibration: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        shares(calibration)
